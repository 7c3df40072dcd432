"""`userswap demo`: real files in a fraction of their size, and the proof that all came back.

Fills a region with the files of this machine, checks every file's SHA-256 through the paged memory
in random order, then sorts a numpy array twice the size of the resident budget in a region of its
own. What is called saved has everything deducted that userswap holds, the pager itself included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import userswap
from userswap.backends import grammar, registry
from userswap.backends.store import Geometry, StoreError
from userswap.bench import corpus, sorting
from userswap.bench.arguments import whole_number
from userswap.bench.progress import Progress
from userswap.engine import machine, movers, probe
from userswap.engine.errors import ConfigError, UnsupportedError
from userswap.engine.region import check_resident, check_size
from userswap.engine.stats import Latency, RegionStats

SCHEMA = "userswap.demo/1"
PAGE = probe.PAGE_SIZE
MIB = 1 << 20
SEED_MAX = (1 << 64) - 1
STORES_OF_MEMORY = ("memory", "ram")
USABLE_SHARE = 0.75
"""Of the free memory: data that does not compress takes a quarter more than its size."""


class PagedRegion(Protocol):
    """What the demonstration uses of userswap.Region."""

    @property
    def memory(self) -> memoryview: ...
    def stats(self) -> RegionStats: ...


OpenRegion = Callable[..., AbstractContextManager[PagedRegion]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done, after the machine's limits were taken into account."""

    candidates: tuple[corpus.Candidate, ...]
    size: int
    resident: int
    store: str
    seed: int
    user_mode_only: bool
    mover: probe.Mover
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    size: int
    seconds: float
    served: int
    """Faults that brought a page or let a write through."""
    faults: dict[str, int]
    """All messages by what became of them, those that were put off included."""


@dataclass(slots=True)
class Outcome:
    """What was found, region by region."""

    phases: list[Phase] = field(default_factory=list)
    pages: int = 0
    lost: int = 0
    files_stats: RegionStats | None = None
    sort_stats: RegionStats | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return f"verified: {self.pages - self.lost} pages, {self.lost} lost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fill a region with real files, check every file's SHA-256 through the paged memory in "
        "random order, then sort a numpy array of twice the resident budget. All of it must "
        "come back."
    )
    parser.epilog = (
        "exit code: 0 every page was verified, 1 something was lost, 3 this machine cannot\n\n"
        "examples:\n"
        "  userswap demo\n"
        "  userswap demo --size 256MiB --resident 10% --store ram:lz4\n"
        "  userswap demo --seed 7 --json > demo.json"
    )
    parser.add_argument(
        "--size", default="1GiB", help="of the data, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--resident",
        default="25%",
        help="of it in memory: a size or a percentage (default: 25%%)",
    )
    parser.add_argument(
        "--store", default="ram:zstd", help="URL of the store (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, SEED_MAX),
        default=1,
        help="of the random order (default: 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    plan = make_plan(
        arguments.size, arguments.resident, arguments.store, arguments.seed, corpus.default_roots()
    )
    outcome = demonstrate(plan, userswap.Region)
    print(
        json.dumps(as_json(plan, outcome), indent=2) if arguments.json else as_text(plan, outcome)
    )
    return 0 if outcome.lost == 0 else 1


def make_plan(size: str, resident: str, store: str, seed: int, roots: list[Path]) -> Plan:
    """What can be wrong with the arguments is found before the search for files, which takes long.

    Raises UnsupportedError where the kernel refuses all service.
    """
    wanted = check_size(size)
    affordable = int(machine.memory().usable * USABLE_SHARE)
    capacity = min(wanted, affordable)
    check_resident(resident, capacity)
    _check_store(store, capacity)
    facts = probe.gather()
    mover, service = probe.best_mover(facts), probe.service_level(facts)
    if service.level == "none":
        raise UnsupportedError(f"{service.reason}; {service.remedy}")
    notes = []
    if service.level == "user_mode_only":
        notes.append(f"serving user-mode faults only: {service.reason}; {service.remedy}")
    if mover == "protect":
        notes.append(f"no UFFDIO_MOVE before Linux 6.8: {movers.LIMIT_OF_PROTECT}")
    if wanted > affordable:
        notes.append(f"{size} asked for, but memory allows {grammar.format_size(affordable)}")
    progress = Progress(lambda: "found")
    progress.begin("files", capacity)
    candidates = corpus.choose(roots, capacity, progress.advance)
    progress.end()
    found = sum(candidate.length for candidate in candidates)
    if not candidates:
        raise ConfigError(f"no file fits into {grammar.format_size(capacity)}")
    if found < 0.99 * capacity:
        notes.append(f"this machine has {grammar.format_size(found)} of files to show")
    rounded = -(-found // PAGE) * PAGE
    return Plan(
        candidates=tuple(candidates),
        size=rounded,
        resident=check_resident(resident, rounded),
        store=store,
        seed=seed,
        user_mode_only=service.level == "user_mode_only",
        mover=mover,
        notes=tuple(notes),
    )


def _check_store(url: str, size: int) -> None:
    """Raises ConfigError for a URL that does not read, or whose store of memory cannot be opened.

    Other stores are opened by the pager alone: it may leave traces on their media.
    """

    async def open_once() -> None:
        store = await registry.open_stack(url, Geometry(size // PAGE))
        await store.aclose()

    try:
        stack = registry.parse(url)
        if not stack.filters and stack.store.name in STORES_OF_MEMORY:
            asyncio.run(open_once())
    except (grammar.GrammarError, StoreError) as error:
        raise ConfigError(f"store '{url}': {error}") from None


def demonstrate(plan: Plan, open_region: OpenRegion) -> Outcome:
    outcome = Outcome()
    _page_files(plan, open_region, outcome)
    try:
        import numpy
    except ImportError:
        outcome.notes.append("nothing was sorted: numpy is not installed")
    else:
        _sort_numbers(plan, open_region, outcome, numpy)
    return outcome


def _open(
    plan: Plan, open_region: OpenRegion, name: str, size: int
) -> AbstractContextManager[PagedRegion]:
    return open_region(
        size,
        resident=plan.resident,
        store=plan.store,
        name=name,
        user_mode_only=plan.user_mode_only,
        mover=plan.mover,
    )


class Stage:
    """One region at work: its phases are timed and their faults told apart."""

    def __init__(self, region: PagedRegion, outcome: Outcome) -> None:
        self._region = region
        self._outcome = outcome
        self._progress = Progress(self._note)
        self._name, self._size = "", 0
        self._before: dict[str, int] = {}
        self._served_before = 0
        self.advance = self._progress.advance

    def _note(self) -> str:
        stats = self._region.stats()
        ratio = "" if stats.ratio is None else f"  ratio {stats.ratio:.1f}"
        return f"{_served(stats)} faults{ratio}"

    def begin(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        stats = self._region.stats()
        self._before, self._served_before = stats.faults, _served(stats)
        self._progress.begin(name, size)

    def end(self) -> None:
        seconds = self._progress.end()
        stats = self._region.stats()
        faults = {kind: count - self._before[kind] for kind, count in stats.faults.items()}
        served = _served(stats) - self._served_before
        self._outcome.phases.append(Phase(self._name, self._size, seconds, served, faults))


def _served(stats: RegionStats) -> int:
    return stats.faults_native + stats.faults_awaited


def _page_files(plan: Plan, open_region: OpenRegion, outcome: Outcome) -> None:
    with _open(plan, open_region, "demo-files", plan.size) as region:
        stage = Stage(region, outcome)
        stage.begin("fill", sum(candidate.length for candidate in plan.candidates))
        pieces = corpus.load(region.memory, plan.candidates, stage.advance)
        stage.end()
        random.Random(plan.seed).shuffle(pieces)
        lost: set[int] = set()
        total = sum(piece.length for piece in pieces)
        stage.begin("check", total)
        for piece in pieces:
            if not corpus.intact(region.memory, piece, stage.advance):
                end = piece.offset + piece.length
                lost.update(range(piece.offset // PAGE, -(-end // PAGE)))
        stage.end()
        outcome.files_stats = region.stats()
        outcome.pages += -(-total // PAGE)
        outcome.lost += max(len(lost), outcome.files_stats.lost_pages)


def _sort_numbers(plan: Plan, open_region: OpenRegion, outcome: Outcome, numpy: Any) -> None:
    size = 2 * plan.resident
    with _open(plan, open_region, "demo-sort", size) as region:
        stage = Stage(region, outcome)
        array = numpy.frombuffer(region.memory, dtype=numpy.uint64)
        try:
            stage.begin("write", size)
            written = sorting.write(numpy, array, plan.seed, stage.advance)
            stage.end()
            stage.begin("sort", size)
            sorting.sort(array, stage.advance)
            stage.end()
            stage.begin("verify", size)
            good = sorting.in_order(numpy, array, stage.advance) == written
            stage.end()
        finally:
            del array  # or the region could not give its memory back
        outcome.sort_stats = region.stats()
        outcome.pages += size // PAGE
        outcome.lost += max(outcome.sort_stats.lost_pages, 0 if good else size // PAGE)


def held(stats: RegionStats) -> dict[str, int]:
    """Everything that is kept in memory for a region; pages in staging count as resident."""
    return {
        "resident": stats.resident_bytes,
        "pool": stats.pool_bytes,
        "tables": stats.table_bytes,
        "pager": stats.pager_rss_bytes,
    }


def as_json(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    stats = outcome.files_stats
    used = held(stats) if stats else {}
    return {
        "schema": SCHEMA,
        "version": userswap.__version__,
        "size": plan.size,
        "resident": plan.resident,
        "store": plan.store,
        "seed": plan.seed,
        "user_mode_only": plan.user_mode_only,
        "mover": plan.mover,
        "files": len(plan.candidates),
        "notes": [*plan.notes, *outcome.notes],
        "phases": [asdict(phase) for phase in outcome.phases],
        "held_bytes": used,
        "saved_bytes": plan.size - sum(used.values()),
        "stats": {
            "files": stats.as_dict() if stats else None,
            "sort": outcome.sort_stats.as_dict() if outcome.sort_stats else None,
        },
        "pages": outcome.pages,
        "lost": outcome.lost,
        "verdict": outcome.verdict,
        "facts": asdict(probe.gather()),
        "machine": asdict(machine.gather()),
    }


def as_text(plan: Plan, outcome: Outcome) -> str:
    rows = [
        ("data", f"{grammar.format_size(plan.size)} in {len(plan.candidates)} files"),
        (
            "resident",
            f"{grammar.format_size(plan.resident)} ({100 * plan.resident / plan.size:.0f} %)",
        ),
        ("store", plan.store),
    ]
    for phase in outcome.phases:
        rate = phase.size / MIB / max(phase.seconds, 1e-9)
        speed = f"{grammar.format_size(phase.size)} in {phase.seconds:.1f} s, {rate:.0f} MiB/s"
        rows.append((phase.name, f"{speed}, {phase.served} faults"))
    if outcome.files_stats:
        rows += _memory_rows(plan.size, outcome.files_stats)
    rows += [("note", note) for note in (*plan.notes, *outcome.notes)]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:{width}}  {value}" for name, value in rows), outcome.verdict])


def _memory_rows(size: int, stats: RegionStats) -> list[tuple[str, str]]:
    used = held(stats)
    total = sum(used.values())
    parts = " + ".join(f"{name} {grammar.format_size(part)}" for name, part in used.items() if part)
    saved = f"none: the data takes {grammar.format_size(size)}"
    if total < size:
        share = 100 * (size - total) / size
        saved = (
            f"{grammar.format_size(size - total)} of {grammar.format_size(size)} ({share:.0f} %)"
        )
    served = {"native faults": stats.native_latency, "awaited faults": stats.awaited_latency}
    return [
        *((name, _latency(latency)) for name, latency in served.items() if latency.count),
        *([("compression", f"{stats.ratio:.2f} : 1")] if stats.ratio is not None else []),
        ("memory held", f"{grammar.format_size(total)} = {parts}"),
        ("memory saved", saved),
        ("pager CPU", f"{stats.pager_cpu_seconds:.1f} s"),
    ]


def _latency(latency: Latency) -> str:
    return f"{latency.count} served: p50 {latency.p50_us:.1f} us, p99 {latency.p99_us:.1f} us"
