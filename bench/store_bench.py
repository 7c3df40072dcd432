"""`userswap store bench`: a store measured alone, without an engine over it, on real data.

Every call is timed from the await to its return, on the event loop that makes it: what a fault
would wait for. It all happens in an extent of the store's volume, which is removed again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from userswap.backends import registry
from userswap.backends.grammar import GrammarError, format_size, parse_duration, parse_size
from userswap.backends.store import Geometry, Run, Store, StoreError
from userswap.backends.volume import open_volume
from userswap.backends.window import Window
from userswap.bench import corpus

SCHEMA = "userswap.store.bench/1"
DEFAULT_SIZE = "64MiB"
SIZE_MIN = 1 << 20
DEFAULT_TIME = "1s"
BATCH = 32
DEPTH = 32
SCRATCH = "userswap store bench"


@dataclass(frozen=True)
class Case:
    name: str
    operation: str
    pages: int
    """Of one call."""
    depth: int
    """Calls under way at once."""
    random: bool


CASES = (
    Case("first write", "write", BATCH, 1, False),
    Case("sequential write", "write", 1, 1, False),
    Case("sequential write, batches", "write", BATCH, 1, False),
    Case("random write", "write", 1, 1, True),
    Case("random write, depth 32", "write", 1, DEPTH, True),
    Case("sequential read", "read", 1, 1, False),
    Case("sequential read, batches", "read", BATCH, 1, False),
    Case("random read", "read", 1, 1, True),
    Case("random read, depth 32", "read", 1, DEPTH, True),
)


@dataclass(frozen=True)
class Measured:
    case: str
    operation: str
    pages_per_call: int
    depth: int
    calls: int
    p50_us: float
    p99_us: float
    p999_us: float
    mib_per_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a store alone: reads and writes of one page and of batches, in order and at "
        "random, one call at a time and 32 at once, on real data (files of this system), all of "
        "which is verified at the end. It works in an extent of its own and removes it again."
    )
    parser.epilog = (
        "exit code: 0 measured, 1 a page came back wrong\n\n"
        "examples:\n"
        "  userswap store bench ram:lz4\n"
        "  userswap store bench --size 1GiB --time 5s file:/var/lib/swap\n"
        "  userswap store bench --json checksum::ram:zstd > result.json"
    )
    parser.add_argument("url", metavar="URL", help="a store, as Region takes it")
    parser.add_argument(
        "--size", default=DEFAULT_SIZE, metavar="SIZE", help=f"of the data ({DEFAULT_SIZE})"
    )
    parser.add_argument(
        "--time", default=DEFAULT_TIME, metavar="TIME", help=f"of one case ({DEFAULT_TIME})"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the random order")


def run(arguments: argparse.Namespace) -> int:
    size, seconds = parse_size(arguments.size), parse_duration(arguments.time)
    if size < SIZE_MIN:
        raise GrammarError(f"--size {arguments.size} is too small: 1MiB is the least")
    bench = asyncio.run(_bench(arguments.url, size, seconds, arguments.seed, arguments.json))
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "url": arguments.url, **bench}, indent=2))
    else:
        ratio = f", ratio {bench['ratio']:.2f}" if bench["ratio"] else ""
        verified = "every page verified" if bench["verified"] else "nothing to verify"
        verified = "SOME PAGES CAME BACK WRONG" if bench["wrong"] else verified
        flush = f"the last flush took {bench['flush_ms']:.2f} ms"
        print(f"\n{format_size(bench['bytes'])} of real data{ratio}; {flush}; {verified}")
    return int(bench["wrong"])


async def _bench(url: str, size: int, seconds: float, seed: int, quiet: bool) -> dict[str, Any]:
    rng = random.Random(seed)
    async with _scratch(url, size) as (store, held):
        data = _real_data(store.page_count * store.page_size)
        before = held()
        results = []
        if not quiet:
            print(f"{'':28}{'p50 us':>10}{'p99 us':>10}{'p99.9 us':>10}{'MiB/s':>10}{'calls':>9}")
        for case in CASES:
            once = case is CASES[0]
            measured = await _measure(store, data, case, None if once else seconds, rng)
            results.append(measured)
            if once:
                after = held()
            if not quiet:
                print(_line(measured), flush=True)
        since = time.perf_counter_ns()
        await store.flush()
        flush_ms = (time.perf_counter_ns() - since) / 1e6
        forgets = registry.parse(url).store.name == "null"
        verified = forgets or await _verified(store, data)
    used = after - before if after is not None and before is not None else 0
    return {
        "bytes": len(data),
        "page_size": store.page_size,
        "held_bytes": used or None,
        "ratio": round(len(data) / used, 3) if used > 0 else None,
        "flush_ms": round(flush_ms, 3),
        "verified": verified and not forgets,
        "wrong": not verified,
        "cases": [asdict(measured) for measured in results],
    }


def _line(measured: Measured) -> str:
    return (
        f"{measured.case:28}{measured.p50_us:>10.1f}{measured.p99_us:>10.1f}"
        f"{measured.p999_us:>10.1f}{measured.mib_per_second:>10.1f}{measured.calls:>9}"
    )


async def _measure(
    store: Store, data: bytearray, case: Case, seconds: float | None, rng: random.Random
) -> Measured:
    """Run a case for so long; None: once over all pages."""
    view = memoryview(data)
    calls = store.page_count // case.pages
    length = case.pages * store.page_size
    operation: Callable[[list[Run]], Awaitable[None]] = getattr(store, case.operation)
    order = _places(calls, case.random, rng, once=seconds is None)
    busy: set[int] = set()
    latencies: list[int] = []
    begun = time.perf_counter_ns()
    end = begun + int((seconds or 3600) * 1e9)

    async def worker() -> None:
        target = memoryview(bytearray(length))
        for place in order:
            if place in busy:  # two calls never meet on a page
                continue
            busy.add(place)
            at = place * length
            buffer = view[at : at + length] if case.operation == "write" else target
            since = time.perf_counter_ns()
            await operation([Run(place * case.pages, buffer)])
            now = time.perf_counter_ns()
            busy.discard(place)
            latencies.append(now - since)
            if now >= end:
                return
            if len(latencies) % 64 == 0:
                await asyncio.sleep(0)  # a store that never waits shall hear Ctrl-C too

    await asyncio.gather(*(worker() for _ in range(case.depth)))
    elapsed = (time.perf_counter_ns() - begun) / 1e9
    rate = len(latencies) * length / elapsed / (1 << 20)
    latencies.sort()
    return Measured(
        case.name,
        case.operation,
        case.pages,
        case.depth,
        len(latencies),
        _percentile(latencies, 0.5),
        _percentile(latencies, 0.99),
        _percentile(latencies, 0.999),
        round(rate, 1),
    )


def _places(calls: int, at_random: bool, rng: random.Random, *, once: bool) -> Iterator[int]:
    while True:
        if at_random:
            yield rng.randrange(calls)
        else:
            yield from range(calls)
            if once:
                return


def _percentile(ordered: list[int], share: float) -> float:
    """Microseconds."""
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1000, 2)


async def _verified(store: Store, data: bytearray) -> bool:
    page = store.page_size
    for index in range(0, store.page_count, BATCH):
        buffer = bytearray(min(BATCH, store.page_count - index) * page)
        await store.read([Run(index, memoryview(buffer))])
        if buffer != data[index * page : index * page + len(buffer)]:
            return False
    return True


def _real_data(size: int) -> bytearray:
    data = bytearray(size)
    with memoryview(data) as view:
        chosen = corpus.choose(corpus.default_roots(), size, lambda count: None)
        corpus.load(view, chosen, lambda count: None)
    return data


@asynccontextmanager
async def _scratch(url: str, size: int) -> AsyncIterator[tuple[Store, Callable[[], int | None]]]:
    """An extent of the volume; and what tells how much the store holds, where that can be seen."""
    innermost: list[Store] = []

    def seen(store: Store) -> Store:
        innermost.append(store)
        return store

    stack = await registry.open_stack(url, Geometry(), wrap=seen)
    try:
        volume = await open_volume(stack, name=url)
        pages = size // stack.page_size // BATCH * BATCH
        extent = await volume.allocate(SCRATCH, pages, reclaim=False)
        try:
            target = registry.parse(url).store.target
            yield Window(volume, extent), lambda: _held(innermost[0], target)
        finally:
            with contextlib.suppress(StoreError):
                await volume.release(extent)
    finally:
        await stack.aclose()


def _held(store: Store, target: str) -> int | None:
    """Bytes of memory or of disk that the store takes; None where nobody can tell."""
    if store.native is not None:
        return os.fstat(store.native.fd).st_blocks * 512
    path = Path(target)
    if not target or not (path.is_file() or path.is_dir()):
        return None
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_blocks for each in files) * 512
