"""The result of `userswap bench kernel`: one object, as a table for people and as JSON.

Must not know: how anything was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from userswap.bench import goals
from userswap.bench.cases import Case
from userswap.bench.goals import Goal, Summary
from userswap.bench.idle import Idle
from userswap.bench.measure import MIB, Options, Run
from userswap.engine.machine import Machine

SCHEMA = "userswap.bench.kernel/1"
NOISE = 0.05
"""A disturbance above this makes times doubtful."""
HEADINGS = (
    "case",
    "side",
    "us",
    "least",
    "ratio",
    "p50",
    "p99",
    "p99.9",
    "CPU s",
    "MiB",
    "runs",
    "void",
)


@dataclass(slots=True)
class CaseResult:
    case: Case
    cpus: list[int]
    """Of the touching threads; -1 where the scheduler chose."""
    calibration: list[Run] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    error: str = ""
    """Why the case could not be measured to its end."""

    def summary(self, side: str) -> Summary | None:
        return goals.summarize(self.runs, side)

    @property
    def everything(self) -> list[Run]:
        return self.calibration + self.runs

    @property
    def goals(self) -> list[Goal]:
        ours, rival = self.summary("userswap"), self.summary(self.case.rival)
        return goals.of_case(self.case, ours, rival) if ours and rival else []


@dataclass(slots=True)
class Result:
    machine: Machine
    kernel: str
    governor: str
    clock_ns: float
    """Cost of the reading of the clock that every access includes."""
    zram: str
    options: Options
    cases: list[CaseResult] = field(default_factory=list)
    idle: Idle | None = None
    idle_error: str = ""

    @property
    def problems(self) -> list[str]:
        """Why the result is not to be trusted; empty where it is."""
        found = [f"{each.case.name}: {each.error}" for each in self.cases if each.error]
        if self.idle_error:
            found.append(f"idle: {self.idle_error}")
        for each in self.cases:
            bad = sum(run.bad for run in each.everything)
            if bad:
                found.append(f"{each.case.name}: {bad} pages did not hold what was written")
            swapped = sum(run.swapped_bytes for run in each.everything if run.side != "kernel")
            if swapped:
                found.append(f"{each.case.name}: {swapped} bytes of userswap's were swapped")
        return found

    @property
    def goals(self) -> list[Goal]:
        reached = [goal for each in self.cases for goal in each.goals]
        return [*reached, *(goals.of_idle(self.idle) if self.idle else [])]

    @property
    def disturbance(self) -> float:
        """Share of the CPUs' time that others took while runs were measured."""
        runs = [run for each in self.cases for run in each.runs if run.valid]
        taken = sum(run.others_cpu_seconds for run in runs)
        return taken / max(sum(run.seconds for run in runs) * self.machine.cpus_online, 1e-9)

    @property
    def pages_verified(self) -> int:
        runs = [run for each in self.cases for run in each.everything]
        return sum(step["accesses"] for run in runs for step in run.steps.values())


def as_json(result: Result) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "good": not result.problems,
        "problems": result.problems,
        "machine": {
            **asdict(result.machine),
            "kernel": result.kernel,
            "governor": result.governor,
            "clock_ns": result.clock_ns,
            "zram": result.zram,
        },
        "options": asdict(result.options),
        "disturbance": result.disturbance,
        "cases": [_case_json(each) for each in result.cases],
        "idle": asdict(result.idle) if result.idle else None,
        "goals": [{**asdict(goal), "reached": goal.reached} for goal in result.goals],
    }


def _case_json(each: CaseResult) -> dict[str, Any]:
    sides = ("userswap", each.case.rival)
    summaries = {side: each.summary(side) for side in sides}
    return {
        **asdict(each.case),
        "cpus": each.cpus,
        "error": each.error,
        "summary": {side: asdict(found) for side, found in summaries.items() if found},
        "calibration": [_run_json(run) for run in each.calibration],
        "runs": [_run_json(run) for run in each.runs],
    }


def _run_json(run: Run) -> dict[str, Any]:
    fields = asdict(run)
    del fields["latencies"]  # they are in the measured step, too
    return {**fields, "microseconds": run.microseconds}


def as_text(result: Result) -> str:
    rows = [row for each in result.cases for row in _rows(each)]
    parts = [_heading(result), _table([HEADINGS, *rows])] if rows else [_heading(result)]
    if result.goals:
        lines = [("goal", "at most", "reached", ""), *map(_goal_row, result.goals)]
        parts.append(_table(lines))
    return "\n\n".join([*parts, "\n".join(_verdict(result))])


def _heading(result: Result) -> str:
    options = result.options
    cpus = ", ".join(map(str, options.cpus))
    return (
        f"{options.size / MIB:.0f} MiB of memory, {options.resident / MIB:.0f} MiB resident, "
        f"data: {options.data}; kernel swap: {result.zram} (lz4), {_fairness(result)}\n"
        f"{result.machine.cpu_model}, Linux {result.kernel}, governor {result.governor}; "
        f"CPUs {cpus}; pinned cases touch from CPU {options.cpus[0]}\n"
        f"us: time per access, median and least of the runs, {result.clock_ns:.0f} ns of it for "
        f"the clock; p50, p99, p99.9: single accesses in us; CPU s: all processes\n"
        f"others took {result.disturbance:.0%} of the CPUs meanwhile{_warning(result)}"
    )


def _verdict(result: Result) -> list[str]:
    runs = [run for each in result.cases for run in each.everything]
    lines = [f"problem: {problem}" for problem in result.problems]
    void = Counter(f"{run.side}: {run.reason}" for run in runs if run.reason)
    lines += [f"void: {count} of {reason}" for reason, count in sorted(void.items())]
    ours = [run for run in runs if run.side == "userswap"]
    if ours:
        in_swap = max(run.swapped_bytes for run in ours)
        written = sum(run.swapped_out_pages for run in ours)
        locked = "locked" if all(run.stats.get("pool_locked") for run in ours) else "not locked"
        lines.append(
            f"userswap's own memory: {in_swap} bytes in kernel swap, {written} pages swapped out "
            f"machine-wide during its runs, pool {locked}"
        )
    if not result.problems:
        lines.append(f"verified: {result.pages_verified} accesses, 0 bad pages")
    return lines


def _fairness(result: Result) -> str:
    fair = "userswap" in result.options.sides
    return "at the same total memory" if fair else "its limit is the resident size"


def _warning(result: Result) -> str:
    return ": measure again when the machine is quiet" if result.disturbance > NOISE else ""


def _rows(each: CaseResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    rival = each.summary(each.case.rival)
    for side in (each.case.rival, "userswap"):
        found = each.summary(side)
        if found is None:
            continue
        ratio = found.microseconds / rival.microseconds if rival and side == "userswap" else None
        rows.append(
            (
                each.case.title if not rows else "",
                side,
                f"{found.microseconds:.2f}",
                f"{found.microseconds_lowest:.2f}",
                f"{ratio:.2f}" if ratio is not None else "",
                *(f"{ns / 1000:.1f}" for ns in (found.p50_ns, found.p99_ns, found.p999_ns)),
                f"{found.cpu_seconds:.2f}",
                f"{found.peak_bytes / MIB:.1f}",
                str(found.runs),
                str(found.void),
            )
        )
    return rows


def _goal_row(goal: Goal) -> tuple[str, str, str, str]:
    unit = f" {goal.unit}" if goal.unit else ""
    verdict = "yes" if goal.reached else "NO"
    return goal.name, f"{goal.limit:.4g}{unit}", f"{goal.value:.3f}{unit}", verdict


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; those that hold figures below their heading to the right."""
    lines = [""] * len(rows)
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        figures = any(cell[:1].isdigit() for cell in column[1:])
        for number, cell in enumerate(column):
            lines[number] += (cell.rjust(width) if figures else cell.ljust(width)) + "  "
    return "\n".join(line.rstrip() for line in lines)
