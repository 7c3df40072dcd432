"""A namespace that is lost and comes back: nothing fails before the time is up, nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

import pytest

from nvme_remote import NGUID, NQN, Cached, Proxy, served, started, url
from proof import SLOW
from userswap.backends.harness import content, read, write
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp import lease, reconnect
from userswap.backends.nvme_tcp.lease import Record
from userswap.backends.nvme_tcp.server import serve
from userswap.backends.nvme_tcp.store import NvmeStore
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    PageLostError,
    Run,
    StoreError,
    StoreFailedError,
    TransientError,
)

PAGES = 64
SOON = {"reconnect_delay": "10ms"}


async def opened(address: tuple[str, int], **options: object) -> NvmeStore:
    store = await open_stack(url(address, **{**SOON, **options}), Geometry(PAGES))
    assert isinstance(store, NvmeStore)
    return store


async def within(seconds: float, condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(seconds * SLOW):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def page(index: int, version: int) -> bytes:
    return content(1000 * version + 7, index, 4096)


async def history(store: NvmeStore, seed: int, steps: int) -> dict[int, int]:
    """Pages written, read and discarded, several at once; which version each has at the end."""
    rng = random.Random(seed)
    known = dict.fromkeys(range(PAGES), 0)

    async def step(index: int, what: float, version: int) -> None:
        if what < 0.5:
            await write(store, index, page(index, version))
            known[index] = version
        elif what < 0.55:
            await store.discard(index, 1)
            known[index] = 0
        else:
            await expect(store, known, index)

    for version in range(1, steps):
        some = rng.sample(range(PAGES), 16)
        await asyncio.gather(*(step(index, rng.random(), version) for index in some))
        if rng.random() < 0.1:
            await store.flush()
    return known


async def expect(store: NvmeStore, known: dict[int, int], index: int) -> None:
    version = known[index]
    expected = page(index, version) if version else bytes(4096)
    assert await read(store, index) == expected, f"page {index} is not version {version}"


@pytest.mark.parametrize("digests", ["off", "on"])
async def test_cuts_at_any_byte(digests: str, seed: int) -> None:
    rng = random.Random(seed)
    sizes = (300, 5000, 100_000, 400_000, 1_000_000)
    async with (
        served() as server,
        Proxy(server.address[1]) as proxy,
    ):
        store = await opened(proxy.address, hdr_digest=digests, data_digest=digests)
        proxy.cuts = lambda: rng.randrange(1, rng.choice(sizes))
        proxy.cut()
        known = await history(store, seed, 120)
        proxy.cuts = lambda: None
        proxy.cut()
        for index in known:
            await expect(store, known, index)
        assert store.counters.reconnected > 5
        assert store.counters.requeued > 0
        await store.aclose()


async def test_a_target_that_is_started_again(caplog: pytest.LogCaptureFixture, seed: int) -> None:
    medium = MemoryStore(1024)
    server = await started(medium)
    port = server.address[1]
    store = await opened(server.address)
    task = asyncio.create_task(history(store, seed, 150))
    for _ in range(3):
        before = store.counters.reconnected
        await server.stop()
        await asyncio.sleep(0.05)
        server = await started(medium, port=port)
        await within(20, lambda before=before: store.counters.reconnected > before)
    known = await task
    for index in known:
        await expect(store, known, index)
    assert store.counters.lost == store.counters.reconnected >= 3
    said = [record.getMessage() for record in caplog.records if record.name == "userswap.nvme"]
    assert any("lost (" in line and "commands wait" in line for line in said), said
    assert any("back after" in line for line in said)
    await store.aclose()
    said = [record.getMessage() for record in caplog.records if record.name == "userswap.nvme"]
    assert f"lost {store.counters.lost} times" in said[-1]
    await server.stop()


async def test_a_cache_that_loses_its_power(seed: int) -> None:
    """What was answered is there, though the target forgot it; flushed or not."""
    medium = Cached(1024)
    server = await started(medium)
    port = server.address[1]
    store = await opened(server.address)
    forgotten = 0
    task = asyncio.create_task(history(store, seed, 400))
    for _ in range(4):
        await asyncio.sleep(0.1)
        before = store.counters.reconnected
        forgotten += medium.lose_power()
        await server.stop()
        medium.regain_power()
        server = await started(medium, port=port)
        await within(20, lambda before=before: store.counters.reconnected > before)
    known = await task
    for index in known:
        await expect(store, known, index)
    assert forgotten > 0
    assert store.counters.rewritten > 0
    await store.aclose()
    await server.stop()


async def test_what_is_kept_for_a_volatile_cache_is_bounded() -> None:
    medium = Cached(1 << 13)
    async with served(medium) as server:
        store = await open_stack(url(server.address), Geometry(6016))
        assert isinstance(store, NvmeStore)
        kept = store._namespace.unflushed
        assert kept is not None
        data = bytearray(64 * 4096)
        most = 0
        for round_ in range(3):
            for index in range(0, 6016, 64):
                data[:8] = (round_ * 10_000 + index).to_bytes(8)
                await write(store, index, data)
                most = max(most, kept.size)
        assert medium.flushes > 3
        assert most <= (16 << 20) + len(data)
        await store.flush()
        assert kept.size == 0
        await store.aclose()


async def test_everybody_waits_and_then_fails() -> None:
    async with served() as server:
        store = await opened(server.address, ctrl_loss_tmo="2s")
        await write(store, 3, page(3, 1))
    reads = [asyncio.create_task(read(store, index)) for index in range(8)]
    await within(20, lambda: store.counters.attempts > 2)
    assert not any(task.done() for task in reads)
    for task in reads:
        with pytest.raises(StoreFailedError, match="ctrl_loss_tmo=2s is over"):
            await task
    for call in (read(store, 1), write(store, 1, page(1, 1)), store.flush(), store.discard(1, 1)):
        with pytest.raises(StoreFailedError, match="is over"):
            await call
    await store.aclose()


async def test_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes, and nobody says so: keep-alive tells."""
    async with served() as server, Proxy(server.address[1]) as proxy:
        store = await opened(proxy.address, keep_alive_tmo="1s")
        await write(store, 5, page(5, 1))
        proxy.stall()
        late = asyncio.create_task(read(store, 5))
        await within(20, lambda: store.counters.lost == 1)
        proxy.cut()
        proxy.flow()
        assert await late == page(5, 1)
        assert store.counters.requeued == 1
        await store.aclose()


async def test_a_silent_write_is_not_overtaken() -> None:
    """A write that a lost connection may still deliver comes before the next one of its page."""
    async with served() as server, Proxy(server.address[1]) as proxy:
        store = await opened(proxy.address, keep_alive_tmo="1s")
        await write(store, 4, page(4, 1))
        proxy.stall()
        second = asyncio.create_task(write(store, 5, page(5, 2)))
        await within(20, lambda: store.counters.lost == 1)
        now = asyncio.get_running_loop().time
        lost = now()
        proxy.cut()
        proxy.flow()
        await second
        third = asyncio.create_task(write(store, 5, page(5, 3)))
        assert await read(store, 5) in (page(5, 2), page(5, 3))
        await write(store, 6, page(6, 3))
        assert not (third.done() and store._unsettled)
        await third
        assert not store._unsettled
        assert now() - lost > 1.5  # of twice the keep_alive_tmo
        assert await read(store, 5) == page(5, 3)
        await store.aclose()


async def test_a_namespace_that_is_gone_and_back() -> None:
    async with served() as server:
        store = await opened(server.address)
        await write(store, 1, page(1, 1))
        namespace = server.target.namespaces[1]
        server.target.set_namespace(1, None)
        server.settle()
        await within(20, lambda: store.counters.lost == 1)
        late = [asyncio.create_task(read(store, 1)), asyncio.create_task(store.flush())]
        await within(20, lambda: store.counters.attempts > 1)
        assert not any(task.done() for task in late)
        server.target.set_namespace(1, namespace)
        assert await late[0] == page(1, 1)
        await late[1]
        await store.aclose()


async def test_another_namespace_in_its_place() -> None:
    async with served() as server:
        port = server.address[1]
        store = await opened(server.address)
        await write(store, 1, page(1, 1))
    other = await serve(MemoryStore(1024), nqn=NQN, listen=("127.0.0.1", port))
    with pytest.raises(StoreFailedError, match="its target was started without its data"):
        await read(store, 1)
    await store.aclose()
    await other.stop()


async def test_a_namespace_that_forgot_everything() -> None:
    """It says that it is the same, and is empty."""
    async with served() as server:
        port = server.address[1]
        store = await opened(server.address)
        await write(store, 1, page(1, 1))
    assert NGUID
    other = await started(MemoryStore(1 << 14), port=port)
    with pytest.raises(StoreFailedError, match="come back without what was written to it"):
        await read(store, 1)
    await store.aclose()
    await other.stop()


async def test_a_cancelled_read_leaves_its_buffer_alone(seed: int) -> None:
    """Wherever its answer is, on the wire or in the middle of the buffer."""
    rng = random.Random(seed)
    async with served() as server, Proxy(server.address[1]) as proxy:
        store = await opened(proxy.address)
        count = 64
        for index in range(count):
            await write(store, index, page(index, 1))
        for _ in range(30):
            proxy.stall()
            buffer = bytearray(count * 4096)
            task = asyncio.create_task(store.read([Run(0, memoryview(buffer))]))
            await asyncio.sleep(0)
            proxy.flow()
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            noise = bytes([rng.randrange(256)]) * len(buffer)
            buffer[:] = noise
            assert await read(store, 7) == page(7, 1)
            assert buffer == noise
        await store.aclose()


async def test_a_write_follows_a_cancelled_one() -> None:
    async with served() as server, Proxy(server.address[1]) as proxy:
        store = await opened(proxy.address)
        await write(store, 9, page(9, 1))
        for version in range(2, 12):
            proxy.stall()
            data = bytearray(page(9, version))
            task = asyncio.create_task(write(store, 9, data))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            data[:] = b"\xee" * len(data)
            after = asyncio.create_task(write(store, 9, page(9, version + 100)))
            await asyncio.sleep(0.01)
            assert not after.done()
            if version % 2:
                proxy.cut()
            proxy.flow()
            await after
            assert await read(store, 9) == page(9, version + 100)
        await store.aclose()


class Moody(Cached):
    """Says that it cannot at the moment, or that it cannot at all."""

    def __init__(self) -> None:
        super().__init__(1024)
        self.mood: StoreError | None = None
        self.asked = 0

    async def read(self, runs: Sequence[Run]) -> None:
        self._ask()
        await super().read(runs)

    async def write(self, runs: Sequence[Run]) -> None:
        self._ask()
        await super().write(runs)

    def _ask(self) -> None:
        if self.mood is not None:
            self.asked += 1
            raise self.mood


async def test_a_target_that_cannot_at_the_moment() -> None:
    medium = Moody()
    async with served(medium) as server:
        store = await opened(server.address)
        await write(store, 1, page(1, 1))
        medium.mood = TransientError("later", store="moody")
        late = asyncio.create_task(read(store, 1))
        await within(20, lambda: medium.asked > 20)
        assert not late.done()
        medium.mood = None
        assert await late == page(1, 1)
        assert store.counters.retried > 20
        assert store.counters.lost == 0
        await store.aclose()
        store = await opened(server.address, ctrl_loss_tmo="200ms")
        medium.mood = TransientError("later", store="moody")
        with pytest.raises(TransientError, match="interrupted"):
            await read(store, 1)
        medium.mood = None
        assert await read(store, 1) == page(1, 1)
        await store.aclose()


async def test_what_cannot_be_restored_yet() -> None:
    """A target that is back, but does not take what has to be written again."""
    medium = Moody()
    async with served(medium) as server, Proxy(server.address[1]) as proxy:
        store = await opened(proxy.address)
        for index in range(PAGES):
            await write(store, index, page(index, 1))
        medium.mood = PageLostError("is bad", store="moody", page=0)
        proxy.cut()
        late = asyncio.create_task(read(store, 1))
        await within(20, lambda: store.counters.attempts > 5)
        assert not late.done()
        medium.mood = None
        assert await late == page(1, 1)
        await store.aclose()
        names = [str(task.get_coro()) for task in asyncio.all_tasks()]
        assert not [name for name in names if "must" in name]


# --- whose it is ---


async def test_another_host_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served() as server:
        store = await opened(server.address)
        await write(store, 1, page(1, 1))
        first, blocks = server.target.namespaces[1].blocks - 1, 1
        assert blocks
        found = bytearray(4096)
        await server.blocks.store.read([Run(first, memoryview(found))])
        ours = Record.parse(bytes(found))
        assert ours is not None
        theirs = Record(bytes(16), 9, ours.holder).pack()
        await server.blocks.store.write([Run(first, memoryview(theirs))])
        await within(20, lambda: store._path.error is not None)
        with pytest.raises(StoreFailedError, match="was taken by process"):
            await read(store, 1)
        await store.aclose()


async def test_who_stood_still_looks_before_it_writes() -> None:
    """A process that was stopped cannot know what happened meanwhile."""
    async with served() as server:
        store = await opened(server.address)
        await write(store, 1, page(1, 1))
        last = server.target.namespaces[1].blocks - 1
        theirs = Record(b"x" * 16, 9, lease.Process("another boot", 4, 5, 6, "elsewhere")).pack()
        await server.blocks.store.write([Run(last, memoryview(theirs))])
        store._namespace.lease._renewed -= lease.FRESH_S
        with pytest.raises(StoreFailedError, match="was taken by process 4 of elsewhere"):
            await write(store, 1, page(1, 2))
        found = bytearray(4096)
        await server.blocks.store.read([Run(1, memoryview(found))])
        assert found == page(1, 1)
        await store.aclose()


async def test_a_holder_elsewhere_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of which nothing is known is believed dead when it stays silent."""
    monkeypatch.setattr(lease, "WATCH_S", 0.6)
    holder = lease.Process("another boot", 4, 5, 6, "elsewhere")
    async with served() as server:
        last = server.target.namespaces[1].blocks - 1
        medium = server.blocks.store

        async def put(counter: int) -> None:
            page = Record(b"x" * 16, counter, holder).pack()
            await medium.write([Run(last, memoryview(page))])

        async def renew() -> None:
            for counter in range(1 << 30):
                await put(counter)
                await asyncio.sleep(0.05)

        renewing = asyncio.create_task(renew())
        with pytest.raises(StoreError, match="is in use by process 4 of elsewhere"):
            await opened(server.address)
        renewing.cancel()
        await asyncio.wait([renewing])
        store = await opened(server.address)
        await write(store, 1, page(1, 1))
        await store.aclose()


async def test_counters_begin_at_zero() -> None:
    async with served() as server:
        store = await opened(server.address)
        assert store.counters == reconnect.Counters()
        await store.aclose()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "userswap.nvme")
