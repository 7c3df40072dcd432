"""What a region tells of itself.

Must not know: where the numbers come from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Latency:
    """Service times in microseconds, from the read of the fault's message to its answer.

    What the faulting thread waits is longer by the kernel's way to the pager and back.
    """

    count: int
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class RegionStats:
    """A snapshot of a region. Sizes in bytes, page counts in pages of 4096 bytes."""

    name: str
    store: str
    size: int
    resident_limit: int
    resident_bytes: int
    """In the client's memory, the pages on their way out included."""
    staging_bytes: int
    """Of these, moved out or being dropped."""
    kept_bytes: int
    """Compressed copies kept of clean resident pages; they count in the budget."""
    pages: dict[str, int]
    """Pages per state of the page table."""
    faults: dict[str, int]
    """By what became of them: zero, load, awaited, rescue, protect, spurious, forgotten, parked."""
    faults_native: int
    faults_awaited: int
    readahead_pages: int
    evicted_pages: int
    """Moved out through staging."""
    dropped_pages: int
    """Dropped in place: clean, discarded, or by the mover protect."""
    refused_pages: int
    """Could not be taken: pinned, mlocked, or the agent was late."""
    put_back_pages: int
    """Came back because the store was full."""
    over_budget_pages: int
    """Installed above the budget, since no fault may wait for a full store or a late agent."""
    lost_pages: int
    vanished_pages: int
    store_full: bool
    agent_late: bool
    native_latency: Latency
    awaited_latency: Latency
    pool_bytes: int
    """Memory that the compressed pool holds, for all regions that share it; 0 without a pool."""
    pool_payload_bytes: int
    pool_object_bytes: int
    pool_pages: int
    """Pages that take memory in the pool, for all regions that share it."""
    pool_same_filled: int
    """Pages that take none: one pattern over and over."""
    pool_locked: bool
    table_bytes: int
    """Memory that the client's page table holds, for all its regions."""
    pager_pid: int
    pager_cpu_seconds: float
    pager_rss_bytes: int
    """The pager's own memory, its pool and tables left out."""
    fault_path: str
    mover: str
    """How written pages leave: move or protect."""
    held_by: str
    """Why the mover protect takes no written page at the moment; "" when it does."""
    cpu: int
    """The CPU the fault server was last placed on, -1 before that."""
    released: bool = False
    """The pager has let go of the region, and these are its last numbers: the memory is ordinary
    memory now, resident for all the pager knows."""

    @property
    def ratio(self) -> float | None:
        """Bytes of the pages in the pool over the bytes they take there.

        None while there are none, and where the store is not a `ram:` that the fault server serves:
        other stores do not tell a region what its pages take (`userswap store bench` measures it).
        """
        stored = (self.pool_pages + self.pool_same_filled) * 4096
        return stored / self.pool_object_bytes if self.pool_object_bytes else None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> RegionStats:
        """From a pager's answer."""
        values = dict(message)
        for key in ("native_latency", "awaited_latency"):
            values[key] = Latency(**values[key])
        return cls(**values)
