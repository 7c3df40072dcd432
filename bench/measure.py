"""Measures one case: userswap and its rival in turns, at the same total memory, until every
repetition is valid.

The total is what a first run of userswap's side weighed, all in: its resident budget, its pool
and tables, the hardware's tables, what the pager took for itself. The kernel's limit is then
moved until its total is the same. A run that weighed more than 1 % over the total is void, a run
of the kernel's side that weighed more than 1 % less, too (the comparison would be unfair to it);
both are repeated, and so is a run that the OOM killer ended. All of them are reported. A run is
weighed from its first page to the end of its measured step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from userswap.bench.baseline import Rig
from userswap.bench.cases import Case, Step
from userswap.bench.histogram import Histogram
from userswap.bench.sample import PAGE
from userswap.bench.session import OutOfMemoryError, Session, ToucherError, vmstat
from userswap.engine import machine

MIB = 1 << 20
LAPS = 3
"""Accesses measured, over the pages there are."""
ROOM_FOR_ALL = 256 * MIB
TOLERANCE = 0.01
GRAIN = MIB
"""The kernel charges a group in steps of 256 KiB per CPU: less than this is not a difference."""
ATTEMPTS = 10
"""Void runs in a row before the comparison is given up. The OOM killer strikes some of the kernel's
runs at limits that others live with."""
SHARE_GUESS = 0.45
"""Compressed size over size, until the first run has shown it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose, and the CPUs that the benchmark may use."""

    size: int
    resident: int
    repetitions: int
    data: str
    sides: tuple[str, ...]
    cpus: tuple[int, ...]

    def pages(self, case: Case) -> int:
        return case.pages or self.size // PAGE

    def accesses(self, case: Case) -> int:
        return case.touches or LAPS * self.pages(case)

    def budget(self, case: Case) -> int:
        """The resident budget of userswap's side; against the bare loop, which has none, it has
        room for everything that is touched."""
        return self.resident if case.rival == "kernel" else ROOM_FOR_ALL

    def contenders(self, case: Case) -> list[str]:
        return [side for side in ("userswap", case.rival) if side in self.sides]


@dataclass(slots=True)
class Run:
    """One run of one side, as it goes into the JSON."""

    side: str
    limit_bytes: int
    valid: bool = False
    reason: str = ""
    """Why it is void; empty where it is valid."""
    peak_bytes: int = 0
    stored_bytes: int = 0
    compressed_bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    others_cpu_seconds: float = 0.0
    """What everybody else on the machine used meanwhile."""
    accesses: int = 0
    bad: int = 0
    swapped_out_pages: int = 0
    swapped_bytes: int = 0
    swap_free_change: int = 0
    steps: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    weights: list[tuple[float, int, int]] = field(default_factory=list)
    latencies: Histogram = field(default_factory=Histogram)

    @property
    def microseconds(self) -> float:
        """Time per access."""
        return self.seconds / self.accesses * 1e6 if self.accesses else 0.0


@dataclass(slots=True)
class Budget:
    """The total of a case, and the limit that gives the kernel's side this total."""

    total: int | None
    limit: int
    share: float = SHARE_GUESS

    def learn(self, run: Run) -> None:
        """After a run of the kernel's side: move the limit so that the next one has the total."""
        if run.stored_bytes:
            self.share = run.compressed_bytes / run.stored_bytes
        if self.total is not None and run.peak_bytes:
            # A byte more of limit is a byte less in zram, where it took `share` bytes.
            self.limit += int((self.total - run.peak_bytes) / (1 - min(self.share, 0.9)))

    def verdict(self, run: Run) -> str:
        """Why a run is void; empty where it is valid."""
        if self.total is None:
            return ""
        excess = run.peak_bytes - self.total
        tolerated = max(TOLERANCE * self.total, GRAIN)
        if excess > tolerated:
            return f"{excess / self.total:.1%} over its budget"
        if run.side == "kernel" and excess < -tolerated:
            return f"{-excess / self.total:.1%} under the budget"
        return ""


class CaseMeasurement:
    """The runs of one case."""

    def __init__(self, case: Case, options: Options, rig: Rig) -> None:
        self.case = case
        self.options = options
        self.rig = rig
        self.calibration: list[Run] = []
        self.runs: list[Run] = []
        self.budget = Budget(None, options.resident)

    def measure(self, progress: Callable[[str], None]) -> None:
        """Calibrate where a total has to be met, then the repetitions, the sides in turns."""
        sides = self.options.contenders(self.case)
        if self.case.rival == "kernel" and "userswap" in sides:
            first = self._run_once("userswap")
            self.calibration.append(first)
            self._set_total(first)
        if "kernel" in sides:
            self._run_valid("kernel", self.calibration, progress)
        for repetition in range(self.options.repetitions):
            for side in sides:
                run = self._run_valid(side, self.runs, progress)
                progress(
                    f"{self.case.title}, {repetition + 1} of {self.options.repetitions}, {side}: "
                    f"{run.microseconds:.2f} us per access, {run.cpu_seconds:.2f} s of CPU, "
                    f"{run.peak_bytes / MIB:.1f} MiB in all"
                )

    def _set_total(self, run: Run) -> None:
        """The total is what userswap's first run weighed at its heaviest."""
        share = run.compressed_bytes / run.stored_bytes if run.stored_bytes else SHARE_GUESS
        limit = (run.peak_bytes - share * self.options.size) / (1 - min(share, 0.9))
        self.budget = Budget(run.peak_bytes, int(limit), share)

    def _run_valid(self, side: str, runs: list[Run], progress: Callable[[str], None]) -> Run:
        for _ in range(ATTEMPTS):
            run = self._run_once(side)
            runs.append(run)
            if side == "kernel":
                self.budget.learn(run)
            if run.valid:
                return run
            progress(f"{self.case.title}, {side}: void, {run.reason}; again")
        raise ToucherError(f"{ATTEMPTS} runs of {side} in a row were void: {run.reason}")

    def _run_once(self, side: str) -> Run:
        limit = self.budget.limit if side == "kernel" else self.options.budget(self.case)
        run = Run(side, limit)
        self.rig.read_ahead(self.case.page_cluster)
        self.rig.group.limit(limit if side == "kernel" else None)
        out_before, free_before = vmstat("pswpout"), swap_free()
        try:
            self._touch(run)
        except OutOfMemoryError as error:
            run.reason = str(error)
        run.swapped_out_pages = vmstat("pswpout") - out_before
        run.swap_free_change = swap_free() - free_before
        run.reason = run.reason or self.budget.verdict(run)
        run.valid = not run.reason
        return run

    def _touch(self, run: Run) -> None:
        steps = steps_of(self.case, self.options, run.side)
        cpus = home_of(self.case, self.options.cpus)
        with Session(self.rig.group, lambda: self.rig.stored()[1], cpus) as session:
            session.open(plan_of(self.case, self.options, run.side))
            for step in steps:
                if step.operation == "evict":
                    session.ask("evict")
                    continue
                result = session.step(step.name)
                run.bad += result["bad"]
                run.steps[step.name] = result
                if step.name == self.case.measured:
                    self._take(run, result)
                    self._weigh(run, session)
            session.ask("close")

    def _take(self, run: Run, result: dict[str, Any]) -> None:
        run.seconds = result["elapsed_ns"] / 1e9
        run.cpu_seconds = result["cpu_seconds"]
        run.others_cpu_seconds = result["others_cpu_seconds"]
        run.accesses = result["accesses"]
        run.latencies = Histogram.from_pairs(result["latencies_ns"], result["highest_ns"])

    def _weigh(self, run: Run, session: Session) -> None:
        """The heaviest so far, and at the end of the measured step what is stored compressed."""
        run.peak_bytes = session.weights.peak
        run.weights = list(session.weights.samples)
        run.swapped_bytes = self.rig.group.swapped()
        run.stats = session.ask("stats")
        if run.side == "kernel":
            run.stored_bytes, run.compressed_bytes = self.rig.stored()
        elif run.side == "userswap":
            # A copy kept of a resident page is part of the resident budget already.
            pool = int(run.stats["pool_bytes"]) - int(run.stats["kept_bytes"])
            run.compressed_bytes = pool + int(run.stats["table_bytes"])
            run.stored_bytes = PAGE * int(run.stats["pages"]["STORED"])


def steps_of(case: Case, options: Options, side: str) -> list[Step]:
    return case.steps(side, options.pages(case), options.accesses(case))


def plan_of(case: Case, options: Options, side: str) -> dict[str, Any]:
    """What the touching process is told."""
    pages = options.pages(case)
    steps = [step for step in steps_of(case, options, side) if step.operation != "evict"]
    return {
        "side": side,
        "pages": pages,
        "resident": options.budget(case),
        "store": "ram:lz4",
        "data": options.data,
        "stored": case.operation != "zero",
        "versions": case.operation in ("update", "write"),
        "cpus": touching_cpus(case, options.cpus),
        "pager_cpus": options.cpus[:1] if case.placement == "one" else options.cpus,
        "steps": [asdict(step) for step in steps],
    }


def home_of(case: Case, cpus: tuple[int, ...]) -> tuple[int, ...]:
    """Where all threads of the touching process may run."""
    return cpus[:1] if case.placement in ("pinned", "one") else cpus


def touching_cpus(case: Case, cpus: tuple[int, ...]) -> list[int]:
    """The CPU of each touching thread; -1 leaves it to the scheduler."""
    if case.placement == "free":
        return [-1] * case.threads
    return [cpus[thread % len(cpus)] for thread in range(case.threads)]


def swap_free() -> int:
    """Bytes of free swap on the machine."""
    return machine.memory().swap_free
