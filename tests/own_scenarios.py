"""Clients whose store is an object of their own, each function in one of its own (proof.py)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from exercise import PAGE, expect
from proof import soon
from scenarios import LEAST, MIB, copy_out, fill, stamp
from userswap import ConfigError, Region
from userswap.backends.memory import MemoryStore
from userswap.backends.store import Geometry, Run, Store, StoreFailedError

REGIONS_BEGIN = 4000
"""Before it are the pages of the volume itself."""


class Inverted(MemoryStore):
    """Keeps every bit the other way round, which nobody may notice."""

    async def write(self, runs: Sequence[Run]) -> None:
        flipped = (bytes(byte ^ 0xFF for byte in run.buffer.cast("B")) for run in runs)
        await super().write(
            [Run(run.index, memoryview(data)) for run, data in zip(runs, flipped, strict=True)]
        )

    async def read(self, runs: Sequence[Run]) -> None:
        await super().read(runs)
        for run in runs:
            for index in range(0, run.buffer.nbytes, PAGE):
                if run.index + index // PAGE in self._pages:
                    part = run.buffer.cast("B")[index : index + PAGE]
                    part[:] = bytes(byte ^ 0xFF for byte in part)


class Overtaken(MemoryStore):
    """Holds writes of the first pages' even versions for a while, or until one overtakes them."""

    HOT = 32
    HOLD_S = 4.0

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._held: dict[int, asyncio.Event] = {}

    async def write(self, runs: Sequence[Run]) -> None:
        kept = [Run(run.index, memoryview(bytes(run.buffer))) for run in runs]
        hot = {page: version for run in kept for page, version in self._hot(run)}
        overtaken = [self._held[page] for page in hot if page in self._held]
        if hot and not overtaken and not any(version % 2 for version in hot.values()):
            mine = asyncio.Event()
            self._held.update(dict.fromkeys(hot, mine))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(mine.wait(), self.HOLD_S)
            for page in hot:
                self._held.pop(page, None)
        await super().write(kept)
        for held in overtaken:
            held.set()

    def _hot(self, run: Run) -> Iterator[tuple[int, int]]:
        """The store's pages that hold one of the region's first, and the version: as stamped."""
        for at in range(0, run.buffer.nbytes, PAGE):
            word = int.from_bytes(run.buffer[at : at + 8], "little")
            if word & 1 and word >> 32 < self.HOT:
                yield run.index + at // PAGE, (word & 0xFFFFFFFF) >> 1


def writes_that_overtake() -> None:
    """A page is written to the store, comes back, is changed and written again."""
    with Region(20 * MIB, resident=8 * MIB, store=Overtaken(1 << 20), prefetch="none") as region:
        pages = region.size // PAGE

        def write(first: int, end: int, version: int) -> None:
            for page in range(first, end):
                region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, version)

        for version in range(0, 4, 2):
            for turn in range(2):
                write(0, Overtaken.HOT, version + turn)
                write(Overtaken.HOT, pages, version + turn)
            for page in range(Overtaken.HOT):
                expect(copy_out(region, page) == stamp(page, version + 1), f"page {page} is lost")


async def make(page_count: int, geometry: Geometry) -> Store:
    await asyncio.sleep(0)
    return Inverted(page_count, page_size=geometry.page_size)


def refuse(geometry: Geometry) -> Store:
    raise StoreFailedError("not today", store="own")


def page_to_an_object(*, made: bool) -> None:
    """A store that can be pickled, or a function that makes one in the pager."""
    pages = 1 << 20
    store: Any = functools.partial(make, pages) if made else Inverted(pages)
    with Region(2 * MIB, resident=LEAST, store=store) as region:
        fill(region)
        for page in range(region.size // PAGE):
            expect(copy_out(region, page) == stamp(page, 0), f"page {page} is lost")
        expect(region.stats().store == "object", region.stats().store)
        expect(region.stats().faults["awaited"] > 0, "nothing was read from the store")


def offer_what_is_no_store() -> None:
    """Each is refused in one line that says why."""
    offers: list[tuple[Any, str]] = [
        (None, "give a store URL"),
        (7, "give a store URL"),
        (Inverted(16), "no room"),
        (refuse, "not today"),
        (repr, "is no store"),
        (lambda _: Inverted(1 << 20), "cannot be sent"),
        (functools.partial(print, bytes(100_000)), "over"),
    ]
    for store, why in offers:
        refusal = _refusal(store)
        print(refusal)
        expect(why in refusal and "\n" not in refusal, f"{store!r}: {refusal}")


class Hung(MemoryStore):
    """Never ends its first call of a kind that concerns a region's own pages."""

    kind = ""

    async def _call(self, kind: str, index: int) -> None:
        if kind == self.kind and index > REGIONS_BEGIN:
            await asyncio.Event().wait()

    async def write(self, runs: Sequence[Run]) -> None:
        await self._call("write", runs[0].index)
        await super().write(runs)

    async def discard(self, index: int, count: int) -> None:
        await self._call("discard", index)
        await super().discard(index, count)


def hung(kind: str, geometry: Geometry) -> Store:
    store = Hung(1 << 32)
    store.kind = kind
    return store


def wait_for_a_hung_store(*, kind: str) -> None:
    """A region that cannot be opened, or cannot be closed: who waits for it may give up."""
    try:
        print("waits", flush=True)
        with Region(2 * MIB, resident=LEAST, store=functools.partial(hung, kind), name="r") as r:
            for page in range(LEAST // PAGE - 4):  # some go out, and no fault has to wait
                r.memory[page * PAGE] = 1
            expect(soon(lambda: r.stats().staging_bytes > 0, 20), "nothing went out")
    except KeyboardInterrupt:
        print("gave up", flush=True)


def wait_for_room_that_a_hung_store_does_not_make() -> None:
    """Writes do not end: at the budget the next fault waits."""
    store = functools.partial(hung, "write")
    with (
        Region(2 * MIB, resident=LEAST, store=store, name="r") as r,
        open("/dev/zero", "rb") as file,
    ):
        print("waits", flush=True)
        file.readinto(r.memory)


def _refusal(store: Any) -> str:
    try:
        Region(2 * MIB, resident=LEAST, store=store)
    except ConfigError as error:
        return str(error)
    raise AssertionError("it was accepted")
