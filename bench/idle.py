"""What the pager costs where nothing is measured in time: its memory, and its CPU while nobody
faults.

The region is filled and then written all over at random, so that the pool has seen every kind of
change before its fragmentation is taken.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from userswap.bench.baseline import Rig
from userswap.bench.cases import named
from userswap.bench.measure import Options, home_of, plan_of
from userswap.bench.sample import PAGE
from userswap.bench.session import Session, cpu_seconds

REST_SECONDS = 10.0
CASE = "random-update"


@dataclass(frozen=True, slots=True)
class Idle:
    """Figures of one region after its work, and of its pager at rest."""

    seconds: float
    pager_cpu_seconds: float
    pager_rss_bytes: int
    """Beside pool and tables."""
    table_bytes_per_page: float
    pool_fragmentation: float
    """Share of the pool's memory that is not compressed data."""
    pool_locked: bool
    stats: dict[str, Any]

    @property
    def pager_cpu_share(self) -> float:
        """Of one CPU."""
        return self.pager_cpu_seconds / self.seconds


def measure(rig: Rig, options: Options) -> Idle:
    case = named(CASE)
    rig.group.limit(None)
    with Session(rig.group, lambda: 0, home_of(case, options.cpus)) as session:
        session.open(plan_of(case, options, "userswap"))
        session.step("fill")
        session.step("warm")
        stats = session.ask("stats")
        pager = int(stats["pager_pid"])
        cpu, began = cpu_seconds(pager), time.monotonic()
        time.sleep(REST_SECONDS)
        used, seconds = cpu_seconds(pager) - cpu, time.monotonic() - began
        session.ask("close")
    pool = int(stats["pool_bytes"])
    return Idle(
        seconds=seconds,
        pager_cpu_seconds=used,
        pager_rss_bytes=int(stats["pager_rss_bytes"]),
        table_bytes_per_page=int(stats["table_bytes"]) / (options.size // PAGE),
        pool_fragmentation=1 - int(stats["pool_payload_bytes"]) / pool if pool else 0.0,
        pool_locked=bool(stats["pool_locked"]),
        stats=stats,
    )
