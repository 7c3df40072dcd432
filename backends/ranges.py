"""Sets of page numbers, kept as sorted ranges that neither overlap nor touch.

Must not know: what the pages are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Ranges:
    """Starts and ends (exclusive) of the ranges, in two lists of one order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First page and number of pages of each range."""
        return ((start, end - start) for start, end in zip(self._starts, self._ends, strict=True))

    def add(self, first: int, count: int) -> None:
        end = first + count
        left = bisect_left(self._ends, first)
        right = bisect_right(self._starts, end)
        if left < right:
            first = min(first, self._starts[left])
            end = max(end, self._ends[right - 1])
        self._starts[left:right] = [first]
        self._ends[left:right] = [end]

    def remove(self, first: int, count: int) -> None:
        end = first + count
        left = bisect_right(self._ends, first)
        right = bisect_left(self._starts, end)
        if left >= right:
            return
        before, after = self._starts[left], self._ends[right - 1]
        kept = [(before, first)] * (before < first) + [(end, after)] * (end < after)
        self._starts[left:right] = [start for start, _ in kept]
        self._ends[left:right] = [stop for _, stop in kept]

    def covers(self, first: int, count: int) -> bool:
        """Whether all of these pages are in the set."""
        at = bisect_right(self._starts, first) - 1
        return at >= 0 and first + count <= self._ends[at]

    def find(self, count: int) -> int | None:
        """The lowest page from which so many adjacent ones are in the set."""
        for start, end in zip(self._starts, self._ends, strict=True):
            if end - start >= count:
                return start
        return None
