"""A store of a third party on a thread of its own holds up nobody else."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from userswap.backends.memory import MemoryStore
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, PageLostError, Run, Store, StoreFailedError
from userswap.engine import isolation
from userswap.engine.isolation import IsolatedStore, open_isolated

PAGE = 4096


class Blocking(MemoryStore):
    """Blocks its own loop in each read, as a store must not."""

    blocks = threading.Event()

    async def read(self, runs: Sequence[Run]) -> None:
        self.blocks.wait(20)  # the mistake that isolation is for
        await super().read(runs)

    async def flush(self) -> None:
        raise PageLostError("is lost", store="blocking", page=7)

    async def discard(self, index: int, count: int) -> None:
        raise ValueError("a bug")


class Stuck(MemoryStore):
    """Never returns, and writes to the buffers of a read that was given up."""

    def __init__(self) -> None:
        super().__init__(16)
        self.buffers: list[memoryview] = []

    async def read(self, runs: Sequence[Run]) -> None:
        self.buffers += [run.buffer for run in runs]
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        await asyncio.Event().wait()


async def isolated(store: Store) -> IsolatedStore:
    async def opener() -> Store:
        return store

    opened = await open_isolated("test", opener)
    assert isinstance(opened, IsolatedStore)
    return opened


async def test_the_loop_runs_on_while_a_store_blocks() -> None:
    store = await isolated(Blocking(16))
    data = bytearray(b"\x55" * PAGE)
    await store.write([Run(3, memoryview(data))])
    data[:] = bytes(PAGE)
    buffer = bytearray(2 * PAGE)
    reading = asyncio.create_task(store.read([Run(2, memoryview(buffer))]))
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert not reading.done()
    Blocking.blocks.set()
    await reading
    assert bytes(buffer) == bytes(PAGE) + b"\x55" * PAGE
    with pytest.raises(PageLostError) as caught:
        await store.flush()
    assert caught.value.page == 7
    with pytest.raises(StoreFailedError, match="a bug"):
        await store.discard(3, 1)
    await store.aclose()
    await store.aclose()
    with pytest.raises(StoreFailedError, match="closed"):
        await store.flush()


async def test_a_buffer_is_free_when_its_read_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "CLOSE_TIMEOUT_S", 0.2)
    inner = Stuck()
    store = await isolated(inner)
    buffer = bytearray(PAGE)
    reading = asyncio.create_task(store.read([Run(0, memoryview(buffer))]))
    for _ in range(2000):
        if not inner.buffers:
            await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    del reading
    inner.buffers[0].cast("B")[:] = b"\xff" * PAGE
    assert bytes(buffer) == bytes(PAGE)
    buffer.clear()  # refused while anybody exports it
    await store.aclose()


async def test_a_store_that_cannot_be_opened_leaves_no_thread() -> None:
    async def refuse() -> Store:
        raise StoreFailedError("no", store="test")

    with pytest.raises(StoreFailedError, match="no"):
        await open_isolated("test", refuse)
    with pytest.raises(StoreFailedError, match="natively"):
        await open_isolated("test", lambda: open_stack("ram:lz4", Geometry(16)))
