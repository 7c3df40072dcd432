"""What filters do where the store under them fails, dies, is reopened or makes promises."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random

import pytest

from media import PAGE, History, Killed, Medium, completed, content, open_over, read, write
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    Store,
    StoreError,
    StoreFullError,
    TransientError,
)

PAGES = 1000
FILTERS = (
    "checksum::",
    "encrypt::",
    "retry::",
    "stats::",
)
SEALED = ("checksum::", "encrypt::")
UNDER = ("memory:", "ram:lz4", "medium")
STACKS = list(itertools.product(FILTERS, UNDER))


async def opened(stack: str, under: str, geometry: Geometry) -> Store:
    if under == "medium":
        return await open_over(Medium(), stack, geometry)
    return await open_stack(completed(stack) + under, geometry)


@pytest.mark.parametrize(("stack", "under"), STACKS)
async def test_disjoint_operations_at_once(stack: str, under: str, seed: int) -> None:
    store = await opened(stack, under, Geometry(PAGES))
    rng = random.Random(seed)

    async def live(lane: int) -> dict[int, bytes]:
        """Own every eighth page, so that all lanes share each page of records."""
        own: dict[int, bytes] = {}
        for _ in range(60):
            page = rng.randrange(PAGES // 8) * 8 + lane
            if rng.random() < 0.6:
                own[page] = content(rng, 1)
                await write(store, page, own[page])
            elif rng.random() < 0.5:
                await store.discard(page, 1)
                own[page] = bytes(PAGE)
            else:
                assert await read(store, page) == own.get(page, bytes(PAGE))
        return own

    for own in await asyncio.gather(*(live(lane) for lane in range(8))):
        for page, data in own.items():
            assert await read(store, page) == data
    await store.aclose()


@pytest.mark.parametrize("stack", FILTERS)
async def test_promises_and_sizes_are_passed_on(stack: str) -> None:
    medium = Medium()
    store = await open_over(medium, stack, Geometry(PAGES))
    assert store.durable
    assert store.space == "a test's medium"
    assert store.checked == (stack in SEALED)
    assert store.encrypted == (stack == "encrypt::")
    assert medium.asked is not None
    assert (medium.asked.page_count == PAGES) == (stack not in SEALED)
    whole = await open_over(Medium(), stack, Geometry())
    assert PAGES < whole.page_count <= 1100
    await write(whole, whole.page_count - 1, b"\x07" * PAGE)
    assert not (await open_stack(f"{completed(stack)}memory:", Geometry(8))).durable


@pytest.mark.parametrize("error", [TransientError, StoreFullError])
@pytest.mark.parametrize("stack", FILTERS)
async def test_every_inner_call_failing_once(
    stack: str, error: type[StoreError], seed: int
) -> None:
    for number in range(1, 1000):
        medium = Medium(fail=number, error=error)
        history = History(random.Random(seed), 12)
        try:
            store = await open_over(medium, stack, Geometry(PAGES))
        except error:
            continue
        for _ in range(60):
            with contextlib.suppress(error):
                await history.step(store)
        unseen = medium.calls < number
        medium.fail = -1
        await history.check(store)
        await history.check(await open_over(medium, stack, Geometry(PAGES)))
        if unseen:
            assert number > 30
            return
    raise AssertionError("the history does not end")


@pytest.mark.parametrize("stack", FILTERS)
async def test_killed_after_every_change(stack: str, seed: int) -> None:
    for cut in range(1000):
        medium = Medium(cut=cut)
        history = History(random.Random(seed), 12)
        store = await open_over(medium, stack, Geometry(PAGES))
        try:
            for _ in range(40):
                await history.step(store)
        except Killed:
            medium.cut = -1
            again = await open_over(medium, stack, Geometry(PAGES))
            await history.check(again)
            for _ in range(20):  # what the kill left is a state to go on from
                await history.step(again)
            await history.check(again)
        else:
            assert cut > 30
            return
    raise AssertionError("the history does not end")


@pytest.mark.parametrize("stack", FILTERS)
async def test_cancelled_anywhere(stack: str, seed: int) -> None:
    rng = random.Random(seed)
    medium = Medium()
    store = await open_over(medium, stack, Geometry(PAGES))
    history = History(rng, 12)
    for _ in range(500):
        task = asyncio.ensure_future(history.step(store))
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
        if rng.random() < 0.7:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await history.check(store)
    await store.aclose()
    await history.check(await open_over(medium, stack, Geometry(PAGES)))
