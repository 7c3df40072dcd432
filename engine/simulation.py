"""Simulations: what a trace of touches costs with a policy and a budget, by the C simulator.

Must not know: where touches come from, how results are shown.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from userswap.native import check, ffi, lib

FAULT_NS = 5000
"""A fault's own cost, beside the store's."""


LEAST = 64
"""Pages that a new one outlives, where there are as many: what was read ahead must live to be used,
and the pager sends pages out in batches of so many."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One simulation. `tail` is a share of 256; see native/simulate.h for the rest."""

    eviction: str
    prefetch: str
    capacity: int
    tail: int = 0
    least: int = LEAST
    stored: bool = True
    hits_seen: bool = False
    used_seen: bool = False
    store_ns: int = 0
    fault_ns: int = FAULT_NS
    touch_ns: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    touches: int
    misses: int
    zeros: int
    rescued: int
    ahead: int
    used: int
    late: int
    wasted: int
    stall_ns: int

    @property
    def miss_ratio(self) -> float:
        return self.misses / self.touches if self.touches else 0.0

    @property
    def accuracy(self) -> float | None:
        """The share of the pages read ahead that were touched; None where none was read."""
        return self.used / self.ahead if self.ahead else None


class Touches:
    """Page numbers in the order in which they were touched, and where phases began."""

    def __init__(
        self, pages: Sequence[int], phases: Sequence[tuple[int, int]] = (), bound: int | None = None
    ) -> None:
        """`phases`: (before which touch, its name); `bound`: above all page numbers."""
        self.array = (
            pages if isinstance(pages, array) and pages.typecode == "I" else array("I", pages)
        )
        assert self.array.itemsize == 4
        self.bound = bound if bound is not None else max(self.array, default=0) + 1
        self._buffer = ffi.from_buffer("uint32_t[]", self.array)
        self._phases = ffi.new("struct us_simulate_phase[]", [list(each) for each in phases])
        self.different = self._count()

    def __len__(self) -> int:
        return len(self.array)

    def _count(self) -> int:
        found: int = lib.us_simulate_next(self._buffer, len(self), self.bound, ffi.NULL)
        return check(found)

    def simulate(self, setting: Setting) -> Result:
        """Raises KeyError when a policy has no such name."""
        native = ffi.new("struct us_simulate_setting *")
        native.eviction = lib.us_eviction_find(setting.eviction.encode())
        native.prefetch = lib.us_prefetch_find(setting.prefetch.encode())
        if native.eviction == ffi.NULL:
            raise KeyError(setting.eviction)
        if native.prefetch == ffi.NULL:
            raise KeyError(setting.prefetch)
        native.evict.pages = self.bound
        native.evict.capacity = setting.capacity
        native.evict.tail = setting.tail
        native.evict.least = setting.least
        native.evict.hits_seen = setting.hits_seen
        native.evict.seed = 1
        native.stored = setting.stored
        native.used_seen = setting.used_seen
        native.store_ns = setting.store_ns
        native.fault_ns = setting.fault_ns
        native.touch_ns = setting.touch_ns
        out = ffi.new("struct us_simulate_result *")
        phases = self._phases
        check(lib.us_simulate(native, self._buffer, len(self), phases, len(phases), out))
        return Result(
            out.touches,
            out.misses,
            out.zeros,
            out.rescued,
            out.ahead,
            out.used,
            out.late,
            out.wasted,
            out.stall_ns,
        )

    def best(self, capacity: int) -> int:
        """The misses of Belady's optimum."""
        misses = ffi.new("uint64_t *")
        check(lib.us_simulate_best(self._buffer, len(self), self.bound, capacity, misses))
        return int(misses[0])
