"""What a process does whose memory is on another machine, each function in a child (proof.py)."""

from __future__ import annotations

import sys

from exercise import PAGE, Region, expect
from scenarios import LEAST, MIB, copy_out, fill, stamp, stored_pages


def touch_when_told(*, store: str) -> None:
    """Touches a page that is out after standard input was closed."""
    with Region(4 * MIB, resident=LEAST, store=store, prefetch="none") as region:
        fill(region)
        region.flush()
        page = stored_pages(region)[3]
        print("ready", flush=True)
        sys.stdin.read()
        expect(region.memory[page * PAGE : (page + 1) * PAGE] == stamp(page, 0), "is lost")
        expect(copy_out(region, page) == stamp(page, 0), "is lost")
        print("good", flush=True)
