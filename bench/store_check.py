"""`userswap store check`: the conformance suite against a URL, without harm to what is there.

Everything happens in an extent of its own, in the volume on that medium: a medium that holds
anything else is refused as ever, other regions' extents are out of reach, and a medium that was
blank is blank again at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from uuid import UUID

from userswap.backends import registry
from userswap.backends.conformance import CHECKS, Check, perform
from userswap.backends.grammar import GrammarError
from userswap.backends.harness import PAGES, Harness, NotApplicableError
from userswap.backends.store import PAGE_SIZE, Geometry, Store, StoreError
from userswap.backends.volume import examine, open_volume
from userswap.backends.window import Window

SCHEMA = "userswap.store.check/1"
SCRATCH = "userswap store check"


@dataclass(frozen=True)
class Outcome:
    check: str
    result: str
    """passed, skipped or failed"""
    reason: str
    seconds: float


class ScratchHarness(Harness):
    """Opens one extent of the volume that a URL names, again and again."""

    def __init__(self, url: str, scratch: str, *, seed: int = 1) -> None:
        forgets = registry.parse(url).store.name == "null"
        super().__init__(url, page_sizes=(PAGE_SIZE,), seed=seed, forgets=forgets)
        self.scratch = UUID(scratch) if scratch else None

    def fresh(self, url: str) -> str:
        return url

    async def open(self, geometry: Geometry | None = None) -> Store:
        store = await super().open(geometry)
        await store.discard(0, store.page_count)
        return store

    async def open_at(self, place: str, geometry: Geometry) -> Store:
        return await self._window(await registry.open_stack(place, Geometry()), geometry)

    async def open_over(self, wrap: Callable[[Store], Store]) -> Store:
        if not registry.parse(self.url).filters:
            raise NotApplicableError("there is no store under it")
        stack = await registry.open_stack(self.url, Geometry(), wrap=wrap)
        store = await self._keep(self._window(stack, self.geometry))
        await store.discard(0, store.page_count)
        return store

    async def _window(self, store: Store, geometry: Geometry) -> Window:
        try:
            volume = await open_volume(store, name=self.url)
            (extent,) = [each for each in volume.stale if each.uuid == self.scratch] or [
                await volume.allocate(SCRATCH, PAGES, reclaim=False)
            ]
        except BaseException:
            await store.aclose()
            raise
        self.scratch = extent.uuid
        return Window(volume, extent, geometry.page_count)

    def child_code(self, place: str, geometry: Geometry) -> str:
        return (
            f"from {__name__} import ScratchHarness\n"
            "from userswap.backends.harness import write_until_killed\n"
            "from userswap.backends.store import Geometry\n"
            f"harness = ScratchHarness({place!r}, {str(self.scratch or '')!r})\n"
            f"write_until_killed(harness, {geometry!r}, {self.seed})"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Put the store that a URL names to the conformance suite: the contract that every store "
        "keeps, check by check, with a process that is killed where the store is durable. It "
        "works in an extent of its own and removes it again; a medium that holds anything but a "
        "volume is refused and left alone, and nothing is made that was not there. "
        "Checks that need a store of another size or page size belong to the store's own tests "
        "(userswap.backends.conformance)."
    )
    parser.epilog = (
        "exit code: 0 all passed, 1 a check failed\n\n"
        "examples:\n"
        "  userswap store check file:/var/lib/swap\n"
        "  userswap store check --only survives checksum::file:/var/lib/swap\n"
        "  userswap store check --json mine:/some/where | jq .failed"
    )
    parser.add_argument("url", metavar="URL", help="a store, as Region takes it")
    parser.add_argument("--only", metavar="WORD", help="only checks with this word in their name")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of what is written")


def run(arguments: argparse.Namespace) -> int:
    chosen = [check for check in CHECKS if (arguments.only or "") in _title(check)]
    if not chosen:  # nothing was looked at, so nothing was found good
        raise GrammarError(f"--only {arguments.only}: no check has that in its name")
    outcomes = asyncio.run(_check(arguments.url, chosen, arguments.seed, arguments.json))
    failed = sum(outcome.result == "failed" for outcome in outcomes)
    if arguments.json:
        document = {
            "schema": SCHEMA,
            "url": arguments.url,
            "checks": [asdict(outcome) for outcome in outcomes],
            "failed": failed,
        }
        print(json.dumps(document, indent=2))
    else:
        skipped = sum(outcome.result == "skipped" for outcome in outcomes)
        passed = len(outcomes) - failed - skipped
        print(f"\n{passed} passed, {skipped} skipped, {failed} failed")
    return int(bool(failed))


async def _check(url: str, checks: list[Check], seed: int, quiet: bool) -> list[Outcome]:
    outcomes = []
    async with _scratch(url, seed) as harness:
        for check in checks:
            outcome = await _one(check, harness)
            outcomes.append(outcome)
            if not quiet:
                reason = f": {outcome.reason}" if outcome.reason else ""
                print(f"{outcome.result:8}{outcome.check}{reason}", flush=True)
    return outcomes


async def _one(check: Check, harness: ScratchHarness) -> Outcome:
    since = time.monotonic()
    try:
        reason = await perform(check, harness)
        result = "skipped" if reason else "passed"
    except Exception as error:  # whatever comes out of a store is what is being looked for
        reason = str(error) if isinstance(error, AssertionError | StoreError) else repr(error)
        result = "failed"
    return Outcome(_title(check), result, reason, round(time.monotonic() - since, 3))


def _title(check: Check) -> str:
    return getattr(check, "__name__", "?").removeprefix("check_").replace("_", " ")


@asynccontextmanager
async def _scratch(url: str, seed: int) -> AsyncIterator[ScratchHarness]:
    """A harness, and the medium afterwards as it was before."""
    store = await registry.open_stack(url, Geometry(existing=True))
    try:
        blank = await examine(store, name=url) is None
    finally:
        await store.aclose()
    harness = ScratchHarness(url, "", seed=seed)
    try:
        yield harness
    finally:
        with contextlib.suppress(StoreError):
            await _clean(harness, blank)


async def _clean(harness: ScratchHarness, was_blank: bool) -> None:
    store = await registry.open_stack(harness.url, Geometry())
    try:
        contents = await examine(store, name=harness.url)
        if contents is None:
            return
        volume = await open_volume(store, name=harness.url)
        for extent in volume.stale:
            if extent.uuid == harness.scratch:
                await volume.reclaim(extent)
        if was_blank and not volume.extents:
            await store.discard(0, contents.superblock.data_start)
            await store.flush()
    finally:
        await store.aclose()
