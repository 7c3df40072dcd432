"""Filters that keep a record of each page: what was damaged is lost, alone, and never wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random

import pytest

import kernel_scenarios
import proof
from media import (
    PAGE,
    History,
    Killed,
    Medium,
    MediumStore,
    completed,
    content,
    lost,
    open_over,
    read,
    write,
)
from userswap.backends.filters import tail
from userswap.backends.filters.tail import Tail
from userswap.backends.store import Geometry, PageLostError, Run, StoreFailedError
from userswap.backends.volume import VolumeError, format_volume, open_volume

PAGES = 600
STACKS = ("checksum::", "encrypt::")


async def written(stack: str, rng: random.Random, count: int = 20) -> tuple[Medium, bytes]:
    """A medium on which pages were written and flushed."""
    medium, data = Medium(), b"".join(rng.randbytes(PAGE) for _ in range(count))
    store = await open_over(medium, stack, Geometry(PAGES))
    await write(store, 0, data)
    await store.flush()
    await store.aclose()
    return medium, data


def flip(medium: Medium, rng: random.Random, page: int) -> None:
    damaged = bytearray(medium.pages.get(page, bytes(PAGE)))
    damaged[rng.randrange(PAGE)] ^= 1 << rng.randrange(8)
    medium.pages[page] = bytes(damaged)


@pytest.mark.parametrize("stack", STACKS)
async def test_damage_is_found_and_stays_alone(stack: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        medium, data = await written(stack, rng)
        flip(medium, rng, 7)
        store = await open_over(medium, stack, Geometry(PAGES))
        assert await lost(store, range(PAGES)) == [7]
        with pytest.raises(PageLostError) as caught:
            await read(store, 5, 6)
        assert caught.value.page == 7
        assert await read(store, 0, 7) == data[: 7 * PAGE]
        await write(store, 7, data[:PAGE])  # or a discard repairs it
        assert await read(store, 7) == data[:PAGE]
        flip(medium, rng, 7)
        await store.discard(7, 1)
        assert await read(store, 7) == bytes(PAGE)


@pytest.mark.parametrize("stack", STACKS)
async def test_a_page_elsewhere_missing_or_stale_is_lost(stack: str, seed: int) -> None:
    rng = random.Random(seed)
    medium, data = await written(stack, rng)
    medium.pages[3], medium.pages[4] = medium.pages[4], medium.pages[3]
    del medium.pages[5]  # the medium forgot it
    before = medium.pages[9]
    medium.pages[30] = rng.randbytes(PAGE)  # was never written through the filter
    store = await open_over(medium, stack, Geometry(PAGES))
    await write(store, 9, rng.randbytes(PAGE))
    medium.pages[9] = before  # the medium did not write what it said it had
    assert await lost(store, range(PAGES)) == [3, 4, 5, 9, 30]
    assert await read(store, 6, 3) == data[6 * PAGE : 9 * PAGE]


@pytest.mark.parametrize("stack", STACKS)
async def test_damaged_records_lose_their_pages(stack: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        medium, _ = await written(stack, rng)
        flip(medium, rng, PAGES)  # the first leaf
        store = await open_over(medium, stack, Geometry(PAGES))
        gone = await lost(store, range(PAGES))
        assert len(gone) <= 1
        for page in gone:
            await store.discard(page, 1)
        assert await lost(store, range(PAGES)) == []


@pytest.mark.parametrize("stack", STACKS)
async def test_a_medium_of_somebody_else_is_left_as_it_is(stack: str, seed: int) -> None:
    rng = random.Random(seed)
    foreign = Medium({page: rng.randbytes(PAGE) for page in range(1100)})
    before = dict(foreign.pages)
    store = await open_over(foreign, stack, Geometry())
    for call in (write(store, 0, bytes(PAGE)), store.discard(0, 3), read(store, 0)):
        with pytest.raises((StoreFailedError, PageLostError), match="something else"):
            await call
    with pytest.raises(VolumeError, match="cannot be read"):
        await open_volume(store, name="test")
    await store.flush()
    await store.aclose()
    assert foreign.pages == before
    del foreign.pages[1099]
    store = await open_over(foreign, stack, Geometry())
    with pytest.raises(PageLostError):
        await read(store, 0)
    await store.aclose()
    del before[1099]
    assert foreign.pages == before
    foreign.pages[1099] = bytes(PAGE - 1) + b"\x01"
    store = await open_over(foreign, stack, Geometry())
    await format_volume(store, name="test", force=True)
    extent = await (await open_volume(store, name="test")).allocate("mine", 100)
    await write(store, extent.base, b"\x05" * PAGE)
    again = await open_over(foreign, stack, Geometry())
    assert (await open_volume(again, name="test")).stale
    assert await read(again, extent.base) == b"\x05" * PAGE


@pytest.mark.parametrize("stack", STACKS)
async def test_another_layout_is_refused(stack: str, seed: int) -> None:
    medium, _ = await written(stack, random.Random(seed))
    labels = [page for page in medium.pages if page >= PAGES]
    label = medium.pages[max(labels)]
    for pages, number in ((PAGES, max(labels)), (PAGES * 2, 0)):
        other = Medium({**medium.pages, number: label})
        store_pages = Geometry(pages)
        if pages == PAGES:
            await (await open_over(other, stack, store_pages)).aclose()
            continue
        await open_over(asked := Medium(), stack, store_pages)
        assert asked.asked
        assert asked.asked.page_count
        other.pages[asked.asked.page_count - 1] = label
        with pytest.raises(StoreFailedError, match=f"{PAGES} pages"):
            await open_over(other, stack, store_pages)


@pytest.mark.parametrize("stack", STACKS)
async def test_a_flush_survives_kills_and_leaves_one_truth(stack: str, seed: int) -> None:
    rng = random.Random(seed)
    medium, history = Medium(), History(rng, 12)
    for _ in range(40):
        medium.cut = medium.changes + rng.randrange(1, 30)
        store = await open_over(medium, stack, Geometry(PAGES))
        with contextlib.suppress(Killed):
            while True:
                await history.step(store)
    medium.cut = -1
    store = await open_over(medium, stack, Geometry(PAGES))
    await history.check(store)
    old = dict(medium.pages)
    data = rng.randbytes(PAGE)
    await write(store, 1, data)
    await store.flush()  # from here on the old content is as wrong as any other
    for page, was in old.items():
        if page == 1:
            medium.pages[page] = was
    if 1 in old:
        again = await open_over(medium, stack, Geometry(PAGES))
        assert await lost(again, [0, 1, 2]) == [1]


@pytest.mark.parametrize("stack", STACKS)
async def test_few_leaves_in_memory(stack: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CACHE_BYTES", 0)
    pages = 40_000
    rng = random.Random(seed)
    medium = Medium()
    store = await open_over(medium, stack, Geometry(pages))
    model: dict[int, bytes] = {}

    async def live(lane: int) -> None:
        for _ in range(80):
            page = rng.randrange(pages // 6) * 6 + lane
            data = content(rng, 1)
            await write(store, page, data)
            model[page] = data
            known = rng.choice([page for page in model if page % 6 == lane])
            assert await read(store, known) == model[known]

    await asyncio.gather(*(live(lane) for lane in range(6)))
    kept = store.tail._leaves  # type: ignore[attr-defined]
    assert len(kept) < 12
    for again in (store, await open_over(medium, stack, Geometry(pages))):
        for page, data in model.items():
            assert await read(again, page) == data
        await store.aclose()
    await again.discard(0, pages)
    await again.flush()
    assert len(medium.pages) == 1, "room is not given back"


def test_room_for_records_adds_up() -> None:
    for size, record in ((4096, 8), (4096, 56), (65536, 56), (1 << 21, 8), (4096, 1)):
        for total in (*range(1, 3000), 10**6, 1 << 32):
            pages = Tail.fitting(total, record, size)
            assert pages == 0 or pages + Tail.pages_needed(pages, record, size) <= total
            assert pages + 1 + Tail.pages_needed(pages + 1, record, size) > total


async def test_records_change_together_and_a_failed_write_takes_none_along(seed: int) -> None:
    """Records of one leaf, changed at once, are all there; who fails, fails alone."""
    rng = random.Random(seed)
    medium = Medium()
    inner = MediumStore(medium, Geometry(200))
    records = Tail(inner, 100, 16)
    await records.open("test", lambda salt: salt, "")
    wanted: dict[int, bytes] = {}

    async def change(page: int) -> None:
        held = await records.hold([range(page, page + 1)], changing=True)
        wanted[page] = rng.randbytes(16)
        try:
            await records.put([(page, wanted[page])])
        except StoreFailedError:
            await records.put([(page, wanted[page])])
        finally:
            records.release(held)

    medium.fail = medium.calls + 3
    await asyncio.gather(*(change(page) for page in range(100)))
    assert medium.calls < 50, "each was written for itself"
    again = Tail(inner, 100, 16)
    await again.open("test", lambda salt: salt, "")
    held = await again.hold([range(100)])
    assert again.get(0, 100) == b"".join(wanted[page] for page in range(100))
    again.release(held)


async def test_a_lost_leaf_loses_its_pages_until_they_are_written(seed: int) -> None:
    rng = random.Random(seed)

    class Losing(MediumStore):
        losing = -1

        async def read(self, runs: list[Run]) -> None:  # type: ignore[override]
            if any(run.index == self.losing for run in runs):
                raise PageLostError("is gone", store="medium", page=self.losing)
            await super().read(runs)

    medium, data = await written("checksum::", rng)
    inner = Losing(medium, Geometry(PAGES + 3))
    store = await open_over(medium, "checksum::", Geometry(PAGES))
    store._inner = store.tail._inner = inner  # type: ignore[attr-defined]
    inner.losing = PAGES
    assert await lost(store, range(20)) == list(range(20))
    await write(store, 3, data[:PAGE])
    inner.losing = -1
    assert await lost(store, range(20)) == [page for page in range(20) if page != 3]


@pytest.mark.parametrize("stack", STACKS)
def test_a_flipped_byte_is_a_bus_error_for_who_touches_it(stack: str) -> None:
    env = {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":handle_sigbus=0"}
    source = proof.call(kernel_scenarios.touch_a_damaged_page, stack=completed(stack))
    with proof.Child(source, env=env) as child:
        assert child.wait() == -7, child.err
        assert child.out == "touches\n"
