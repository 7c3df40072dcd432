"""Every kind of PDU in every state of both ends: what is expected, and what ends the connection."""

import pytest

from nvme import World, at_random, settings, single, whole, with_digests
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.command import CQE, Connect, Status
from userswap.backends.nvme_tcp.pdu import (
    DDGST,
    HDGST,
    LAST,
    SUCCESS,
    TRANSFER,
    ConnectionLostError,
    Fatal,
    Framing,
    PduType,
    RemoteProtocolError,
)
from userswap.backends.nvme_tcp.qpair import Completed, Connected, QueuePair, Terminated
from userswap.backends.nvme_tcp.qpair import State as HostState
from userswap.backends.nvme_tcp.target import Session
from userswap.backends.nvme_tcp.target_queue import Closed
from userswap.backends.nvme_tcp.target_queue import State as TargetState

pytestmark = pytest.mark.usefixtures("queue_type")

CONNECT = Connect("nqn.s", "nqn.h", bytes(16), queue=1, entries=16, controller=1)
PAGE = 4096
BIG = 16384
BOTH = Framing(header_digest=True, data_digest=True)


def raw(
    kind: int, body: bytes, data: bytes = b"", flags: int = 0, form: Framing = pdu.PLAIN
) -> bytes:
    return b"".join(map(bytes, form.frame(PduType(kind), flags, body, data)))


def response(cid: int, status: int = 0, result: int = 0, head: int = 1) -> bytes:
    return CQE.pack(result, head, 1, cid, status << 1)


def moved(cid: int, tag: int, offset: int, length: int) -> bytes:
    return TRANSFER.pack(cid, tag, offset, length)


def ic_resp(**changes: int) -> bytes:
    given = {"alignment": 0, "digests": 0, "limit": 4096, "version": 0}
    return pdu.init(PduType.IC_RESP, **{**given, **changes})


def term(kind: PduType) -> bytes:
    return pdu.term(kind, RemoteProtocolError(Fatal.SEQUENCE, 7, ""), bytes(24))


def host_in(state: HostState, digests: bool = False) -> QueuePair:
    """RUNNING: with a read (CID 1), a write that waits for R2T (2) and a flush (3)."""
    queue = QueuePair(CONNECT, with_digests(digests, digests), 0.0)
    if state is HostState.INITIALIZING:
        return queue
    queue.receive_data(ic_resp(digests=3 if digests else 0), 0.0)
    if state is HostState.RUNNING:
        form = BOTH if digests else pdu.PLAIN
        told = queue.receive_data(raw(5, response(0, result=9), form=form), 0.0)
        assert told == [Connected(9)]
        queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(bytearray(PAGE)))
        queue.submit(nvme.write(1, 0, 4), 0.0, data=bytes(BIG))
        queue.submit(nvme.flush(1), 0.0)
    queue.data_to_send()
    return queue


HOST_SEES = {
    PduType.IC_REQ: pdu.init(PduType.IC_REQ, alignment=0, digests=0, limit=0),
    PduType.IC_RESP: ic_resp(),
    PduType.H2C_TERM: term(PduType.H2C_TERM),
    PduType.C2H_TERM: term(PduType.C2H_TERM),
    PduType.CAPSULE_CMD: raw(4, nvme.flush(1).entry(1)),
    PduType.CAPSULE_RESP: raw(5, response(0)),
    PduType.H2C_DATA: raw(6, moved(2, 2, 0, 4), bytes(4), LAST),
    PduType.C2H_DATA: raw(7, moved(1, 0, 0, PAGE), bytes(PAGE), LAST),
    PduType.R2T: raw(9, moved(2, 5, 0, BIG)),
}
HOST_FINE = {
    (HostState.INITIALIZING, PduType.IC_RESP),
    (HostState.CONNECTING, PduType.CAPSULE_RESP),
    (HostState.RUNNING, PduType.C2H_DATA),
    (HostState.RUNNING, PduType.R2T),
}
TO_HOST = {
    PduType.IC_RESP,
    PduType.C2H_TERM,
    PduType.CAPSULE_RESP,
    PduType.C2H_DATA,
    PduType.R2T,
}
OPEN = [HostState.INITIALIZING, HostState.CONNECTING, HostState.RUNNING]


@pytest.mark.parametrize("state", OPEN, ids=lambda state: state.name)
@pytest.mark.parametrize("kind", PduType, ids=lambda kind: kind.name)
def test_every_pdu_in_every_state_of_the_host(state: HostState, kind: PduType) -> None:
    told = []
    for cut in (whole, single, at_random(1)):
        queue = host_in(state)
        events = [e for part in cut(HOST_SEES[kind]) for e in queue.receive_data(part, 0.0)]
        told.append(([type(event) for event in events], b"".join(map(bytes, queue.data_to_send()))))
        if (state, kind) in HOST_FINE:
            assert queue.error is None
            continue
        assert queue.state is HostState.CLOSED
        (terminated,) = events
        assert isinstance(terminated, Terminated)
        assert terminated.unfinished == ((1, 2, 3) if state is HostState.RUNNING else ())
        if kind is PduType.C2H_TERM:
            assert isinstance(terminated.error, ConnectionLostError)
            assert told[-1][1] == b""
            continue
        assert isinstance(terminated.error, RemoteProtocolError)
        if kind not in TO_HOST:
            assert (terminated.error.fatal, terminated.error.info) == (Fatal.HEADER_FIELD, 0)
        elif (state, kind) != (HostState.RUNNING, PduType.CAPSULE_RESP):
            assert terminated.error.fatal == Fatal.SEQUENCE
        assert told[-1][1][0] == PduType.H2C_TERM
    assert told[0] == told[1] == told[2]


HOST_ERRORS = {
    "an unknown type": (bytes([8, 0, 24, 0, 24, 0, 0, 0]), Fatal.HEADER_FIELD, 0),
    "HLEN": (bytes([5, 0, 23, 0, 24, 0, 0, 0]), Fatal.HEADER_FIELD, 2),
    "PLEN of 2**31": (bytes([5, 0, 24, 0, 0, 0, 0, 128]), Fatal.HEADER_FIELD, 4),
    "data of 2**31": (bytes([7, 0, 24, 24, 0, 0, 0, 128]), Fatal.LIMIT, 4),
    "PDO in the header": (bytes([7, 0, 24, 20, 100, 0, 0, 0]), Fatal.HEADER_FIELD, 3),
    "PDO beyond the end": (bytes([7, 0, 24, 120, 100, 0, 0, 0]), Fatal.HEADER_FIELD, 4),
    "PDO between dwords": (bytes([7, 0, 24, 25, 100, 0, 0, 0]), Fatal.HEADER_FIELD, 3),
    "a digest unasked": (bytes([5, 1, 24, 0, 28, 0, 0, 0]), Fatal.HEADER_FIELD, 1),
    "a data digest unasked": (bytes([7, 2, 24, 24, 100, 0, 0, 0]), Fatal.HEADER_FIELD, 1),
    "a CID of nobody": (raw(5, response(77)), Fatal.HEADER_FIELD, 20),
    "an SQ head beyond the queue": (raw(5, response(3, head=16)), Fatal.HEADER_FIELD, 16),
    "success without the data": (raw(5, response(1)), Fatal.SEQUENCE, 0),
    "success without taking data": (raw(5, response(2)), Fatal.SEQUENCE, 0),
    "data for nobody": (raw(7, moved(77, 0, 0, 4), bytes(4)), Fatal.HEADER_FIELD, 8),
    "data for a write": (raw(7, moved(2, 0, 0, 4), bytes(4)), Fatal.HEADER_FIELD, 8),
    "data for a flush": (raw(7, moved(3, 0, 0, 4), bytes(4)), Fatal.OUT_OF_RANGE, 16),
    "data from elsewhere": (raw(7, moved(1, 0, 4, 4), bytes(4)), Fatal.OUT_OF_RANGE, 12),
    "too much data": (raw(7, moved(1, 0, 0, 5000), bytes(5000)), Fatal.OUT_OF_RANGE, 16),
    "another length": (raw(7, moved(1, 0, 0, 8), bytes(4)), Fatal.HEADER_FIELD, 16),
    "no data": (raw(7, moved(1, 0, 0, 0)), Fatal.HEADER_FIELD, 16),
    "an early SUCCESS": (
        raw(7, moved(1, 0, 0, 4), bytes(4), LAST | SUCCESS),
        Fatal.HEADER_FIELD,
        1,
    ),
    "R2T for nobody": (raw(9, moved(77, 5, 0, 4)), Fatal.HEADER_FIELD, 8),
    "R2T for a read": (raw(9, moved(1, 5, 0, 4)), Fatal.HEADER_FIELD, 8),
    "R2T of nothing": (raw(9, moved(2, 5, 0, 0)), Fatal.OUT_OF_RANGE, 16),
    "R2T of too much": (raw(9, moved(2, 5, 0, BIG + 4)), Fatal.OUT_OF_RANGE, 16),
    "R2T from elsewhere": (raw(9, moved(2, 5, 4, 4)), Fatal.OUT_OF_RANGE, 12),
    "two R2Ts": (raw(9, moved(2, 5, 0, 4)) + raw(9, moved(2, 6, 4, 4)), Fatal.LIMIT, 0),
}


@pytest.mark.parametrize("name", HOST_ERRORS)
def test_what_a_target_may_not_do(name: str) -> None:
    stream, fatal, info = HOST_ERRORS[name]
    for cut in (whole, single):
        queue = host_in(HostState.RUNNING)
        events = [e for part in cut(stream) for e in queue.receive_data(part, 0.0)]
        (terminated,) = events
        assert isinstance(terminated, Terminated)
        assert isinstance(terminated.error, RemoteProtocolError), terminated.error
        assert (terminated.error.fatal, terminated.error.info) == (fatal, info)
        last = bytes(queue.data_to_send()[-1])
        assert last[:1] == bytes([PduType.H2C_TERM])
        assert pdu.TERM.unpack_from(last, 8) == (fatal, info)
        assert queue.receive_data(raw(5, response(3)), 0.0) == []


@pytest.mark.parametrize(
    ("changes", "info"),
    [
        ({"version": 1}, pdu.AT_PFV),
        ({"alignment": 32}, pdu.AT_PDA),
        ({"digests": 1}, pdu.AT_DGST),
        ({"limit": 4092}, pdu.AT_MAX),
        ({"limit": 4098}, pdu.AT_MAX),
    ],
)
def test_what_an_ic_resp_may_not_say(changes: dict[str, int], info: int) -> None:
    (terminated,) = host_in(HostState.INITIALIZING).receive_data(ic_resp(**changes), 0.0)
    assert isinstance(terminated, Terminated)
    assert isinstance(terminated.error, RemoteProtocolError)
    assert (terminated.error.fatal, terminated.error.info) == (Fatal.HEADER_FIELD, info)


def test_a_read_in_parts_and_both_ways_to_end_it() -> None:
    for ending in (b"", raw(5, response(1))):
        queue = host_in(HostState.RUNNING)
        flags = LAST if ending else LAST | SUCCESS
        parts = raw(7, moved(1, 0, 0, 96), bytes(96))
        parts += raw(7, moved(1, 0, 96, PAGE - 96), bytes(PAGE - 96), flags)
        assert queue.receive_data(parts + ending, 0.0) == [Completed(1, 0, 0)]


def test_data_goes_in_pieces_that_the_target_takes() -> None:
    queue = host_in(HostState.RUNNING)
    queue.receive_data(raw(9, moved(2, 5, 0, 10000)), 0.0)
    heads = [bytes(part) for part in queue.data_to_send()[::2]]
    assert [TRANSFER.unpack_from(head, 8) for head in heads] == [
        (2, 5, 0, 4096),
        (2, 5, 4096, 4096),
        (2, 5, 8192, 10000 - 8192),
    ]
    assert [head[1] & LAST for head in heads] == [0, 0, LAST]
    queue.receive_data(raw(9, moved(2, 6, 10000, BIG - 10000)), 0.0)
    assert queue.receive_data(raw(5, response(2)), 0.0) == [Completed(2, 0, 0)]


def test_authentication_is_more_than_this_host_can() -> None:
    queue = host_in(HostState.CONNECTING)
    (terminated,) = queue.receive_data(raw(5, response(0, result=1 << 16)), 0.0)
    assert isinstance(terminated, Terminated)
    assert "access denied" in str(terminated.error)


def test_a_wrong_header_digest_ends_and_a_wrong_data_digest_fails_one_command() -> None:
    queue = host_in(HostState.RUNNING, digests=True)
    good = raw(7, moved(1, 0, 0, PAGE), bytes(PAGE), LAST, BOTH)
    assert good[1] == HDGST | DDGST | LAST
    damaged = bytearray(good)
    damaged[100] ^= 1
    assert queue.receive_data(damaged, 0.0) == []
    told = queue.receive_data(raw(5, response(1), form=BOTH), 0.0)
    assert told == [Completed(1, Status.TRANSIENT_TRANSPORT, 0)]
    assert nvme.retryable(Status.TRANSIENT_TRANSPORT)
    damaged = bytearray(raw(5, response(3), form=BOTH))
    damaged[12] ^= 1
    (terminated,) = queue.receive_data(damaged, 0.0)
    assert isinstance(terminated, Terminated)
    assert isinstance(terminated.error, RemoteProtocolError)
    assert terminated.error.fatal == Fatal.HEADER_DIGEST
    assert terminated.error.info == int.from_bytes(damaged[24:28], "little")


# --- the target ---


def target_in(state: TargetState, form: Framing = pdu.PLAIN) -> tuple[World, Session]:
    """RUNNING: I/O queue 1, with a write (CID 2) whose data was asked for."""
    world = World()
    controller, _ = world.ready()
    digests = (HDGST if form.header_digest else 0) | (DDGST if form.data_digest else 0)
    session = world.target.accept(0.0)
    if state is TargetState.INITIALIZING:
        return world, session
    session.receive_data(pdu.init(PduType.IC_REQ, alignment=0, digests=digests, limit=0), 0.0)
    queue = controller.io_queue(1, 0.0)
    connect = queue.connect
    entry = connect.command().entry(0, 1024, nvme.SGL_IN_CAPSULE)
    session.receive_data(raw(4, entry, connect.data(), form=form), 0.0)
    assert session.controller is not None
    session.receive_data(raw(4, nvme.write(1, 0, 4).entry(2, BIG), form=form), 0.0)
    session.data_to_send()
    return world, session


TARGET_SEES = {
    **HOST_SEES,
    PduType.H2C_DATA: raw(6, moved(2, 2, 0, BIG), bytes(BIG), LAST),
    PduType.CAPSULE_CMD: raw(4, nvme.flush(1).entry(3)),
}
TARGET_FINE = {
    (TargetState.INITIALIZING, PduType.IC_REQ),
    (TargetState.RUNNING, PduType.CAPSULE_CMD),
    (TargetState.RUNNING, PduType.H2C_DATA),
}
TO_TARGET = {PduType.IC_REQ, PduType.H2C_TERM, PduType.CAPSULE_CMD, PduType.H2C_DATA}


@pytest.mark.parametrize(
    "state", [TargetState.INITIALIZING, TargetState.RUNNING], ids=lambda state: state.name
)
@pytest.mark.parametrize("kind", PduType, ids=lambda kind: kind.name)
def test_every_pdu_in_every_state_of_the_target(state: TargetState, kind: PduType) -> None:
    told = []
    for cut in (whole, single, at_random(2)):
        _, session = target_in(state)
        events = [e for part in cut(TARGET_SEES[kind]) for e in session.receive_data(part, 0.0)]
        sent = b"".join(map(bytes, session.data_to_send()))
        told.append(([type(event) for event in events], sent))
        if (state, kind) in TARGET_FINE:
            assert not session.over
            continue
        (closed,) = events
        assert isinstance(closed, Closed)
        if kind is PduType.H2C_TERM:
            assert isinstance(closed.error, ConnectionLostError)
            assert sent == b""
            continue
        assert isinstance(closed.error, RemoteProtocolError)
        expected = Fatal.SEQUENCE if kind in TO_TARGET else Fatal.HEADER_FIELD
        assert closed.error.fatal == expected
        assert sent[0] == PduType.C2H_TERM
    assert told[0] == told[1] == told[2]


TARGET_ERRORS = {
    "PLEN of 2**31": (bytes([4, 0, 72, 72, 0, 0, 0, 128]), Fatal.LIMIT, 4),
    "more in a capsule than fits": (raw(4, bytes(64), bytes(8196)), Fatal.LIMIT, 4),
    "a CID in use": (raw(4, nvme.flush(1).entry(2)), Fatal.SEQUENCE, 10),
    "a transfer of nobody": (raw(6, moved(2, 7, 0, 4), bytes(4)), Fatal.HEADER_FIELD, 10),
    "another command": (raw(6, moved(3, 2, 0, 4), bytes(4)), Fatal.HEADER_FIELD, 8),
    "data from elsewhere": (raw(6, moved(2, 2, 4, 4), bytes(4)), Fatal.OUT_OF_RANGE, 12),
    "another length": (raw(6, moved(2, 2, 0, 8), bytes(4)), Fatal.HEADER_FIELD, 16),
    "too much data": (
        raw(6, moved(2, 2, 0, BIG + 4), bytes(BIG + 4), LAST),
        Fatal.OUT_OF_RANGE,
        16,
    ),
    "an early LAST": (raw(6, moved(2, 2, 0, 4), bytes(4), LAST), Fatal.HEADER_FIELD, 1),
    "no LAST": (raw(6, moved(2, 2, 0, BIG), bytes(BIG)), Fatal.HEADER_FIELD, 1),
}


@pytest.mark.parametrize("name", TARGET_ERRORS)
def test_what_a_host_may_not_do(name: str) -> None:
    stream, fatal, info = TARGET_ERRORS[name]
    for cut in (whole, single):
        world, session = target_in(TargetState.RUNNING)
        events = [e for part in cut(stream) for e in session.receive_data(part, 0.0)]
        (closed,) = events
        assert isinstance(closed, Closed)
        assert isinstance(closed.error, RemoteProtocolError), closed.error
        assert (closed.error.fatal, closed.error.info) == (fatal, info)
        last = bytes(session.data_to_send()[-1])
        assert pdu.TERM.unpack_from(last, 8) == (fatal, info)
        assert world.target.controllers == {}  # it goes with the connection


def status_of(session: Session) -> int:
    (answer,) = session.data_to_send()
    return int(CQE.unpack(bytes(answer)[8:24])[4] >> 1)


@pytest.mark.parametrize(
    ("entry", "data", "status"),
    [
        (nvme.Command(0x77).entry(4), b"", Status.INVALID_OPCODE),
        (nvme.write(1, 0, 1).entry(4, 2 << 20), b"", Status.INVALID_FIELD),
        (nvme.write(1, 0, 1).entry(4, 4096, 0x55), b"", Status.SGL_TYPE_INVALID),
        (nvme.write(1, 0, 1).entry(4, 4096, nvme.SGL_IN_CAPSULE), bytes(8), 0x0F),
        (nvme.write(1, 0, 2).entry(4, 4096, nvme.SGL_IN_CAPSULE), bytes(4096), 0x0F),
        (nvme.read(1, 0, 1).entry(4, 4096, nvme.SGL_IN_CAPSULE), bytes(4096), 0x11),
        (nvme.deallocate(1, [(0, 1)])[0].entry(4), b"", Status.SGL_LENGTH_INVALID),
        (b"\0\0" + nvme.flush(1).entry(4)[2:], b"", Status.INVALID_FIELD),
        (nvme.flush(99).entry(4), b"", Status.INVALID_NAMESPACE),
    ],
)
def test_what_a_target_refuses_without_ending(entry: bytes, data: bytes, status: int) -> None:
    _, session = target_in(TargetState.RUNNING)
    assert session.receive_data(raw(4, entry, data), 0.0) == []
    assert nvme.code_of(status_of(session)) == status
    assert not session.over
    assert len(session.receive_data(raw(4, nvme.flush(1).entry(5)), 0.0)) == 1


def test_a_wrong_data_digest_fails_one_write() -> None:
    _, session = target_in(TargetState.RUNNING, BOTH)
    entry = nvme.write(1, 0, 1).entry(4, 4096, nvme.SGL_IN_CAPSULE)
    stream = bytearray(raw(4, entry, bytes(4096), form=BOTH))
    stream[1000] ^= 1
    assert session.receive_data(stream, 0.0) == []
    assert status_of(session) == Status.TRANSIENT_TRANSPORT


def test_more_commands_than_the_queue_has_entries() -> None:
    world = World()
    _, link = world.queue(settings(entries=4))
    for cid in range(10, 14):
        link.session.receive_data(raw(4, nvme.flush(1).entry(cid)), 0.0)
    assert not link.session.over
    link.session.receive_data(raw(4, nvme.flush(1).entry(14)), 0.0)
    assert link.session.over


def test_commands_before_their_time() -> None:
    world = World()
    session = world.target.accept(0.0)
    session.receive_data(pdu.init(PduType.IC_REQ, alignment=0, digests=0, limit=0), 0.0)
    session.data_to_send()
    session.receive_data(raw(4, nvme.identify(nvme.Cns.CONTROLLER).entry(1, 4096)), 0.0)
    assert nvme.code_of(status_of(session)) == Status.SEQUENCE_ERROR
    connect = Connect("nqn.2026-01.test:memory", "nqn.h", bytes(16))
    entry = connect.command().entry(2, 1024, nvme.SGL_IN_CAPSULE)
    session.receive_data(raw(4, entry, connect.data()), 0.0)
    assert status_of(session) == 0
    session.receive_data(raw(4, nvme.identify(nvme.Cns.CONTROLLER).entry(1, 4096)), 0.0)
    assert nvme.code_of(status_of(session)) == Status.SEQUENCE_ERROR
