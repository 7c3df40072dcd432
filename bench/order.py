"""In which order pages are touched: built before the clock starts, the same for every side of a
comparison.

Patterns: `sequential` round and round; `random` uniform; `zipf` with exponent 0.9, its hot pages
scattered over the range as in a heap; `once` every page once, in random order; `scattered`
distinct pages anywhere in the range.
"""

from __future__ import annotations

import random
from array import array
from itertools import accumulate
from typing import Literal, get_args

Pattern = Literal["sequential", "random", "zipf", "once", "scattered"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
ZIPF_EXPONENT = 0.9


def build(pattern: Pattern, pages: int, count: int, threads: int = 1, seed: int = 1) -> array[int]:
    """Page numbers for `count` accesses. Each thread has a slice of the pages and of the order to
    itself, so that threads that write never race, and a page has one version at a time."""
    order: array[int] = array("I")
    for thread in range(threads):
        first, last = pages * thread // threads, pages * (thread + 1) // threads
        share = count * (thread + 1) // threads - count * thread // threads
        order.extend(_slice(pattern, first, last - first, share, random.Random(seed + thread)))
    assert len(order) == count
    return order


def _slice(
    pattern: Pattern, first: int, pages: int, count: int, generator: random.Random
) -> array[int]:
    if pattern == "sequential":
        lap = array("I", range(first, first + pages))
        return (lap * (count // pages + 1))[:count]
    if pattern == "random":
        return array("I", (first + int(generator.random() * pages) for _ in range(count)))
    if pattern == "zipf":
        by_rank = list(range(first, first + pages))
        generator.shuffle(by_rank)
        weights = accumulate(rank**-ZIPF_EXPONENT for rank in range(1, pages + 1))
        return array("I", generator.choices(by_rank, cum_weights=list(weights), k=count))
    if pattern == "once" and count != pages:
        raise ValueError(f"once touches {pages} pages, not {count}")
    return array("I", generator.sample(range(first, first + pages), count))
