"""Prefetch policies by name, as pure objects.

The policies are C (native/readahead.h says what one is), because they run on the fault path. This
is the same code for tests and tools: no region, no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from userswap.native import ffi, lib


def names() -> list[str]:
    """The policies that exist; the first is the default."""
    found: list[str] = []
    while (name := lib.us_prefetch_name(len(found))) != ffi.NULL:
        found.append(ffi.string(name).decode())
    return found


class Prefetcher:
    """One policy with a state of its own. Pages come back nearest first, not yet clipped."""

    def __init__(self, name: str) -> None:
        """Raises KeyError when there is no policy of that name."""
        self._policy = lib.us_prefetch_find(name.encode())
        if self._policy == ffi.NULL:
            raise KeyError(name)
        self._state = ffi.gc(lib.us_prefetch_new(self._policy), lib.us_prefetch_free)

    def fault(self, page: int) -> list[int]:
        """A demand fault on `page`: the pages to read ahead."""
        return self._pages(page, lib.us_prefetch_fault(self._policy, self._state, page))

    def used(self, page: int) -> None:
        """A page that was read ahead is seen to be used. Need not be told: most are not seen."""
        lib.us_prefetch_used(self._policy, self._state, page)

    def phase(self, name: int) -> list[int]:
        """A part of the program begins, which may have run before: the pages to read ahead."""
        hint = lib.us_prefetch_hint(self._policy, self._state, lib.US_HINT_PHASE, name, 0)
        return self._pages(0, hint)

    def _pages(self, page: int, ahead: Any) -> list[int]:
        first = page + ahead.stride
        pages = list(range(first, first + ahead.stride * ahead.count, ahead.stride or 1))
        if ahead.runs:
            runs = lib.us_prefetch_runs(self._policy, self._state)
            for run in runs[0 : ahead.runs]:
                pages += range(run.first, run.first + run.count)
        return pages


class Replayer(Prefetcher):
    """`replay`, with what it recorded: to be kept beyond the process that it was recorded in."""

    def __init__(self) -> None:
        super().__init__("replay")

    def recorded(self, phase: int) -> list[int]:
        """The pages of a phase. If it is being recorded, that ends, and its replay begins."""
        count = lib.us_replay_recorded(self._state, phase, ffi.NULL, 0)
        pages = ffi.new("uint32_t[]", count)
        lib.us_replay_recorded(self._state, phase, pages, count)
        return list(pages)

    def give(self, phase: int, pages: Sequence[int]) -> None:
        """As if they had been recorded; if the phase is under way, its replay begins."""
        lib.us_replay_give(self._state, phase, list(pages), len(pages))
