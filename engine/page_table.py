"""Page states as Python sees them, and where regions lie in a client's table.

The table itself is native (native/word.h has the states, the transition table and the invariants):
one 8-byte word a page, in a memfd that outlives the pager. This module names the states and hands
out the ranges of words, called extents.

Must not know: addresses, stores, how a word changes.
"""

from __future__ import annotations

import enum

from userswap.native import lib

TABLE_SLOTS = 1 << 32
"""Pages of one client, all its regions together: 16 TiB."""

SLOTS_PER_TABLE_PAGE = 512
"""Extents start on pages of the table, so that closing a region gives its pages back."""


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
        rounded = -(-count // SLOTS_PER_TABLE_PAGE) * SLOTS_PER_TABLE_PAGE
        for at, (first, room) in enumerate(self._free):
            if room >= rounded:
                rest = [(first + rounded, room - rounded)] if room > rounded else []
                self._free[at : at + 1] = rest
                return first
        raise MemoryError

    def release(self, first: int, count: int) -> None:
        """Give an extent back."""
        rounded = -(-count // SLOTS_PER_TABLE_PAGE) * SLOTS_PER_TABLE_PAGE
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (first, rounded)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged
