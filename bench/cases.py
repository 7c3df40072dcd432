"""The cases of `userswap bench kernel`: what is touched, how, from which CPUs, against which
rival, with which goal.

Data only. A goal is the highest ratio of userswap's time to its rival's that is still good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from userswap.bench.order import Pattern

Placement = Literal["pinned", "two", "one", "free"]
"""`pinned`: the toucher on one CPU, the pager wherever it places itself. `two`: two touchers on
two CPUs. `one`: every process on one CPU. `free`: all left to the scheduler."""
Rival = Literal["kernel", "bare"]


@dataclass(frozen=True, slots=True)
class Step:
    """One run of the touching program over the memory; the operation `evict` is the pager's."""

    name: str
    operation: str
    pattern: Pattern
    count: int
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `operation` and `pattern` say what the measured step does."""

    name: str
    title: str
    operation: str
    pattern: Pattern
    placement: Placement = "pinned"
    threads: int = 1
    goal: float | None = None
    rival: Rival = "kernel"
    pages: int | None = None
    """Of the memory, where it is not the user's choice."""
    touches: int | None = None
    """Accesses measured, where it is not the user's choice."""

    @property
    def page_cluster(self) -> int:
        """The better choice of vm.page-cluster for the kernel's side of this case."""
        return 3 if self.pattern == "sequential" else 0

    @property
    def measured(self) -> str:
        """The name of the step that counts."""
        return "fill" if self.operation == "fill" else "run"

    def steps(self, side: str, pages: int, accesses: int) -> list[Step]:
        """What is done before the clock starts, what is measured, what is checked afterwards.

        Against the kernel: fill, touch until the pager is in its stride, measure, check every
        byte. Against the bare loop, which can only fault pages in: have all pages out, then
        touch each one once."""
        run = Step("run", self.operation, self.pattern, accesses, seed=3)
        fill = Step("fill", "fill", "sequential", pages)
        check = Step("check", "check", "sequential", pages)
        if self.rival == "kernel":
            if self.operation == "fill":
                return [fill, check]
            warm = Step("warm", self.operation, self.pattern, pages, seed=2)
            return [fill, warm, run, check]
        if self.operation == "zero":
            return [run]
        out = [fill, Step("evict", "evict", "sequential", 0)] if side == "userswap" else []
        return [*out, run, check]


AGAINST_KERNEL = (
    Case("random-read", "random read", "read", "random", goal=0.55),
    Case("random-update", "random read and write", "update", "random", goal=0.58),
    Case("sequential-read", "sequential read", "read", "sequential", goal=0.4),
    Case("sequential-write", "sequential write", "write", "sequential", goal=0.42),
    Case("zipf-read", "zipf read", "read", "zipf"),
    Case("zipf-update", "zipf read and write", "update", "zipf"),
    Case("fill", "first fill", "fill", "sequential", goal=0.9),
    Case("two-threads", "random read, 2 threads", "read", "random", "two", threads=2, goal=1.0),
    Case("one-cpu", "random read, all on one CPU", "read", "random", "one", goal=0.77),
    Case("unpinned", "random read, unpinned", "read", "random", "free"),
)

SMALL = 32768
"""Pages of the cases against the bare loop: 128 MiB."""

AGAINST_BARE = (
    Case("fault", "fault on a stored page", "read", "once", "pinned", 1, 1.1, "bare", SMALL, SMALL),
    Case(
        "zero-fault", "fault on a new page", "zero", "once", "pinned", 1, 1.1, "bare", SMALL, SMALL
    ),
    Case(
        "sixteen-threads",
        "faults of 16 threads",
        "read",
        "once",
        "free",
        16,
        1 / 0.85,
        "bare",
        SMALL,
        SMALL,
    ),
    Case(
        "terabyte",
        "scattered over 1 TiB",
        "zero",
        "scattered",
        "pinned",
        1,
        1.15,
        "bare",
        1 << 28,
        SMALL,
    ),
)

CASES = AGAINST_KERNEL + AGAINST_BARE


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
