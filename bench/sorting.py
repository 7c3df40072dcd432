"""Sorting an array step by step, and telling whether the result has all the numbers in order.

Steps, because one long call into numpy shows no progress and does not hear Ctrl-C. numpy is passed
in: it is an extra that need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PIECES = 32
VALUES = 1 << 24
"""Values below this leave most bytes of each number zero, as numbers in programs do."""


@dataclass(slots=True)
class Fingerprint:
    """The same for the same numbers in any order."""

    total: int = 0
    parity: int = 0

    def add(self, numpy: Any, numbers: Any) -> None:
        self.total += int(numbers.sum())
        self.parity ^= int(numpy.bitwise_xor.reduce(numbers))


def _pieces(count: int) -> list[tuple[int, int]]:
    step = -(-count // PIECES)
    return [(low, min(low + step, count)) for low in range(0, count, step)]


def write(numpy: Any, array: Any, seed: int, advance: Callable[[int], None]) -> Fingerprint:
    """Random numbers; their fingerprint is taken before they go into the array."""
    generator = numpy.random.default_rng(seed)
    found = Fingerprint()
    for low, high in _pieces(len(array)):
        numbers = generator.integers(0, VALUES, high - low, numpy.uint64)
        found.add(numpy, numbers)
        array[low:high] = numbers
        advance(numbers.nbytes)
    return found


def sort(array: Any, advance: Callable[[int], None]) -> None:
    """Quicksort, its upper levels taken one by one."""
    grain = -(-len(array) // PIECES)
    stack = [(0, len(array))]
    while stack:
        low, high = stack.pop()
        if high - low <= grain:
            array[low:high].sort()
            advance(array[low:high].nbytes)
        else:
            middle = (low + high) // 2
            array[low:high].partition(middle - low)
            stack += [(middle, high), (low, middle)]


def in_order(numpy: Any, array: Any, advance: Callable[[int], None]) -> Fingerprint | None:
    """The fingerprint of what is in the array, or None when it is not in order."""
    found = Fingerprint()
    last = 0
    for low, high in _pieces(len(array)):
        numbers = array[low:high].copy()
        if int(numbers[0]) < last or not (numbers[:-1] <= numbers[1:]).all():
            return None
        last = int(numbers[-1])
        found.add(numpy, numbers)
        advance(numbers.nbytes)
    return found
