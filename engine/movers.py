"""The movers by name: what each needs, what `protect` gives up, and why it may take no page.

Must not know: clients, how a page moves.
"""

from __future__ import annotations

import sys
from typing import Any

from userswap.native import ffi, lib

NUMBERS = {"move": lib.US_MOVER_MOVE, "protect": lib.US_MOVER_PROTECT}
NAMES = {number: name for name, number in NUMBERS.items()}
LIMIT_OF_PROTECT = (
    "the mover protect may lose what direct I/O (O_DIRECT) brings into paged memory when it takes "
    f"more than {lib.US_GRACE_MS} ms"
)
_HELD = {
    lib.US_HELD_NOT: "",
    lib.US_HELD_PINNED: "the process holds memory pinned for I/O (VmPin), and the mover protect "
    "cannot tell whether it is this",
    lib.US_HELD_MERGED: "KSM merges memory of the process, which drops write protection",
    lib.US_HELD_UNKNOWN: "the process's VmPin cannot be read: pinned pages would not be known",
}
_limit_told = False


def held_by(region: Any) -> str:
    """Why the mover protect takes no written page of a native region; "" when it may."""
    report = ffi.new("struct us_report *")
    lib.us_region_report(region, report)
    return _HELD[report.held]


def tell_limit() -> None:
    """Say once per process what `protect` gives up."""
    global _limit_told
    if not _limit_told and sys.stderr is not None:
        print(f"userswap: {LIMIT_OF_PROTECT}", file=sys.stderr, flush=True)
    _limit_told = True
