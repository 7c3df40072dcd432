"""What a policy in Python has to offer, built in or a user's own: plain objects, told and asked.

Pure: no I/O, no clock, no threads. `check_policy` of `userswap.engine.policy_conformance` holds one
to the contract.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

PAGES_MAX = 256
"""Of one answer of a prefetch policy; what is named beyond is left aside."""


class PrefetchPolicy(Protocol):
    """Told of demand faults, answers with pages to read ahead, the most urgent first."""

    def fault(self, page: int, /) -> Iterable[int]: ...

    def used(self, page: int, /) -> None:
        """A page that was read ahead is seen to be used. Most are not seen."""


class EvictionPolicy(Protocol):
    """Holds the pages that came in, and names those that should go."""

    def insert(self, page: int, /, *, ahead: bool = False) -> None:
        """`page`, which is not here, came in; ahead: nobody has touched it yet."""

    def touch(self, page: int, /) -> None:
        """A touch that was seen. Most are not."""

    def victim(self) -> int | None:
        """The page that goes, and is not here any more; None: there is none."""
