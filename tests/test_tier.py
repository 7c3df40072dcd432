"""tier:: has every page in one place that counts, whatever happens to both stores at once."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from media import PAGE, History, Medium, MediumStore, content, lost, read, write
from userswap.backends.filters.tier import TierFilter
from userswap.backends.grammar import GrammarError
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    PageLostError,
    StoreError,
    StoreFailedError,
    StoreFullError,
    TransientError,
)

PAGES = 200


class Pair:
    """A tier over two media, whose operations take random numbers of turns."""

    def __init__(self, rng: random.Random, limit: int, *, turns: int = 12) -> None:
        self.fast, self.slow = Medium(), Medium()
        self.limit = limit
        self.fast.pace = lambda: rng.randrange(1, turns)
        self.slow.pace = lambda: rng.randrange(1, 3 * turns)

    def open(self) -> TierFilter:
        fast = MediumStore(self.fast, Geometry(PAGES))
        slow = MediumStore(self.slow, Geometry(PAGES))
        return TierFilter(fast, slow, self.limit)


@pytest.mark.parametrize("limit", [1, 5, 20, 64, 1000])
async def test_callers_at_once_see_what_a_model_sees(limit: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        pair = Pair(rng, limit)
        store = pair.open()
        end = asyncio.Event()

        async def live(lane: int, store: TierFilter = store) -> dict[int, bytes]:
            own: dict[int, bytes] = {}
            for _ in range(120):
                page = rng.randrange(PAGES // 20) * 20 + lane * 4
                count = rng.randrange(1, 5)
                pages = range(page, page + count)
                if (choice := rng.random()) < 0.35:
                    data = content(rng, count)
                    await write(store, page, data)
                    own |= {p: data[i * PAGE : (i + 1) * PAGE] for i, p in enumerate(pages)}
                elif choice < 0.42:
                    await store.discard(page, count)
                    own |= dict.fromkeys(pages, bytes(PAGE))
                else:
                    wanted = b"".join(own.get(p, bytes(PAGE)) for p in pages)
                    assert await read(store, page, count) == wanted
            return own

        async def flush(store: TierFilter = store, end: asyncio.Event = end) -> None:
            while not end.is_set():
                await store.flush()
                await asyncio.sleep(0.001)

        flushing = asyncio.ensure_future(flush())
        owned = await asyncio.gather(*(live(lane) for lane in range(5)))
        end.set()
        await flushing
        assert len(store._placed.kept) <= limit
        await store.flush()
        for own in owned:
            for page, data in own.items():
                assert await read(store, page) == data
                assert pair.slow.pages.get(page, bytes(PAGE)) == data
        await store.aclose()


@pytest.mark.parametrize("error", [TransientError, StoreFullError])
@pytest.mark.parametrize("failing", ["fast", "slow"])
async def test_every_call_of_either_store_failing_once(
    failing: str, error: type[StoreError], seed: int
) -> None:
    for number in range(1, 1000):
        rng = random.Random(seed)
        pair = Pair(rng, 6, turns=3)
        medium = getattr(pair, failing)
        medium.fail, medium.error = number, error
        store = pair.open()
        history = History(rng, 16)
        for _ in range(60):
            with contextlib.suppress(error):
                await history.step(store)
        await store._placed.settled()
        unseen = medium.calls < number
        medium.fail = -1
        await history.check(store)
        await store.flush()
        await history.check(MediumStore(pair.slow, Geometry(PAGES)))
        if unseen:
            assert number > 20
            return
    raise AssertionError("the history does not end")


async def test_cancelled_anywhere(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, 6, turns=4)
    store = pair.open()
    history = History(rng, 16)
    for _ in range(800):
        task = asyncio.ensure_future(history.step(store))
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
        if rng.random() < 0.7:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if rng.random() < 0.2:
            await store._placed.settled()
            await history.check(store)
    await history.check(store)
    await store.aclose()
    await history.check(pair.open())


async def test_what_was_flushed_survives_a_kill(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        pair = Pair(rng, 6, turns=3)
        store = pair.open()
        since: dict[int, list[bytes]] = {}
        for step in range(rng.randrange(20, 80)):
            page = rng.randrange(16)
            if step % 15 == 14:
                await store.flush()
                since = {page: [each[-1]] for page, each in since.items()}
            else:
                data = content(rng, 1)
                await write(store, page, data)
                since.setdefault(page, [bytes(PAGE)]).append(data)
        await store._placed.stop()
        pair.fast.pages.clear()
        again = pair.open()
        for page, may in since.items():
            assert await read(again, page) in may


async def test_idle_pages_leave_and_pages_in_use_come_back(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, 32, turns=2)
    store = pair.open()
    data = {page: rng.randbytes(PAGE) for page in range(100)}
    for page, one in data.items():
        await write(store, page, one)
        await store._placed.settled()
    assert 24 <= len(store._placed.kept) <= 32
    newest = range(100 - len(store._placed.kept), 100)
    assert set(store._placed.kept) == set(newest), "not the oldest went"
    for _ in range(3):
        for page in range(10):
            assert await read(store, page) == data[page]
            await store._placed.settled()
    assert store._placed.kept.keys() >= set(range(10))
    calls = pair.slow.calls
    for page in range(10):
        assert await read(store, page) == data[page]
    assert pair.slow.calls == calls, "pages in use are read from the slow store"
    for page in range(40, 90):  # once is no use
        await read(store, page)
    await store._placed.settled()
    assert store._placed.kept.keys() >= set(range(10))


async def test_a_fast_store_that_is_full_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    url = "tier?fast=ram:none%3Flimit=1MiB::memory:"
    store = await open_stack(url, Geometry(2000))
    assert isinstance(store, TierFilter)
    data = {page: rng.randbytes(PAGE) for page in range(1000)}
    for page, one in data.items():
        await write(store, page, one)
    assert 100 < len(store._placed.kept) < 260
    for page, one in data.items():
        assert await read(store, page) == one
    await store.aclose()


async def test_a_page_that_the_fast_store_lost(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, 64, turns=2)
    store = pair.open()
    data = rng.randbytes(8 * PAGE)
    await write(store, 0, data)
    await store.flush()  # clean: the slow store has them too
    await write(store, 3, data[:PAGE])
    real = store._fast.read

    async def losing(runs: list[object]) -> None:
        for run in runs:
            if 3 in range(run.index, run.index + run.buffer.nbytes // PAGE):  # type: ignore[attr-defined]
                raise PageLostError("is gone", store="fast", page=3)
        await real(runs)  # type: ignore[arg-type]

    store._fast.read = losing  # type: ignore[method-assign,assignment]
    assert await lost(store, range(8)) == [3]
    await write(store, 5, data[:PAGE])
    with pytest.raises(PageLostError):
        await store.flush()
    assert pair.slow.pages[5] == data[:PAGE], "a lost page kept another from being flushed"
    await write(store, 3, data[:PAGE])
    store._fast.read = real  # type: ignore[method-assign]
    await store.flush()
    assert pair.slow.pages[3] == data[:PAGE]


async def test_a_slow_store_that_fails_keeps_the_fast_pages(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, 16, turns=2)
    store = pair.open()
    data = {page: rng.randbytes(PAGE) for page in range(12)}
    for page, one in data.items():
        await write(store, page, one)
    pair.slow.error, pair.slow.fail = StoreFailedError, pair.slow.calls + 1
    await write(store, 12, data[0])
    with contextlib.suppress(StoreFailedError):
        for page in range(13, 40):
            pair.slow.fail = pair.slow.calls + 1
            await write(store, page, data[0])
    for page, one in data.items():
        assert await read(store, page) == one


async def test_promises_and_options() -> None:
    store = await open_stack("tier?fast=ram:lz4&limit=25%25::checksum::memory:", Geometry(100))
    assert isinstance(store, TierFilter)
    assert (store.durable, store.checked, store.encrypted) == (False, False, False)
    assert store.space.startswith("compressed in this process's memory")
    assert "over" in store.space
    assert store._placed._limit == 25
    for url, message in (
        ("tier::memory:", "needs fast=URL"),
        ("tier?fast=rma:lz4::memory:", "did you mean 'ram'"),
        ("tier?fast=ram:lz4&speed=1::memory:", "unknown option 'speed'"),
    ):
        with pytest.raises(GrammarError, match=message):
            await open_stack(url, Geometry(100))
