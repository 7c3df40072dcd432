"""A namespace as a store: the contract over loopback, its URL, and what answers mean for pages."""

import asyncio
import copy
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest

from nvme_remote import NQN, Remote, served, url
from packages import CANNOT_BE_HAD
from userswap.backends.conformance import CHECKS, Check
from userswap.backends.grammar import GrammarError
from userswap.backends.harness import perform, read, write
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp.command import Sqe
from userswap.backends.nvme_tcp.identify import ONCS_DATASET_MANAGEMENT, ONCS_WRITE_ZEROES
from userswap.backends.nvme_tcp.server import Rules, serve
from userswap.backends.nvme_tcp.target import Operation, Session
from userswap.backends.nvme_tcp.target_queue import Limits
from userswap.backends.nvme_tcp.unflushed import Unflushed
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, PageLostError, Run, StoreFailedError
from userswap.backends.volume import VolumeError, format_volume, open_volume

ON_OFF = "on", "off"
FORMS = [(size, header, data) for size in (512, 4096) for header in ON_OFF for data in ON_OFF]
"""Bytes of a block, digests."""
WHOLE = (4096, "off", "off"), (512, "on", "on")
MOST = "check_concurrent_operations", "check_every_page_size", "check_a_history_equals_a_dict"
"""Where every form differs."""
CASES = [
    pytest.param(form, check, id=f"{form}-{check.__name__}")
    for form in FORMS
    for check in CHECKS
    if form in WHOLE or check.__name__ in MOST
]


@pytest.mark.parametrize(("form", "check"), CASES)
async def test_the_contract(form: tuple[int, str, str], check: Check) -> None:
    block_size, header, data = form
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
        pytest.skip(f"IPv6: {CANNOT_BE_HAD} ({error})")
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


async def test_without_flow_control() -> None:
    for check in CHECKS:
        if check.__name__ in MOST:
            await perform(check, Remote(4096, disable_sqflow="on", queue_size=16))


async def test_parts_as_small_as_the_controller_wants() -> None:
    rules = Rules(limits=Limits(transfer=8192))
    async with served(rules=rules) as server:
        store = await open_stack(url(server.address), Geometry(8, 1 << 21))
        pages = random.Random(1).randbytes(3 << 21)
        await write(store, 2, pages)
        assert await read(store, 1, 5) == bytes(1 << 21) + pages + bytes(1 << 21)
        assert server.counts["write"] >= 3 * 256
        await store.aclose()


# --- discarded pages ---


@pytest.mark.parametrize("knows", [0, ONCS_DATASET_MANAGEMENT, ONCS_WRITE_ZEROES])
async def test_discarded_pages_are_zeros_whatever_the_controller_knows(knows: int) -> None:
    async with served() as server:
        pages = server.target._pages
        pages[NQN] = dataclasses.replace(pages[NQN], optional=knows)
        store = await open_stack(url(server.address), Geometry(512))
        await write(store, 0, b"x" * 512 * 4096)
        await store.discard(1, 510)
        assert await read(store, 0, 512) == b"x" * 4096 + bytes(510 * 4096) + b"x" * 4096
        assert bool(server.counts["write_zeroes"]) == (knows == ONCS_WRITE_ZEROES)
        assert bool(server.counts["dataset_management"]) == (knows == ONCS_DATASET_MANAGEMENT)
        await store.aclose()


async def test_a_controller_that_refuses_to_zero_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Session._judge

    def refuse(session: Session, sqe: Sqe, data: memoryview) -> Operation | int:
        operation = judge(session, sqe, data)
        if isinstance(operation, Operation) and operation.kind == nvme.Io.WRITE_ZEROES:
            return operation if operation.ranges[0][1] <= 32 else nvme.Status.INVALID_FIELD
        return operation

    monkeypatch.setattr(Session, "_judge", refuse)
    async with served() as server:
        store = await open_stack(url(server.address), Geometry(512))
        await write(store, 0, b"x" * 512 * 4096)
        await store.discard(0, 512)
        assert await read(store, 0, 512) == bytes(512 * 4096)
        assert server.counts["write_zeroes"] == 16
        await store.aclose()


# --- what answers mean ---


class Bad(MemoryStore):
    """A medium with a bad page."""

    bad = 5
    bad_to_write = False

    async def read(self, runs: Sequence[Run]) -> None:
        self._look(runs)
        super().read_now(runs)

    async def write(self, runs: Sequence[Run]) -> None:
        if self.bad_to_write:
            self._look(runs)
        await super().write(runs)

    def read_now(self, runs: Sequence[Run]) -> bool:
        return False

    def _look(self, runs: Sequence[Run]) -> None:
        for run in runs:
            if run.index <= self.bad < run.index + len(run.buffer) // 4096:
                raise PageLostError("is bad", store="bad", page=self.bad)


async def test_one_bad_page_takes_no_neighbour_along() -> None:
    async with served(Bad(1024)) as server:
        store = await open_stack(url(server.address), Geometry(512))
        await write(store, 0, b"x" * 64 * 4096)
        buffer = bytearray(64 * 4096)
        with pytest.raises(PageLostError) as lost:
            await store.read([Run(0, memoryview(buffer))])
        assert lost.value.page == 5
        assert buffer[: 5 * 4096] == b"x" * 5 * 4096
        assert buffer[6 * 4096 :] == b"x" * 58 * 4096
        await store.aclose()


async def test_a_page_that_cannot_be_written_is_lost_until_it_is() -> None:
    medium = Bad(1024)
    async with served(medium) as server:
        store = await open_stack(url(server.address), Geometry(512))
        medium.bad_to_write = True
        with pytest.raises(PageLostError) as lost:
            await write(store, 0, b"x" * 64 * 4096)
        assert lost.value.page == 5
        medium.bad = -1
        assert await read(store, 0, 5) == b"x" * 5 * 4096
        assert await read(store, 6, 58) == b"x" * 58 * 4096
        with pytest.raises(PageLostError, match="failed halfway"):
            await read(store, 5)
        await write(store, 5, b"y" * 4096)
        assert await read(store, 5) == b"y" * 4096
        await store.aclose()


# --- what is somebody else's ---


async def foreign(place: int) -> MemoryStore:
    medium = MemoryStore(1024)
    await medium.write([Run(place, memoryview(b"precious".ljust(4096, b"\1")))])
    return medium


@pytest.mark.parametrize("place", [0, 511, 1022, 1023])
async def test_what_is_somebody_elses_stays(place: int) -> None:
    medium = await foreign(place)
    before = dict(medium._pages)
    async with served(medium) as server:
        store = await open_stack(url(server.address), Geometry())
        with pytest.raises(VolumeError, match="is no volume and not blank"):
            await open_volume(store, name="remote")
        await store.aclose()
        assert medium._pages == before
        store = await open_stack(url(server.address), Geometry())
        await format_volume(store, name="remote", force=True)
        volume = await open_volume(store, name="remote")
        await volume.aclose()


async def test_who_looks_writes_nothing() -> None:
    medium = MemoryStore(1024)
    async with served(medium) as server:
        store = await open_stack(url(server.address), Geometry())
        assert await read(store, 3, 8) == bytes(8 * 4096)
        await store.flush()
        await store.aclose()
    assert medium._pages == {}


# --- what is kept until a flush ---


def test_what_is_kept_until_a_flush(seed: int) -> None:
    """All of it is what was written since the last flush that returned, in its last state."""
    rng = random.Random(seed)
    kept = Unflushed()
    states: list[dict[int, bytes]] = [{}]
    marks: list[int] = []
    for step in range(2000):
        first, count = rng.randrange(60), rng.randrange(1, 5)
        what = rng.random()
        if what < 0.6:
            data = step.to_bytes(4096)
            kept.wrote(first, data * count)
            states[-1].update(dict.fromkeys(range(first, first + count), data))
        elif what < 0.85:
            kept.zeroed(first, count)
            states[-1].update(dict.fromkeys(range(first, first + count), b""))
        elif what < 0.93:
            marks.append(kept.seal())
            states.append({})
        elif marks:
            done = rng.randrange(len(marks))
            kept.confirm(marks[done])
            del marks[: done + 1], states[: done + 1]
        expected: dict[int, bytes] = {}
        for state in states:
            expected |= state
        written, zeroed = copy.deepcopy(kept).merge()
        zeros = {unit: b"" for first, count in zeroed for unit in range(first, first + count)}
        assert not written.keys() & zeros.keys()
        assert written | zeros == expected
        if step % 50 == 0:  # all of it is written again
            written, zeroed = kept.merge()
            written.clear()
            zeroed.remove(0, 100)
            states, marks = [{}], []
