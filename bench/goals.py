"""What is to be reached, and what was: pure arithmetic on the runs of a benchmark.

Everything compared is the median of the valid runs of a side; a percentile is the median of the
runs' percentiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from userswap.bench.cases import Case
from userswap.bench.idle import Idle
from userswap.bench.measure import MIB, Run

CPU_GOAL = 1.3
TAIL_GOAL = 1.0
TAIL_CASE = "random-read"
COMPRESSED_GOAL = 1.02
COMPRESSED_CASE = "random-update"
IDLE_CPU_GOAL = 0.001
IDLE_RSS_GOAL = 50.0 * MIB
TABLE_GOAL = 24.0
FRAGMENTATION_GOAL = 0.05


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians of the valid runs of one side of a case; nanoseconds and bytes."""

    runs: int
    void: int
    microseconds: float
    microseconds_lowest: float
    microseconds_highest: float
    p50_ns: float
    p99_ns: float
    p999_ns: float
    cpu_seconds: float
    peak_bytes: float
    compressed_per_page: float
    """Bytes that a stored page takes, all in; 0 where nothing was stored."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure and the highest value of it that is good."""

    name: str
    value: float
    limit: float
    unit: str = ""

    @property
    def reached(self) -> bool:
        return self.value <= self.limit


def summarize(runs: Iterable[Run], side: str) -> Summary | None:
    """None where the side has no valid run."""
    own = [run for run in runs if run.side == side]
    valid = [run for run in own if run.valid]
    if not valid:
        return None

    def median(figure: Callable[[Run], float]) -> float:
        return statistics.median(map(figure, valid))

    return Summary(
        runs=len(valid),
        void=len(own) - len(valid),
        microseconds=median(lambda run: run.microseconds),
        microseconds_lowest=min(run.microseconds for run in valid),
        microseconds_highest=max(run.microseconds for run in valid),
        p50_ns=median(lambda run: run.latencies.percentile(0.5)),
        p99_ns=median(lambda run: run.latencies.percentile(0.99)),
        p999_ns=median(lambda run: run.latencies.percentile(0.999)),
        cpu_seconds=median(lambda run: run.cpu_seconds),
        peak_bytes=median(lambda run: run.peak_bytes),
        compressed_per_page=median(
            lambda run: 4096 * run.compressed_bytes / run.stored_bytes if run.stored_bytes else 0
        ),
    )


def of_case(case: Case, ours: Summary, rival: Summary) -> list[Goal]:
    """The goals that this case decides."""
    goals = []
    if case.goal is not None:
        goals.append(Goal(f"{case.name}: time", ours.microseconds / rival.microseconds, case.goal))
    if case.rival == "kernel":
        cpu = ours.cpu_seconds / rival.cpu_seconds
        goals.append(Goal(f"{case.name}: CPU of all processes", cpu, CPU_GOAL))
    if case.name == TAIL_CASE:
        p99, p999 = ours.p99_ns / rival.p99_ns, ours.p999_ns / rival.p999_ns
        goals.append(Goal(f"{case.name}: p99", p99, TAIL_GOAL))
        goals.append(Goal(f"{case.name}: p99.9", p999, TAIL_GOAL))
    if case.name == COMPRESSED_CASE and rival.compressed_per_page:
        share = ours.compressed_per_page / rival.compressed_per_page
        goals.append(Goal(f"{case.name}: compressed size, all in", share, COMPRESSED_GOAL))
    return goals


def of_idle(idle: Idle) -> list[Goal]:
    rss = idle.pager_rss_bytes / MIB
    return [
        Goal("idle pager: CPU", idle.pager_cpu_share * 100, IDLE_CPU_GOAL * 100, "%"),
        Goal("pager's memory beside its pool", rss, IDLE_RSS_GOAL / MIB, "MiB"),
        Goal("tables per page", idle.table_bytes_per_page, TABLE_GOAL, "bytes"),
        Goal("pool fragmentation", idle.pool_fragmentation * 100, FRAGMENTATION_GOAL * 100, "%"),
    ]
