"""Page states as Python sees them, and where regions lie in a client's table.

The table itself is native (native/word.h has the states, the transition table and the invariants,
native/table.h the layout): one 8-byte word a page, in a tree whose nodes are made when they are
needed, in a memfd that outlives the pager. This module names the states and hands out the ranges of
slots, called extents.

Must not know: addresses, stores, how a word changes.
"""

from __future__ import annotations

import enum

from userswap.native import lib

TABLE_SLOTS: int = lib.US_TABLE_SLOTS
"""Pages of one client, all its regions together: 16 TiB."""

EXTENT_SLOTS: int = lib.US_BRANCH_PAGES
"""Extents are multiples of a branch, which has one owner: closing it gives its memory back."""


class State(enum.IntEnum):
    """See native/word.h."""

    ZERO = 0
    FILLING = 1
    CLEAN = 2
    UNPROTECTING = 3
    DIRTY = 4
    MOVING = 5
    LEAVING = 6
    DROPPING = 7
    STORED = 8
    POISONED = 9
    PROTECTED = 10


def transitions() -> dict[State, frozenset[State]]:
    """The one transition table, as the native core has it."""
    return {
        state: frozenset(next_ for next_ in State if lib.us_transitions_from(state) >> next_ & 1)
        for state in State
    }


class Extents:
    """First-fit allocation of ranges of table slots."""

    def __init__(self, slots: int = TABLE_SLOTS) -> None:
        self._free = [(0, slots)]  # (first, count), sorted, never adjacent

    def allocate(self, count: int) -> int:
        """The first slot of a new extent; raises MemoryError when no range is long enough."""
        rounded = -(-count // EXTENT_SLOTS) * EXTENT_SLOTS
        for at, (first, room) in enumerate(self._free):
            if room >= rounded:
                rest = [(first + rounded, room - rounded)] if room > rounded else []
                self._free[at : at + 1] = rest
                return first
        raise MemoryError

    def release(self, first: int, count: int) -> None:
        """Give an extent back."""
        rounded = -(-count // EXTENT_SLOTS) * EXTENT_SLOTS
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (first, rounded)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged
