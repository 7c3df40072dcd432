"""`userswap bench stores`: stores against each other under a region, on the same real data.

One touching program (bench/toucher.py) reads at random, half of its memory resident, over each
store in turn, in turns again for each repetition, so that what the machine does meanwhile meets
all of them. Percentiles are of the accesses that faulted. Beside them stands the store measured
alone, page by page on a quiet event loop: the difference is what a fault costs over its store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from userswap.backends.grammar import GrammarError, format_size, parse_size
from userswap.backends.registry import open_stack, parse
from userswap.backends.store import Geometry, Run
from userswap.bench import sample
from userswap.bench.arguments import whole_number
from userswap.bench.histogram import Histogram
from userswap.engine.errors import ConfigError

SCHEMA = "userswap.bench.stores/1"
PAGE = sample.PAGE
DEFAULT_URLS = ("ram:lz4", "ram:zstd", "lmdb:{dir}")
DEFAULT_SIZE = "128MiB"
SIZE_MIN = 8 << 20
REPETITIONS = 3
REPETITIONS_MAX = 1000
ALONE_READS = 20_000
FAULT_NS = 2_000
"""An access that took longer than this was a fault: a hit takes a tenth of it."""


@dataclass
class StoreResult:
    """The repetitions of one store."""

    url: str
    p50_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    alone_p50_us: list[float] = field(default_factory=list)
    faults: int = 0
    bad_pages: int = 0
    awaited: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read at random from memory of which a part is resident, over each store in turn: what a "
        "fault costs (p50, p99), and what the store alone takes for the page."
    )
    parser.epilog = (
        "{dir} in a URL becomes an empty directory, which is removed again.\n\n"
        "exit code: 0 measured and every page verified, 1 not so\n\n"
        "examples:\n"
        "  userswap bench stores\n"
        "  userswap bench stores ram:zstd 'lmdb:{dir}' --size 512MiB --json > result.json"
    )
    parser.add_argument(
        "urls", nargs="*", metavar="URL", help=f"(default: {' '.join(DEFAULT_URLS)})"
    )
    parser.add_argument("--size", default=DEFAULT_SIZE, help=f"of the memory ({DEFAULT_SIZE})")
    parser.add_argument("--resident", default="50%", help="of it, at most (default: 50%%)")
    parser.add_argument(
        "--repetitions",
        type=whole_number(1, REPETITIONS_MAX),
        default=REPETITIONS,
        help=f"of each store (default: {REPETITIONS})",
    )
    parser.add_argument(
        "--data",
        default="files",
        choices=sample.DATA,
        help="the files of this Python installation or made-up records (default: files)",
    )


def run(arguments: argparse.Namespace) -> int:
    size = parse_size(arguments.size) // PAGE * PAGE
    if size < SIZE_MIN:
        raise GrammarError(f"--size {arguments.size}: at least {format_size(SIZE_MIN)}")
    resident = parse_size(arguments.resident, whole=size)
    results = [StoreResult(url) for url in arguments.urls or DEFAULT_URLS]
    for result in results:
        parse(result.url)
    for repetition in range(arguments.repetitions):
        for result in results if repetition % 2 == 0 else reversed(results):
            with tempfile.TemporaryDirectory(prefix="userswap-bench-") as folder:
                measure(result, folder, size, resident, arguments.data)
            print(
                f"{repetition + 1} of {arguments.repetitions}, {result.url}: "
                f"p50 {result.p50_us[-1]:.1f} us, p99 {result.p99_us[-1]:.1f} us, "
                f"alone {result.alone_p50_us[-1]:.1f} us",
                file=sys.stderr,
                flush=True,
            )
    document = as_json(results, size, resident, arguments.data)
    print(json.dumps(document) if arguments.json else as_text(document))
    return 1 if any(result.bad_pages for result in results) else 0


def measure(result: StoreResult, folder: str, size: int, resident: int, data: str) -> None:
    """One repetition: under a region, then alone."""
    paged, alone = (os.path.join(folder, name) for name in ("paged", "alone"))
    os.mkdir(paged)
    os.mkdir(alone)
    url = result.url.replace("{dir}", paged)
    ran, stats = _touch(plan_of(url, size, resident, data))
    slow = [pair for pair in ran["run"]["latencies_ns"] if pair[0] >= FAULT_NS]
    histogram = Histogram.from_pairs(slow, ran["run"]["highest_ns"])
    result.p50_us.append(histogram.percentile(0.5) / 1000)
    result.p99_us.append(histogram.percentile(0.99) / 1000)
    result.faults += histogram.total
    result.bad_pages += sum(step["bad"] for step in ran.values())
    result.awaited = stats["faults_awaited"] > 0
    url = result.url.replace("{dir}", alone)
    result.alone_p50_us.append(asyncio.run(_alone(url, sample.load(_named(data)))))


def plan_of(url: str, size: int, resident: int, data: str) -> dict[str, Any]:
    """What the touching process is told."""
    pages = size // PAGE
    steps = [
        ("fill", "fill", "sequential", pages, 1),
        ("warm", "read", "random", pages, 2),
        ("run", "read", "random", 2 * pages, 3),
        ("check", "check", "sequential", pages, 1),
    ]
    names = ("name", "operation", "pattern", "count", "seed")
    cpus = sorted(os.sched_getaffinity(0))
    return {
        "side": "userswap",
        "pages": pages,
        "resident": resident,
        "store": url,
        "data": data,
        "stored": True,
        "versions": False,
        "cpus": cpus[:1],
        "pager_cpus": cpus,
        "steps": [dict(zip(names, step, strict=True)) for step in steps],
    }


def _touch(plan: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of the plan's steps by name, and the region's stats after them."""
    program = [sys.executable, "-P", "-m", "userswap.bench.toucher"]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(command: str, /, **more: Any) -> dict[str, Any]:
            assert child.stdin is not None
            assert child.stdout is not None
            print(json.dumps({"command": command, **more}), file=child.stdin, flush=True)
            answer: dict[str, Any] = json.loads(child.stdout.readline() or "{}")
            if "error" in answer or (not answer and child.poll() is not None):
                ended = f"{plan['store']}: the touching process ended"
                raise ConfigError(answer.get("error", ended))
            return answer

        ask("prepare", plan=plan)
        ask("open")
        ran = {step["name"]: ask("step", name=step["name"]) for step in plan["steps"]}
        stats = ask("stats")
        ask("close")
        child.stdin.close()
        return ran, stats


async def _alone(url: str, content: bytes) -> float:
    """The median of reading one page, in microseconds, where nothing else goes on."""
    pages = len(content) // PAGE
    store = await open_stack(url, Geometry(pages))
    try:
        for first in range(0, pages, 64):
            data = content[first * PAGE : (first + 64) * PAGE]
            await store.write([Run(first, memoryview(data))])
        generator, buffer, took = random.Random(1), memoryview(bytearray(PAGE)), []
        for _ in range(ALONE_READS):
            page = generator.randrange(pages)
            before = time.perf_counter_ns()
            await store.read([Run(page, buffer)])
            took.append(time.perf_counter_ns() - before)
        return sorted(took)[ALONE_READS // 2] / 1000
    finally:
        await store.aclose()


def _named(data: str) -> sample.Data:
    return next(name for name in sample.DATA if name == data)


def as_json(results: list[StoreResult], size: int, resident: int, data: str) -> dict[str, Any]:
    stores = []
    for result in results:
        p50, p99, alone = (
            sorted(times)[len(times) // 2]
            for times in (result.p50_us, result.p99_us, result.alone_p50_us)
        )
        medians = {"p50_us": p50, "p99_us": p99, "alone_p50_us": alone}
        stores.append({**asdict(result), "medians": medians})
    return {
        "schema": SCHEMA,
        "size": size,
        "resident": resident,
        "data": data,
        "cpus": sorted(os.sched_getaffinity(0)),
        "stores": stores,
    }


def as_text(document: dict[str, Any]) -> str:
    sizes = f"{format_size(document['size'])}, {format_size(document['resident'])} resident"
    lines = [
        f"random reads of {sizes}; medians of the repetitions, microseconds",
        f"{'store':40} {'p50':>7} {'p99':>8} {'alone':>7} {'over it':>8} {'to first':>8}",
    ]
    first = document["stores"][0]["medians"]["p50_us"]
    for store in document["stores"]:
        medians = store["medians"]
        p50, alone = medians["p50_us"], medians["alone_p50_us"]
        over = f"{p50 - alone:8.1f}" if store["awaited"] else f"{'native':>8}"
        lines.append(
            f"{store['url']:40} {p50:7.1f} {medians['p99_us']:8.1f} {alone:7.1f} {over} "
            f"{p50 / first:8.2f}"
        )
        if store["bad_pages"]:
            lines.append(f"  {store['bad_pages']} pages were not what was written")
    return "\n".join(lines)
