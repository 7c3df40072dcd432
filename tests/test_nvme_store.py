"""A namespace as a store: the contract over loopback, and what may stand in its URL."""

import asyncio
from typing import Any

import pytest

from nvme_remote import NQN, Remote, served, url
from userswap.backends.conformance import CHECKS, Check
from userswap.backends.grammar import GrammarError
from userswap.backends.harness import perform
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp.server import serve
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run, StoreFailedError

DIGESTS = ("off", "off"), ("on", "off"), ("off", "on"), ("on", "on")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("digests", DIGESTS)
@pytest.mark.parametrize("block_size", [512, 4096])
async def test_the_contract(block_size: int, digests: tuple[str, str], check: Check) -> None:
    header, data = digests
    await perform(check, Remote(block_size, hdr_digest=header, data_digest=data))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nvme+tcp:", "needs a namespace"),
        ("nvme+tcp://host:4420", "needs a namespace"),
        (f"nvme+tcp://host:0/{NQN}", "needs a namespace"),
        (f"nvme+tcp://host:65536/{NQN}", "needs a namespace"),
        ("nvme+tcp://host/iqn.1", "'iqn.1' is no NQN"),
        ("nvme+tcp://host/nqn.2014-08.org.nvmexpress.discovery", "userswap nvme discover"),
        ("nvme+tcp://host/nqn.2026-01.a:" + 220 * "b", "is no NQN"),
        (f"nvme+tcp://host/{NQN}?nsid=0", "nsid: '0' is not an integer from 1"),
        (f"nvme+tcp://host/{NQN}?nr_io_queues=0", "nr_io_queues"),
        (f"nvme+tcp://host/{NQN}?queue_size=8", "queue_size: '8' is not an integer from 16"),
        (f"nvme+tcp://host/{NQN}?hdr_digest=true", "hdr_digest: 'true' is neither on nor off"),
        (f"nvme+tcp://host/{NQN}?keep_alive_tmo=5", "keep_alive_tmo: '5' is not a duration"),
        (f"nvme+tcp://host/{NQN}?keep_alive_tmo=20ms", "keep_alive_tmo: 0s, which is none"),
        (f"nvme+tcp://host/{NQN}?hostnqn=me", "hostnqn: 'me' is no NQN"),
        (f"nvme+tcp://host/{NQN}?hostid=7", "hostid: '7' is no UUID"),
        (f"nvme+tcp://host/{NQN}?ctrl_loss_tmo=-1", "ctrl_loss_tmo: '-1' is not a duration"),
        (f"nvme+tcp://host/{NQN}?reconnect_delay=1us", "reconnect_delay: 10ms to 1h"),
        (f"nvme+tcp://host/{NQN}?queue_sise=16", "did you mean 'queue_size'"),
    ],
)
async def test_a_url_that_does_not_read(place: str, said: str) -> None:
    with pytest.raises(GrammarError, match=said):
        await open_stack(place, Geometry(16))


async def test_nobody_listens() -> None:
    async with served() as server:
        nowhere = server.address
    with pytest.raises(StoreFailedError, match="Connection refused"):
        await open_stack(url(nowhere), Geometry(16))


async def test_no_such_namespace_or_subsystem() -> None:
    async with served() as server:
        place = url(server.address).replace("nsid=1", "nsid=2")
        with pytest.raises(StoreFailedError, match="there is no namespace 2"):
            await open_stack(place, Geometry(16))
        with pytest.raises(StoreFailedError, match="connect invalid"):
            await open_stack(url(server.address).replace(NQN, NQN + "-other"), Geometry(16))


async def test_a_namespace_that_is_too_small() -> None:
    async with served(MemoryStore(16)) as server:
        store = await open_stack(url(server.address), Geometry())
        assert store.page_count == 15
        await store.aclose()
        with pytest.raises(StoreFailedError, match="has room for 60KiB, not for 64KiB"):
            await open_stack(url(server.address), Geometry(16))


async def test_ipv6() -> None:
    medium = MemoryStore(64)
    try:
        server = await serve(medium, nqn=NQN, listen=("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with server:
        store = await open_stack(url(server.address), Geometry(16))
        assert "[::1]" in store.space
        await store.aclose()


async def test_answers_behind_the_one_that_loses_the_association() -> None:
    broken: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: broken.append(context))
    async with served() as server:
        store = await open_stack(url(server.address, reconnect_delay="10ms"), Geometry(64))
        await store.write([Run(0, memoryview(b"x" * 4096 * 16))])
        namespace = server.target.namespaces.pop(1)  # and nobody is told
        pages = [bytearray(4096) for _ in range(16)]
        reads = [store.read([Run(n, memoryview(page))]) for n, page in enumerate(pages)]
        reading = asyncio.gather(*reads)
        while store.counters.attempts < 2:  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not reading.done()
        server.target.namespaces[1] = namespace
        await reading
        assert pages == [b"x" * 4096] * 16
        await store.aclose()
    assert broken == []
