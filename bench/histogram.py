"""Latency histograms of native/touch.c: log buckets of 1/32 octave, so a percentile is right to
about 3 %.

Kept and written to JSON as sparse pairs (lowest nanoseconds of the bucket, count): the raw
samples of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from userswap.native import lib


@dataclass(slots=True)
class Histogram:
    counts: dict[int, int] = field(default_factory=dict)
    """Count per bucket floor, in ascending order of the floor."""
    highest: int = 0
    """The longest single latency, exactly."""

    @classmethod
    def from_buckets(cls, buckets: Sequence[int], highest: int) -> Histogram:
        floors = {lib.us_touch_bucket_floor(i): count for i, count in enumerate(buckets) if count}
        return cls(floors, highest)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]], highest: int) -> Histogram:
        return cls(dict(pairs), highest)

    def to_pairs(self) -> list[tuple[int, int]]:
        return list(self.counts.items())

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def percentile(self, share: float) -> int:
        """Nanoseconds that `share` (0 to 1) of the latencies do not exceed by more than a
        bucket."""
        wanted = share * self.total
        seen = 0
        for floor, count in self.counts.items():
            seen += count
            if seen >= wanted:
                return floor
        return self.highest
