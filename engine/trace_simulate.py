"""`userswap trace simulate`: which policy a trace asks for, and how much memory.

Every policy and budget against the optimum; predicted stall time; and advice. Budgets of which the
trace cannot tell are refused: what a page that was resident during the recording was spared of is
not in it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from userswap.backends.grammar import (
    GrammarError,
    format_size,
    parse_duration,
    parse_size,
    unknown_name,
)
from userswap.engine.errors import ConfigError
from userswap.engine.policies import eviction, prefetch
from userswap.engine.simulation import FAULT_NS, LEAST, Result, Setting, Touches
from userswap.engine.traces import Outcome, Trace, read

SCHEMA = "userswap.trace.simulate/1"
PAGE = 4096
STEP = 10
RANGE_STEPS = 8
ALL = "all"
DEAR = 0.05
"""A share of the running time that is worth saving memory no further."""

EPILOG = """\
examples:
  userswap trace simulate run.trace
  userswap trace simulate run.trace --eviction s3g,fifo --prefetch all --resident 25%,512MiB
  userswap trace simulate run.trace --resident 10%..50% --store-latency 1ms --run-time 12s --json

Budgets are shares of the pages that the trace touches, or sizes. The optimum (Belady's) knows the
future and reads nothing ahead. A trace that was recorded with R resident tells nothing of less than
R; one that saw every touch tells of everything. The stall is what the program waits: for the store,
and 5 us for each fault; the run time is the trace's own, less its faults, unless it is given.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Simulate every policy and budget on a trace, and say which is right."
    parser.epilog = EPILOG
    parser.add_argument("trace", metavar="TRACE", help="such as `trace import` makes")
    parser.add_argument(
        "--eviction", default=ALL, metavar="NAMES", help=f"{', '.join(eviction.names())} or all"
    )
    parser.add_argument(
        "--prefetch",
        default="none,streams",
        metavar="NAMES",
        help=f"{', '.join(prefetch.names())} or all (none,streams)",
    )
    parser.add_argument(
        "--resident", default="10%..90%", metavar="BUDGETS", help="a range or a list (10%%..90%%)"
    )
    parser.add_argument("--store-latency", default="80us", metavar="TIME", help="of a read (80us)")
    parser.add_argument("--tail", default="0%", metavar="SHARE", help="staged, of what is resident")
    parser.add_argument("--run-time", metavar="TIME", help="of the program with all in memory")


@dataclass(frozen=True, slots=True)
class Row:
    """One simulation and what it says."""

    eviction: str
    prefetch: str
    capacity: int
    result: Result

    @property
    def stall_s(self) -> float:
        return self.result.stall_ns / 1e9


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was simulated of one trace."""

    touches: int
    different: int
    run_s: float | None
    budgets: list[int]
    refused: dict[str, str]
    """Budgets, as they were asked for, and why they cannot be told of."""
    optimum: dict[int, int]
    rows: list[Row]


def run(arguments: argparse.Namespace) -> int:
    trace = read(arguments.trace)
    findings = simulate(
        trace,
        evictions=_names("eviction policy", arguments.eviction, eviction.names()),
        prefetches=_names("prefetch policy", arguments.prefetch, prefetch.names()),
        resident=arguments.resident,
        store_ns=_nanoseconds(arguments.store_latency),
        tail=_share(arguments.tail),
        run_s=None if arguments.run_time is None else _nanoseconds(arguments.run_time) / 1e9,
    )
    if arguments.json:
        print(json.dumps(as_document(arguments.trace, findings), indent=2))
    else:
        print(as_text(arguments.trace, findings))
    return 0


def _names(kind: str, asked: str, known: list[str]) -> list[str]:
    if asked == ALL:
        return known
    for name in asked.split(","):
        if name not in known:
            raise ConfigError(unknown_name(kind, name, known))
    return asked.split(",")


def _nanoseconds(text: str) -> int:
    return round(parse_duration(text) * 1e9)


def _share(text: str) -> int:
    share = parse_size(text, whole=eviction.WHOLE)
    if not 0 <= share <= eviction.WHOLE // 2:
        raise ConfigError(f"a tail of {text}: at most half of what is resident can be staged")
    return share


def simulate(
    trace: Trace,
    *,
    evictions: Sequence[str],
    prefetches: Sequence[str],
    resident: str,
    store_ns: int,
    tail: int = 0,
    run_s: float | None = None,
) -> Findings:
    pages, phases = trace.touches()
    if not pages:
        raise ConfigError("the trace has no touches")
    touches = Touches(pages, phases, bound=max(pages) + 1)
    budgets, refused = supported(budgets_of(resident, touches.different), touches.different, trace)
    # A recording that met no page of zeros began with pages that were in the store.
    stored = trace.head.stored or Outcome.ZERO not in trace.records.outcome
    plain = Setting("", "", 0, tail=tail, stored=stored, store_ns=store_ns)
    settings = [
        replace(plain, eviction=evict, prefetch=ahead, capacity=budget)
        for evict in evictions
        for ahead in prefetches
        for budget in budgets
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        optimum = threads.map(touches.best, budgets)
        results = threads.map(touches.simulate, settings)
        rows = [
            Row(setting.eviction, setting.prefetch, setting.capacity, result)
            for setting, result in zip(settings, results, strict=True)
        ]
        best = dict(zip(budgets, optimum, strict=True))
    if run_s is None:
        run_s = _own_time(trace)
    return Findings(len(pages), touches.different, run_s, budgets, refused, best, rows)


def _own_time(trace: Trace) -> float | None:
    """What the program took by itself while it was recorded, where that is known."""
    times = trace.records.time_ns
    own = times[-1] - times[0] - len(times) * FAULT_NS
    return own / 1e9 if own > 0 else None


# --- budgets ---


def budgets_of(text: str, different: int) -> dict[str, int]:
    """Pages for each budget asked for, by its name."""
    found: dict[str, int] = {}
    for part in text.split(","):
        low, dots, high = part.partition("..")
        if not dots:
            found[part] = parse_size(part, whole=different * PAGE) // PAGE
        elif low.endswith("%") and high.endswith("%"):
            percents = range(_percent(low), _percent(high) + 1, STEP)
            found |= {f"{each}%": different * each // 100 for each in percents}
        else:
            first, last = (parse_size(end, whole=different * PAGE) for end in (low, high))
            for step in range(RANGE_STEPS + 1):
                size = first + (last - first) * step // RANGE_STEPS
                found[format_size(size)] = size // PAGE
    if not found:
        raise ConfigError(f"{text}: the first budget of a range is its smallest")
    return found


def _percent(text: str) -> int:
    if not text[:-1].isdecimal():
        raise GrammarError(f"{text} is not a whole number of percent")
    return int(text[:-1])


def supported(
    asked: dict[str, int], different: int, trace: Trace
) -> tuple[list[int], dict[str, str]]:
    """The budgets of which the trace can tell, and why not of the others."""
    spared = 0 if trace.head.all_touches else trace.resident
    refused: dict[str, str] = {}
    budgets = set()
    for name, pages in asked.items():
        if pages < spared:
            refused[name] = (
                f"recorded with {format_size(spared * PAGE)} resident, which hides what less misses"
            )
        elif pages < 2 * LEAST:
            refused[name] = f"less than {format_size(2 * LEAST * PAGE)}, a region's minimum"
        elif pages >= different:
            refused[name] = f"all {format_size(different * PAGE)} that are touched fit"
        else:
            budgets.add(pages)
    if not budgets:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ConfigError(f"the trace tells of no budget asked for ({reasons})")
    return sorted(budgets), refused


# --- advice ---


def advice(findings: Findings) -> str:
    """The smallest budget that costs little, and with which policies."""
    cheapest = [
        min((row for row in findings.rows if row.capacity == budget), key=lambda row: row.stall_s)
        for budget in findings.budgets
    ]
    if findings.run_s:
        run_s = findings.run_s
        good = [row for row in cheapest if row.stall_s <= DEAR * run_s]
        row = good[0] if good else min(cheapest, key=lambda row: row.stall_s)
        cost = f"costs {100 * row.stall_s / run_s:.2g} %"
    else:
        # Without the program's own time: the budget beyond which more memory saves little.
        least = min(row.stall_s for row in cheapest)
        row = next(row for row in cheapest if row.stall_s <= (1 + DEAR) * least)
        cost = f"costs {_duration(row.stall_s)} of waiting"
    size = format_size(row.capacity * PAGE)
    return f"{size} resident {cost}, with {row.eviction} and prefetch {row.prefetch}"


# --- output ---


def as_document(name: str, findings: Findings) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "trace": name,
        "touches": findings.touches,
        "pages": findings.different,
        "run_seconds": findings.run_s,
        "refused": findings.refused,
        "optimum": [
            {"resident_bytes": budget * PAGE, "misses": misses}
            for budget, misses in findings.optimum.items()
        ],
        "results": [_as_entry(row) for row in findings.rows],
        "advice": advice(findings),
    }


def _as_entry(row: Row) -> dict[str, Any]:
    return {
        "eviction": row.eviction,
        "prefetch": row.prefetch,
        "resident_bytes": row.capacity * PAGE,
        "miss_ratio": row.result.miss_ratio,
        "accuracy": row.result.accuracy,
        **asdict(row.result),
    }


def as_text(name: str, findings: Findings) -> str:
    size = format_size(findings.different * PAGE)
    own = f", in {_duration(findings.run_s)} of its own" if findings.run_s else ""
    lines = [f"{name}: {findings.touches:,} touches of {findings.different:,} pages ({size}){own}"]
    lines += [f"not told: {budget}: {why}" for budget, why in findings.refused.items()]
    optimum = [f"{100 * misses / findings.touches:.2f}" for misses in findings.optimum.values()]
    for ahead in dict.fromkeys(row.prefetch for row in findings.rows):
        rows = [row for row in findings.rows if row.prefetch == ahead]
        misses = [["optimum", *optimum]] if ahead == "none" else []
        misses += _grid(rows, lambda row: f"{100 * row.result.miss_ratio:.2f}")
        lines += ["", f"Misses of 100 touches, prefetch {ahead}", *_table(findings, misses)]
        stalls = _grid(rows, lambda row: _duration(row.stall_s))
        lines += ["", f"Waiting, prefetch {ahead}", *_table(findings, stalls)]
        if ahead != "none":
            exact = _grid(rows, lambda row: _percentage(row.result.accuracy))
            lines += ["", f"Of 100 pages read ahead, used: {ahead}", *_table(findings, exact)]
    return "\n".join([*lines, "", advice(findings)])


def _grid(rows: Sequence[Row], show: Any) -> list[list[str]]:
    return [
        [name, *(show(row) for row in rows if row.eviction == name)]
        for name in dict.fromkeys(row.eviction for row in rows)
    ]


def _table(findings: Findings, rows: list[list[str]]) -> list[str]:
    shares = [f"{100 * budget / findings.different:.0f}%" for budget in findings.budgets]
    sizes = [format_size(budget * PAGE) for budget in findings.budgets]
    table = [["resident", *shares], ["", *sizes], *rows]
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    return [
        "  ".join(f"{cell:>{width}}" if at else f"{cell:{width}}" for at, (cell, width) in cells)
        for cells in (enumerate(zip(row, widths, strict=True)) for row in table)
    ]


def _percentage(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
