"""`userswap bench nvme`: what our NVMe/TCP host costs over loopback, beside loops in C.

The target is bench/nvme_target.py, whose data path is in C and does next to nothing: what is
measured is the host. In each placement of the two on CPUs, in turns so that what the machine does
meanwhile meets all: raw round trips of a read's bytes, reads by a loop in C, reads by the store,
with and without digests; then faults of a region over it. Exit codes: 0 measured, 1 a page was not
what was written. A machine with one CPU has one placement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from userswap.bench import nvme_measure as measure
from userswap.bench import sample, stores
from userswap.bench.arguments import whole_number
from userswap.bench.nvme_measure import Times
from userswap.bench.nvme_target import BLOCK
from userswap.engine import machine

SCHEMA = "userswap.bench.nvme/1"
DEPTH = 32
READS = 20_000
REPETITIONS, REPETITIONS_MAX = 5, 1000
FAULT_BYTES = 32 << 20
FAULT_READS = 5000


@dataclass(frozen=True, slots=True)
class Placement:
    name: str
    host: int
    target: int
    spin: bool
    """the target looks for bytes all the time, and so does the loop in C"""


def placements(cpus: list[int]) -> list[Placement]:
    found = [Placement("one CPU", cpus[-1], cpus[-1], spin=False)]
    if len(cpus) > 1:
        found.append(Placement("two CPUs", cpus[-1], cpus[0], spin=False))
        found.append(Placement("two CPUs, target polls", cpus[-1], cpus[0], spin=True))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read blocks over loopback from a target of which the data path is in C and does next to "
        "nothing: by raw round trips of the same bytes, by a loop in C, and by the store, with "
        "and without digests; and the faults of a region over it."
    )
    parser.epilog = (
        "exit code: 0 measured, 1 a page was not what was written\n\n"
        "examples:\n"
        "  userswap bench nvme\n"
        "  userswap bench nvme --repetitions 9 --json > result.json"
    )
    parser.add_argument(
        "--repetitions",
        type=whole_number(1, REPETITIONS_MAX),
        default=REPETITIONS,
        help=f"of each measurement (default: {REPETITIONS})",
    )
    parser.add_argument(
        "--reads",
        type=whole_number(1000, 10_000_000),
        default=READS,
        help=f"of each repetition (default: {READS})",
    )


def run(arguments: argparse.Namespace) -> int:
    affinity = os.sched_getaffinity(0)
    results = []
    try:
        for place in placements(sorted(affinity)):
            results.append(_in(place, arguments.repetitions, arguments.reads))
            print(f"{place.name}: done", file=sys.stderr, flush=True)
        faults = [
            _faults(place, arguments.repetitions)
            for place in placements(sorted(affinity))
            if not place.spin
        ]
    finally:
        os.sched_setaffinity(0, affinity)
    document = {
        "schema": SCHEMA,
        "machine": asdict(machine.gather()),
        "block": BLOCK,
        "depth": DEPTH,
        "target": "bench/nvme_target.py: one thread in C for each queue, blocks in memory",
        "placements": results,
        "faults": faults,
    }
    print(json.dumps(document) if arguments.json else as_text(document))
    return 1 if any(each["bad_pages"] for each in faults) else 0


def _in(place: Placement, repetitions: int, reads: int) -> dict[str, Any]:
    """The medians of the repetitions in one placement."""
    os.sched_setaffinity(0, [place.host])
    found: dict[str, list[Times]] = {}
    with measure.target(place.target, spin=place.spin) as port:
        steps: dict[str, Callable[[], Times]] = {
            "raw": lambda: measure.raw(port, reads, spin=place.spin),
            "loop 1": lambda: measure.loop(port, 1, reads, spin=place.spin),
            "store 1": lambda: measure.store(port, 1, reads),
            "store 1, digests": lambda: measure.store(port, 1, reads, digests=True),
            f"loop {DEPTH}": lambda: measure.loop(port, DEPTH, 4 * reads, spin=place.spin),
            f"store {DEPTH}": lambda: measure.store(port, DEPTH, reads),
            f"store {DEPTH}, digests": lambda: measure.store(port, DEPTH, reads, digests=True),
        }
        for repetition in range(repetitions):
            names = list(steps) if repetition % 2 == 0 else list(reversed(steps))
            for name in names:
                found.setdefault(name, []).append(steps[name]())
    medians = {
        name: {
            field: statistics.median(getattr(times, field) for times in found[name])
            for field in ("p50", "p99", "p999", "rate")
        }
        for name in steps
    }
    return {
        **asdict(place),
        "medians": medians,
        "runs": {n: list(map(asdict, found[n])) for n in steps},
    }


def _faults(place: Placement, repetitions: int) -> dict[str, Any]:
    """Random reads under a region, all of it on the host's CPU, and the store alone, in turns."""
    os.sched_setaffinity(0, [place.host])
    result, alone = stores.StoreResult(""), []
    for _ in range(repetitions):
        # Each on a namespace that nothing was written to.
        with (
            measure.target(place.target, spin=place.spin) as port,
            tempfile.TemporaryDirectory(prefix="userswap-bench-") as folder,
        ):
            result.url = measure.url(port)
            stores.measure(result, folder, FAULT_BYTES, FAULT_BYTES // 2, sample.DATA[0])
            alone.append(measure.store(port, 1, FAULT_READS).p50)
    result.alone_p50_us = alone
    names = ("p50_us", "p99_us", "alone_p50_us")
    medians = {name: statistics.median(getattr(result, name)) for name in names}
    return {**asdict(place), **asdict(result), "medians": medians}


def as_text(document: dict[str, Any]) -> str:
    depth, lines = document["depth"], [f"target: {document['target']}"]
    for each in document["placements"]:
        medians = each["medians"]
        where = f"host on CPU {each['host']}, target on {each['target']}"
        lines += [
            "",
            f"{each['name']} ({where}); medians of {len(each['runs']['raw'])}",
            f"{'':22} {'p50 us':>8} {'p99':>8} {'p99.9':>9} {'a second':>10}",
        ]
        lines += [
            f"{name:22} {m['p50']:8.1f} {m['p99']:8.1f} {m['p999']:9.1f} {m['rate']:10,.0f}"
            for name, m in medians.items()
        ]
        one, many = medians["store 1"], medians[f"store {depth}"]
        times = one["p50"] / medians["raw"]["p50"]
        share = many["rate"] / medians[f"loop {depth}"]["rate"]
        digests = medians["store 1, digests"]["p50"] / one["p50"] - 1
        costs = 1 - medians[f"store {depth}, digests"]["rate"] / many["rate"]
        lines.append(
            f"store to raw round trip {times:.2f} x; to the loop at {depth} {share:.0%}; "
            f"digests {digests:+.0%} at 1, {-costs:+.0%} reads at {depth}"
        )
    lines.append("")
    for each in document["faults"]:
        faults = each["medians"]
        over = faults["p50_us"] - faults["alone_p50_us"]
        lines.append(
            f"faults, {each['name']}: p50 {faults['p50_us']:.1f} us, p99 {faults['p99_us']:.1f}; "
            f"the store alone {faults['alone_p50_us']:.1f}: {over:+.1f}"
        )
        if each["bad_pages"]:
            lines.append(f"{each['bad_pages']} pages were not what was written")
    return "\n".join(lines)
