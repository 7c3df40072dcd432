"""A store exported over real sockets: what hosts are answered, and what they can do to each other.

The host here is the protocol's machine over a blocking socket, on a thread beside the server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from daemons import wait_for
from nvme import HOST, SUBSYSTEM, with_digests
from nvme_socket import PAGES, EndedError, Host, exported
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp.command import Status, code_of
from userswap.backends.nvme_tcp.identify import DISCOVERY_NQN
from userswap.backends.nvme_tcp.server import Rules, Server, check_exposure, serve
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    TransientError,
)


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("page_size", [4096, 65536])
@pytest.mark.parametrize("digests", [False, True])
async def test_blocks_are_what_was_written(
    block: int, page_size: int, digests: bool, seed: int
) -> None:
    rng = random.Random(seed)
    blocks = 4096
    model = bytearray(blocks * block)

    def work(server: Server) -> None:
        with Host(server.address, options=with_digests(digests, digests)) as host:
            for _ in range(150):
                count = rng.choice((1, 1, 2, 3, 8, 17, 64, 256))
                first = rng.randrange(blocks - count + 1)
                place = slice(first * block, (first + count) * block)
                match rng.randrange(5):
                    case 0 | 1:
                        model[place] = data = rng.randbytes(count * block)
                        host.write(first, data, block=block, fua=rng.random() < 0.1)
                    case 2:
                        assert host.read(first, count, block=block) == model[place]
                    case 3:
                        model[place] = bytes(count * block)
                        assert host.do(nvme.write_zeroes(1, first, count)) == 0
                    case 4:
                        model[place] = bytes(count * block)
                        command, data = nvme.deallocate(1, [(first, count)])
                        assert host.do(command, data) == 0
            assert host.do(nvme.flush(1)) == 0
            for first in range(0, blocks, 256):
                place = slice(first * block, (first + 256) * block)
                assert host.read(first, 256, block=block) == model[place]

    store = MemoryStore(blocks * block // page_size, page_size=page_size)
    await exported(work, store, block_size=block)


async def test_a_native_store_is_exported_too() -> None:
    def work(server: Server) -> None:
        with Host(server.address) as host:
            host.write(7, b"x" * 8192)
            assert host.read(6, 4) == bytes(4096) + b"x" * 8192 + bytes(4096)

    await exported(work, await open_stack("ram:lz4", Geometry(PAGES)))


async def test_discovery_names_the_subsystem_and_where_it_was_reached() -> None:
    def work(server: Server) -> None:
        with Host(server.address, subsystem=DISCOVERY_NQN) as host:
            (entry,) = host.found.entries  # type: ignore[attr-defined]
            where, port = server.address
            assert (entry.subsystem, entry.address, entry.service) == (SUBSYSTEM, where, str(port))

    await exported(work)


async def test_only_hosts_that_are_allowed_connect() -> None:
    rules = Rules(hosts=frozenset({"nqn.2026-01.test:friend"}))

    def work(server: Server) -> None:
        for subsystem in (SUBSYSTEM, DISCOVERY_NQN):
            with pytest.raises(EndedError, match="connect invalid host"):
                Host(server.address, subsystem=subsystem)
        with Host(server.address, name="nqn.2026-01.test:friend") as host:
            assert host.read(0) == bytes(4096)

    await exported(work, rules=rules)


async def test_errors_of_the_store_are_told_by_status() -> None:
    def work(server: Server) -> None:
        with Host(server.address) as host:
            host.write(0, b"x" * 4096)
            full = host.do(nvme.write(1, 1, 200), bytes(range(256)) * 3200)
            assert code_of(full) == Status.CAPACITY_EXCEEDED
            assert not nvme.retryable(full)
            assert host.read(0) == b"x" * 4096

    await exported(work, MemoryStore(PAGES, limit=10 * 4096))


class Picky(MemoryStore):
    """Fails where it is told to, and holds its callers to the contract while they overlap."""

    def __init__(self, pages: int, **options: int) -> None:
        super().__init__(pages, **options)
        self.errors: dict[int, StoreError] = {}
        """By page."""
        self.calls: list[str] = []
        self.called = asyncio.Condition()
        self.pause = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self._busy: list[tuple[range, bool]] = []

    def read_now(self, runs: Sequence[Run]) -> bool:
        return False

    async def _work(self, name: str, pages: range, changes: bool) -> None:
        self.calls.append(name)
        async with self.called:
            self.called.notify_all()
        met = [(other, both) for other, both in self._busy if range_of(other, pages)]
        assert not any(changes or changed for _, changed in met), f"{name} {pages} meets {met}"
        self._busy.append((pages, changes))
        try:
            await asyncio.sleep(self.pause)
            await self.gate.wait()
            for page in pages:
                if page in self.errors:
                    raise self.errors[page]
        finally:
            self._busy.remove((pages, changes))

    async def read(self, runs: Sequence[Run]) -> None:
        for run in runs:
            await self._work("read", span(self, run), False)
        MemoryStore.read_now(self, runs)

    async def write(self, runs: Sequence[Run]) -> None:
        for run in runs:
            await self._work("write", span(self, run), True)
        await super().write(runs)

    async def discard(self, index: int, count: int) -> None:
        await self._work("discard", range(index, index + count), True)
        await super().discard(index, count)

    async def flush(self) -> None:
        await self._work("flush", range(0), False)


def span(store: Store, run: Run) -> range:
    return range(run.index, run.index + run.buffer.nbytes // store.page_size)


def range_of(one: range, other: range) -> range:
    """What two ranges have in common."""
    return range(max(one.start, other.start), min(one.stop, other.stop))


async def test_only_the_block_that_is_lost_cannot_be_read() -> None:
    store = Picky(PAGES)
    store.errors[3] = PageLostError("is gone", store="picky", page=3)
    store.errors[5] = TransientError("is busy", store="picky", page=5)
    store.errors[7] = StoreFailedError("is broken", store="picky", page=7)
    expected = {3: Status.UNRECOVERED_READ, 5: Status.INTERRUPTED, 7: Status.INTERNAL_ERROR}

    def work(server: Server) -> None:
        with Host(server.address) as host:
            buffer = memoryview(bytearray(4096))
            found = {page: host.do(nvme.read(1, page, 1), into=buffer) for page in range(9)}
            codes = {page: code_of(status) for page, status in found.items() if status}
            assert codes == expected
            assert [page for page in codes if nvme.retryable(found[page])] == [5]
            assert code_of(host.do(nvme.read(1, 2, 3), into=memoryview(bytearray(3 * 4096)))) == (
                Status.UNRECOVERED_READ
            )
            assert code_of(host.do(nvme.write(1, 5, 1), bytes(4096))) == Status.INTERRUPTED

    await exported(work, store)


async def test_commands_that_meet_on_a_page_take_turns(seed: int) -> None:
    rng = random.Random(seed)
    store = Picky(8)
    store.pause = 0.0002
    block = 512
    wrote: dict[int, set[bytes]] = {at: {bytes(block)} for at in range(64)}

    def work(server: Server) -> None:
        with Host(server.address) as host:
            host.add_queue()
            for _ in range(40):
                sent = [0, 0]
                for number in range(24):
                    count = rng.randrange(1, 17)
                    first = rng.randrange(64 - count + 1)
                    at = number % 2
                    sent[at] += 1
                    match rng.randrange(4):
                        case 0:
                            into = memoryview(bytearray(count * block))
                            host.submit(nvme.read(1, first, count), into=into, at=at)
                        case 1:
                            host.submit(nvme.write_zeroes(1, first, count), at=at)
                        case _:
                            data = rng.randbytes(block)
                            host.submit(nvme.write(1, first, count), data * count, at=at)
                            for each in range(first, first + count):
                                wrote[each].add(data)
                for at in (0, 1):
                    assert set(host.finish(sent[at], at).values()) == {0}
            for at in range(64):
                assert host.read(at, block=block) in wrote[at]

    await exported(work, store, block_size=block)


async def test_a_flush_covers_what_was_answered_and_is_shared() -> None:
    store = Picky(PAGES)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(server: Server) -> None:
        with Host(server.address) as host:
            host.write(1, bytes(4096))
            loop.call_soon_threadsafe(store.gate.clear)
            for _ in range(9):
                host.submit(nvme.flush(1))
            loop.call_soon_threadsafe(asked.set)
            host.finish(9)
            host.write(1, bytes(4096), fua=True)

    async def open_the_gate() -> None:
        await asked.wait()
        async with store.called:
            await store.called.wait_for(lambda: store.calls == ["write", "flush"])
        store.gate.set()

    opening = asyncio.create_task(open_the_gate())
    await exported(work, store)
    await opening
    # The nine flushes became two: the one that had begun, and one for all who asked after that.
    assert store.calls in (
        ["write", "flush", "flush", "write", "flush", "flush"],
        ["write", "flush", "write", "flush", "flush"],
    )


async def test_the_end_waits_for_what_is_in_the_store_and_flushes() -> None:
    store = Picky(PAGES)
    store.gate.clear()
    server = await serve(store, nqn=SUBSYSTEM, listen=("127.0.0.1", 0))
    host = await asyncio.to_thread(Host, server.address)
    host.submit(nvme.write(1, 4, 1), b"x" * 4096)
    async with store.called:
        await store.called.wait_for(lambda: store.calls)
    stopping = asyncio.create_task(server.stop())
    with pytest.raises(EndedError):
        await asyncio.to_thread(host.finish)
    assert not stopping.done()
    store.gate.set()
    await stopping
    assert store.calls == ["write", "flush"]
    buffer = bytearray(4096)
    await store.read([Run(4, memoryview(buffer))])
    assert buffer == b"x" * 4096
    host.close()
    await server.stop()  # once more does nothing


async def test_what_a_host_left_in_the_store_ends_without_it() -> None:
    store = Picky(PAGES)
    store.gate.clear()
    async with await serve(store, nqn=SUBSYSTEM, listen=("127.0.0.1", 0)) as server:
        host = await asyncio.to_thread(Host, server.address)
        host.submit(nvme.write(1, 4, 1), b"x" * 4096)
        async with store.called:
            await store.called.wait_for(lambda: store.calls)
        host.close()
        assert await asyncio.to_thread(wait_for, lambda: not server.connections)
        store.gate.set()
        await asyncio.wait(server.tasks)
        assert server.stats()["write"] == 1
        assert not server._lingering
    buffer = bytearray(4096)
    await store.read([Run(4, memoryview(buffer))])
    assert buffer == b"x" * 4096


async def test_a_store_that_hangs_collects_few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userswap.backends.nvme_tcp.server.OPERATIONS_IN_ALL", 4)
    store = Picky(PAGES)
    store.gate.clear()
    async with await serve(store, nqn=SUBSYSTEM, listen=("127.0.0.1", 0)) as server:
        for number in range(3):
            host = await asyncio.to_thread(Host, server.address)
            for page in range(6):
                host.submit(nvme.write(1, page + 100 * number, 1), b"x" * 4096)
            assert await asyncio.to_thread(wait_for, lambda: len(store.calls) == 4)
            host.close()
        with await asyncio.to_thread(Host, server.address) as one:
            other = await asyncio.to_thread(Host, server.address, name=HOST + "2")
            for host in (one, other):
                for page in range(6):
                    host.submit(nvme.write(1, page, 1), b"y" * 4096)
            assert len(server.tasks) == 4
            store.gate.set()
            for host in (one, other):
                assert set((await asyncio.to_thread(host.finish, 6)).values()) == {0}
            other.close()
    assert store.calls.count("write") == 4 + 12


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7"])
def test_who_can_be_reached_has_to_say_by_whom(host: str) -> None:
    with pytest.raises(ValueError, match="not authenticated"):
        check_exposure(host, None)
    check_exposure(host, {"nqn.2026-01.test:friend"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is_not_exposed(host: str) -> None:
    check_exposure(host, None)
