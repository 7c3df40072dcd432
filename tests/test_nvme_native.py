"""The queue in C on sockets: what only it does, beside all that it does as the one in Python."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from nvme import Link, World, settings, with_digests
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import direct, pdu
from userswap.backends.nvme_tcp.command import CQE, Connect
from userswap.backends.nvme_tcp.native_queue import NativeQueuePair
from userswap.backends.nvme_tcp.pdu import (
    LAST,
    TRANSFER,
    ConnectionLostError,
    LocalProtocolError,
    PduType,
)
from userswap.backends.nvme_tcp.qpair import Completed, Connected, Event, Terminated
from userswap.backends.nvme_tcp.target import Operation
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run
from userswap.bench import nvme_measure
from userswap.native import lib

PAGE = 4096
SMALL = 4608  # about the least that the kernel gives a socket


def pattern(size: int, seed: int) -> bytes:
    return bytes((at * 7 + seed * 13 + at // 251) & 0xFF for at in range(size))


class Wires:
    """A native queue at one end of a pair of sockets, and a target's session at the other."""

    def __init__(self, queue: NativeQueuePair, link: Link) -> None:
        self.queue, self.link = queue, link
        self.near, self.far = socket.socketpair()
        for end in (self.near, self.far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        self.to_host = bytearray()
        self.partial = 0

    def run(self) -> list[Event]:
        """Carry bytes until nobody has any; what the queue told."""
        told: list[Event] = []
        while True:
            self.partial += not self.queue.send(self.near.fileno())
            moved = 0
            with contextlib.suppress(BlockingIOError):
                data = self.far.recv(1 << 16)
                moved += len(data)
                for event in self.link.session.receive_data(data, 0.0):
                    assert isinstance(event, Operation)
                    self.link.operations.append(event)
                self.link.answer()
            self.to_host += b"".join(map(bytes, self.link.session.data_to_send()))
            with contextlib.suppress(BlockingIOError):
                sent = self.far.send(self.to_host) if self.to_host else 0
                del self.to_host[:sent]
                moved += sent
            told += self.queue.receive(self.near.fileno(), 0.0)
            if not moved:
                return told


@pytest.fixture(params=(False, True), ids=("plain", "digests"))
def wires(request: pytest.FixtureRequest) -> Iterator[Wires]:
    queue, link = World().queue(settings(options=with_digests(request.param, request.param)))
    assert isinstance(queue, NativeQueuePair)
    ends = Wires(queue, link)
    with ends.near, ends.far:
        yield ends


def answer(wires: Wires, kind: PduType, body: bytes) -> None:
    """Have the target send what it would not."""
    session = wires.link.session.queue
    wires.far.send(b"".join(map(bytes, session.sending.frame(kind, 0, body))))


def response(cid: int, status: int = 0) -> bytes:
    return CQE.pack(0, 1, 1, cid, status << 1)


def test_pages_go_and_come_by_sockets_that_take_little(wires: Wires) -> None:
    queue = wires.queue
    sizes = [PAGE, 3 * PAGE, 16 * PAGE]
    for place, size in enumerate(sizes):
        data = memoryview(pattern(size, place))
        queue.submit(nvme.write(1, place * 16, size // PAGE), 0.0, data=data)
    assert wires.run() == [Completed(cid, 0, 0) for cid in (1, 2, 3)]
    assert wires.partial
    pages = [bytearray(size) for size in sizes]
    for place, page in enumerate(pages):
        count = len(page) // PAGE
        queue.submit(nvme.read(1, place * 16, count), 0.0, into=memoryview(page))
    assert queue.room == queue.capacity - 3
    assert sorted(event.cid for event in wires.run() if isinstance(event, Completed)) == [4, 5, 6]
    assert pages == [pattern(size, place) for place, size in enumerate(sizes)]


def test_what_is_wrong_with_a_command_is_said_and_changes_nothing(wires: Wires) -> None:
    queue, page = wires.queue, memoryview(bytearray(PAGE))
    read = nvme.read(1, 0, 1)
    for wrong, word in (
        ({"into": memoryview(bytes(PAGE))}, "written to"),
        ({"into": page[::2]}, "pieces"),
        ({"into": page, "data": page}, "both"),
    ):
        with pytest.raises(LocalProtocolError, match=word):
            queue.submit(read, 0.0, **wrong)  # type: ignore[arg-type]
    assert queue.room == queue.capacity
    assert queue.data_to_send() == []
    queue.submit(read, 0.0, into=memoryview(bytearray(PAGE)).cast("Q"))
    assert queue.get_timer() == 30.0
    assert len(wires.run()) == 1


def test_a_buffer_stays_in_place_while_it_is_in_use(wires: Wires) -> None:
    page = bytearray(PAGE)
    wires.queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(page))
    with pytest.raises(BufferError):
        page.clear()
    assert len(wires.run()) == 1
    page.clear()
    page = bytearray(PAGE)
    cid = wires.queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(page))
    wires.queue.abandon(cid)
    page.clear()
    assert wires.run() == [Completed(cid, 0, 0)]


@pytest.mark.parametrize("size", [PAGE, 16 * PAGE])
def test_an_abandoned_write_goes_on_from_a_copy(wires: Wires, size: int) -> None:
    queue = wires.queue
    data = bytearray(pattern(size, 1))
    cid = queue.submit(nvme.write(1, 0, size // PAGE), 0.0, data=memoryview(data))
    queue.send(wires.near.fileno())  # a part of it
    queue.abandon(cid)
    queue.abandon(cid)
    data[:] = bytes(size)
    data.clear()
    assert wires.run() == [Completed(cid, 0, 0)]
    assert wires.link.medium.data[:size] == pattern(size, 1)


def test_an_answer_that_comes_too_early_gives_no_later_bytes_away(wires: Wires) -> None:
    queue = wires.queue
    data = bytearray(pattern(PAGE, 1))
    cid = queue.submit(nvme.write(1, 0, 1), 0.0, data=memoryview(data))
    answer(wires, PduType.CAPSULE_RESP, response(cid))
    assert queue.receive(wires.near.fileno(), 0.0) == [Completed(cid, 0, 0)]
    data[:] = b"s" * PAGE
    data.clear()
    sent = b""
    while not queue.send(wires.near.fileno()) or not sent:
        sent += wires.far.recv(1 << 16)
    assert pattern(PAGE, 1) in sent


@pytest.mark.parametrize("ending", ["end", "reset"])
def test_what_came_before_the_end_is_told_first(wires: Wires, ending: str) -> None:
    queue = wires.queue
    cids = [queue.submit(nvme.flush(1), 0.0) for _ in range(2)]
    queue.send(wires.near.fileno())
    answer(wires, PduType.CAPSULE_RESP, response(cids[0]))
    if ending == "end":
        wires.far.recv(1 << 16)  # closing with bytes unread resets
    wires.far.close()
    told = queue.receive(wires.near.fileno(), 0.0)
    if len(told) == 1:
        told += queue.receive(wires.near.fileno(), 0.0)
    done, over = told
    assert done == Completed(cids[0], 0, 0)
    assert isinstance(over, Terminated)
    assert isinstance(over.error, ConnectionLostError)
    assert over.unfinished == (cids[1],)
    assert not queue.direct


def test_it_looks_for_an_answer_as_long_as_it_is_told(wires: Wires) -> None:
    queue, number = wires.queue, wires.near.fileno()
    cid = queue.submit(nvme.flush(1), 0.0)
    assert queue.exchange(number, 0.0, 1000) == ([], [])
    assert queue.was_late
    assert wires.far.recv(1 << 16)
    answer(wires, PduType.CAPSULE_RESP, response(cid, 5))
    assert queue.exchange(number, 0.0, 1 << 31) == ([cid | 5 << 16], [])
    assert not queue.was_late
    cid = queue.submit(nvme.flush(1), 0.0)
    wires.far.close()
    answers, (over,) = queue.exchange(number, 0.0, 1 << 31)
    assert answers == []
    assert isinstance(over, Terminated)
    assert queue.was_closed


def test_sending_to_nobody_raises_nothing(wires: Wires) -> None:
    wires.far.close()
    cid = wires.queue.submit(nvme.flush(1), 0.0)
    assert wires.queue.send(wires.near.fileno())
    (over,) = wires.queue.receive(wires.near.fileno(), 0.0)
    assert isinstance(over, Terminated)
    assert over.unfinished == (cid,)


def test_an_error_is_told_in_the_words_of_python(wires: Wires) -> None:
    queue = wires.queue
    cid = queue.submit(nvme.flush(1), 0.0)
    queue.send(wires.near.fileno())
    answer(wires, PduType.CAPSULE_RESP, response(77))
    (over,) = queue.receive(wires.near.fileno(), 0.0)
    assert isinstance(over, Terminated)
    assert str(over.error) == "CapsuleResp: no command 77 is outstanding"
    assert over.unfinished == (cid,)
    assert bytes(queue.data_to_send()[-1])[:1] == bytes([PduType.H2C_TERM])


def test_the_end_in_the_middle_of_everything(wires: Wires) -> None:
    """Data half received, a write half sent, an R2T half answered: all of it is let go."""
    queue = wires.queue
    page, data = bytearray(PAGE), bytearray(16 * PAGE)
    queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(page))
    queue.submit(nvme.write(1, 0, 16), 0.0, data=memoryview(data))
    queue.submit(nvme.write(1, 0, 1), 0.0, data=memoryview(data)[:PAGE])
    queue.send(wires.near.fileno())
    session = wires.link.session.queue
    stream = b"".join(
        map(
            bytes,
            session.sending.frame(PduType.R2T, 0, TRANSFER.pack(2, 0, 0, len(data)))
            + session.sending.frame(PduType.C2H_DATA, LAST, TRANSFER.pack(1, 0, 0, PAGE), page),
        )
    )
    wires.far.send(stream[:2000])
    assert queue.receive(wires.near.fileno(), 0.0) == []
    queue.send(wires.near.fileno())
    (over,) = queue.close()
    assert isinstance(over, Terminated)
    assert over.unfinished == (1, 2, 3)
    del over, queue
    page.clear()
    data.clear()


def test_no_more_than_the_queue_holds() -> None:
    queue, _ = World().queue(settings(entries=4))
    assert isinstance(queue, NativeQueuePair)
    page = memoryview(bytearray(PAGE))
    for _ in range(3):
        queue.submit(nvme.read(1, 0, 1), 0.0, into=page)
    with pytest.raises(LocalProtocolError):
        queue.submit(nvme.read(1, 0, 1), 0.0, into=page)
    queue.close()
    with pytest.raises(LocalProtocolError):
        queue.submit(nvme.read(1, 0, 1), 0.0, into=page)


def test_cids_come_round() -> None:
    """After all others, and passing over the one that is still outstanding."""
    connect = Connect("nqn.s", "nqn.h", bytes(16), queue=1, entries=16, controller=1)
    queue = NativeQueuePair(connect, with_digests(False, False), 0.0)
    queue._next_cid = last = (1 << 16) - 3
    queue.receive_data(pdu.init(PduType.IC_RESP, alignment=0, digests=0, limit=4096), 0.0)

    def complete(cid: int) -> list[Event]:
        (answer,) = pdu.PLAIN.frame(PduType.CAPSULE_RESP, 0, response(cid))
        return queue.receive_data(answer, 0.0)

    assert complete(last) == [Connected(0)]
    assert queue.direct is False  # ICReq and Connect were not sent
    queue.data_to_send()
    assert [queue.submit(nvme.flush(1), 0.0) for _ in range(3)] == [last + 1, last + 2, 0]
    for cid in (last + 1, 0):
        assert complete(cid) == [Completed(cid, 0, 0)]
    lib.us_nvme_form(queue._native).next_cid = last + 1  # as after all others
    assert [queue.submit(nvme.flush(1), 0.0) for _ in range(2)] == [last + 1, 0]
    queue.close()


async def test_a_near_target_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LOOK_NS", 1 << 31)
    with nvme_measure.target(min(os.sched_getaffinity(0)), spin=False) as port:
        store = await open_stack(nvme_measure.url(port), Geometry(64))
        try:
            pages = [memoryview(bytearray(pattern(PAGE, seed))) for seed in range(2)]
            for index, page in enumerate(pages):
                await store.write([Run(index, page)])
            found = memoryview(bytearray(PAGE))
            assert not store.read_now([Run(0, found)])  # it was not seen to be near yet
            await store.read([Run(0, found)])
            assert found == pages[0]
            await asyncio.sleep(0)
            assert store.read_now([Run(1, found)])
            assert found == pages[1]
            assert not store.read_now([Run(0, found)])  # others may follow in this turn
            await asyncio.gather(*(store.read([Run(0, found)]) for _ in range(3)))
            assert found == pages[0]
            await asyncio.sleep(0)
            monkeypatch.setattr(direct, "LOOK_NS", 1)
            kept = memoryview(bytearray(PAGE))
            while store.read_now([Run(1, kept)]):  # until one comes too late, which changes nothing
                kept[:] = bytes(PAGE)
                await asyncio.sleep(0)
            before = bytes(kept)
            await store.read([Run(1, found)])
            assert found == pages[1]
            assert kept == before
        finally:
            await store.aclose()
