"""A store exported over real sockets: what hosts are answered, and what they can do to each other.

The host here is the protocol's machine over a blocking socket, on a thread beside the server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TypeVar

import pytest

from nvme import SUBSYSTEM, with_digests
from nvme_socket import EndedError, Host
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp.command import Status, code_of
from userswap.backends.nvme_tcp.identify import DISCOVERY_NQN
from userswap.backends.nvme_tcp.server import Rules, Server, serve
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Store

T = TypeVar("T")
PAGES = 1024


async def exported(work: Callable[[Server], T], store: Store | None = None, **changes: object) -> T:
    """Serve a store while `work` runs on a thread."""
    store = store or MemoryStore(PAGES)
    given = {"nqn": SUBSYSTEM, "listen": ("127.0.0.1", 0), **changes}
    async with await serve(store, **given) as server:  # type: ignore[arg-type]
        result = await asyncio.to_thread(work, server)
    await store.aclose()
    return result


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
