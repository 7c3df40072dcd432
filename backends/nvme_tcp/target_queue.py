"""The target's end of one connection: commands out of capsules, their data fetched, answers in.

Responsible for: ICResp and what it grants; taking a command's data from its capsule or asking for
it by R2T within a budget of memory; sending read data and responses; and finding every way in which
a host can break the protocol.
Invariants:
 1. A command arrives once, with all its data, and is answered once; the commands that are in here
    or with the user are never more than the queue has entries.
 2. Memory for data that was asked for is within the budget; what comes inside capsules is bounded
    by the queue's entries.
 3. Received data goes only into the buffer of its own command, at the place that comes next.
Must not know: what commands mean beyond the data they bring, controllers, sockets.

    INITIALIZING --ICReq--> RUNNING;  any --an error, the host's TermReq or end--> CLOSED
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.command import (
    BY_SGL,
    CQE,
    DO_NOT_RETRY,
    SGL_IN_CAPSULE,
    SGL_TRANSPORT,
    SQE,
    Sqe,
    Status,
)
from userswap.backends.nvme_tcp.pdu import (
    LAST,
    SUCCESS,
    TRANSFER,
    Buffer,
    ConnectionLostError,
    Fatal,
    Framing,
    Header,
    LocalProtocolError,
    PduType,
    check,
)
from userswap.backends.nvme_tcp.wire import SCRATCH_SMALL, Wire

TO_CONTROLLER, TO_HOST = 1, 2
DIGESTS = pdu.HDGST | pdu.DDGST
HPDA_MAX = 31
NOTHING = memoryview(b"")
RETRYABLE = frozenset({Status.TRANSIENT_TRANSPORT, Status.INTERRUPTED, Status.NAMESPACE_NOT_READY})
"""What may succeed another time; all else is told not to be tried again."""


class State(Enum):
    INITIALIZING = auto()
    RUNNING = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost."""

    in_capsule: int = 8192
    """bytes of data inside a capsule; every host may send 8192 to an admin queue"""
    transfer: int = 1024 * 1024
    """bytes of data of one command"""
    maxh2cdata: int = 128 * 1024
    asked: int = 1024 * 1024
    """bytes of data that were asked for and are not answered for yet"""


@dataclass(slots=True, eq=False)
class Arrived:
    """A command and the data it brought; to be answered by `complete`."""

    sqe: Sqe
    data: memoryview


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over; nobody waits for answers."""

    error: pdu.ProtocolError


Event = Arrived | Closed


@dataclass(slots=True)
class _Pending:
    """A command that has come and was not answered yet."""

    sqe: Sqe
    data: memoryview
    asked: int = 0  # bytes of the budget that it has
    received: int = 0
    damaged: bool = False
    ready: bool = False  # the user has it


class TargetQueue(Wire[Event]):
    """See the module. `Wire` has the methods that the shell receives and sends by."""

    RECEIVES: ClassVar = {
        State.INITIALIZING: frozenset({PduType.IC_REQ, PduType.H2C_TERM}),
        State.RUNNING: frozenset({PduType.CAPSULE_CMD, PduType.H2C_DATA, PduType.H2C_TERM}),
    }
    TERM = PduType.C2H_TERM

    def __init__(self, limits: Limits) -> None:
        super().__init__(State.INITIALIZING, SCRATCH_SMALL)
        self.limits = limits
        self.entries = 1  # until Connect says how many there are
        self.flow_control = True
        self.queue = 0
        self._head = 0  # of the submission queue
        self._pending: dict[int, _Pending] = {}
        self._waiting: deque[_Pending] = deque()  # for the budget
        self._asked = 0
        self._current: _Pending | None = None  # whose data is being received
        self._current_last = False

    # --- for the user ---

    def connected(self, queue: int, entries: int, flow_control: bool) -> None:
        """Connect was accepted: this connection is that queue now."""
        self.queue, self.entries, self.flow_control = queue, entries, flow_control
        self._widen()

    def complete(self, cid: int, status: int = 0, result: int = 0, data: Buffer = b"") -> None:
        """Answer a command that arrived; a successful one with all the data that it asked for."""
        if self.error is not None:
            return
        pending = self._pending.get(cid)
        if pending is None or not pending.ready:
            raise LocalProtocolError(f"command {cid} is not to be answered")
        size = memoryview(data).nbytes
        wanted = pending.sqe.length if pending.sqe.direction == TO_HOST and not status else 0
        if size != wanted:
            raise LocalProtocolError(f"{size} bytes of data, where {wanted} were asked for")
        # Without flow control there is no SQ head to report: the data may say that it went well.
        alone = size and not self.flow_control and not result
        if size:
            body = TRANSFER.pack(cid, 0, 0, size)
            flags = LAST | SUCCESS if alone else LAST
            self._out += self.sending.frame(PduType.C2H_DATA, flags, body, data)
        if alone:
            self._forget(pending)
        else:
            self._respond(pending, status, result)
        self._ask()

    def close(self, error: pdu.ProtocolError) -> list[Event]:
        """End the connection from here, without a word to the host."""
        if self.error is None:
            self._end_with(error)
        return self._take_events()

    # --- answers ---

    def _respond(self, pending: _Pending, status: int, result: int) -> None:
        cid = pending.sqe.cid
        self._forget(pending)
        # A slot counts as free when its command was answered: that does not depend on how the
        # capsules behind it were cut.
        self._head = (self._head + 1) % self.entries
        head = self._head if self.flow_control else 0xFFFF
        if status and status >> 8 != 3 and status not in RETRYABLE:
            status |= DO_NOT_RETRY
        body = CQE.pack(result, head, self.queue, cid, status << 1)
        self._out += self.sending.frame(PduType.CAPSULE_RESP, 0, body)

    def _forget(self, pending: _Pending) -> None:
        del self._pending[pending.sqe.cid]
        self._asked -= pending.asked

    def _ask(self) -> None:
        """Send R2Ts for the commands that wait, in order, as far as the budget goes."""
        while self._waiting:
            pending = self._waiting[0]
            length = pending.sqe.length
            if self._asked and self._asked + length > self.limits.asked:
                return
            self._waiting.popleft()
            pending.asked = length
            self._asked += length
            pending.data = memoryview(bytearray(length))
            cid = pending.sqe.cid
            # There is one R2T for a command and one command of a CID: the CID tags the transfer.
            body = TRANSFER.pack(cid, cid, 0, length)
            self._out += self.sending.frame(PduType.R2T, 0, body)

    def _arrive(self, pending: _Pending) -> None:
        pending.ready = True
        self._events.append(Arrived(pending.sqe, pending.data))

    def _ended(self, error: pdu.ProtocolError) -> None:
        self.state = State.CLOSED
        self._pending.clear()
        self._waiting.clear()
        self._current = None
        self._asked = 0
        self._events.append(Closed(error))

    # --- what comes ---

    def _data_max(self, kind: PduType) -> int:
        return self.limits.in_capsule if kind == PduType.CAPSULE_CMD else self.limits.maxh2cdata

    def _begin(self, header: Header, body: memoryview, size: int, now: float) -> memoryview | None:
        match header.kind:
            case PduType.CAPSULE_CMD:
                return self._capsule(body, size)
            case PduType.H2C_DATA:
                return self._more_data(header, body, size)
            case PduType.IC_REQ:
                self._initialize(body)
            case _:
                fatal, info = pdu.TERM.unpack(body)
                self._end_with(ConnectionLostError(f"the host gave up: FES {fatal}, FEI {info}"))
        return None

    def _initialize(self, body: memoryview) -> None:
        version, alignment, digests, _ = pdu.INIT.unpack(body)
        check(version == 0, Fatal.HEADER_FIELD, pdu.AT_PFV, "ICReq: PDU format {}", version)
        check(alignment <= HPDA_MAX, Fatal.HEADER_FIELD, pdu.AT_PDA, "ICReq: HPDA {}", alignment)
        digests &= DIGESTS
        header_digest, data_digest = bool(digests & pdu.HDGST), bool(digests & pdu.DDGST)
        self._out.append(
            pdu.init(PduType.IC_RESP, alignment=0, digests=digests, limit=self.limits.maxh2cdata)
        )
        self.receiving = Framing(header_digest, data_digest)
        self.sending = Framing(header_digest, data_digest, (alignment + 1) * 4)
        self.state = State.RUNNING

    def _capsule(self, body: memoryview, size: int) -> memoryview | None:
        sqe = Sqe._make(SQE.unpack(body))
        cid, commands = sqe.cid, self._pending
        # Linux's host also fills the entry that tells a full queue from an empty one.
        if cid in commands or len(commands) >= self.entries:
            check(cid not in commands, Fatal.SEQUENCE, 10, "CapsuleCmd: CID {} is in use", cid)
            check(False, Fatal.SEQUENCE, 0, "CapsuleCmd: more than {} commands", self.entries)
        pending = commands[cid] = _Pending(sqe, NOTHING)
        status = self._judge(sqe, size)
        if status:
            # What the capsule brings is received and forgotten.
            self._respond(pending, status, 0)
        elif size:
            self._current, self._current_last = pending, True
            pending.data = memoryview(bytearray(size))
            return pending.data
        elif sqe.direction == TO_CONTROLLER and sqe.length:
            self._waiting.append(pending)
            self._ask()
        else:
            self._arrive(pending)
        return None

    def _judge(self, sqe: Sqe, size: int) -> int:
        """Can the data of this command be moved as it says? 0, or the status that says why not."""
        most = self.limits.transfer if self.entries > 1 else self.limits.in_capsule
        if sqe.flags != BY_SGL or sqe.length > most:  # fused commands have other flags
            return Status.INVALID_FIELD
        if sqe.sgl == SGL_IN_CAPSULE:
            if sqe.direction != TO_CONTROLLER and sqe.length:
                return Status.SGL_TYPE_INVALID
            return 0 if sqe.address == 0 and sqe.length == size else Status.SGL_LENGTH_INVALID
        if sqe.sgl != SGL_TRANSPORT:
            return Status.SGL_TYPE_INVALID if sqe.length or size else 0
        return Status.SGL_LENGTH_INVALID if size else 0

    def _more_data(self, header: Header, body: memoryview, size: int) -> memoryview:
        cid, tag, offset, length = TRANSFER.unpack(body)
        pending = self._pending.get(tag)
        if pending is None or not pending.asked or pending.ready:
            message = f"H2CData: nobody asked for transfer {tag}"
            raise pdu.RemoteProtocolError(Fatal.HEADER_FIELD, pdu.AT_TTAG, message)
        field, out_of_range = Fatal.HEADER_FIELD, Fatal.OUT_OF_RANGE
        check(cid == tag, field, pdu.AT_CCCID, "H2CData: command {}", cid)
        check(length == size > 0, field, pdu.AT_LENGTH, "H2CData: length {}", length)
        right = offset == pending.received
        check(right, out_of_range, pdu.AT_OFFSET, "H2CData: offset {}", offset)
        end = offset + length
        check(end <= len(pending.data), out_of_range, pdu.AT_LENGTH, "H2CData: too much data")
        last = bool(header.flags & LAST)
        check(last == (end == len(pending.data)), field, pdu.AT_FLAGS, "H2CData: LAST_PDU")
        pending.received = end
        self._current, self._current_last = pending, last
        return pending.data[offset:end]

    def _finish(self, intact: bool, now: float) -> None:
        pending, self._current = self._current, None
        if pending is None:
            return
        if not intact:
            pending.damaged = True
        if not self._current_last:
            return
        if pending.damaged:
            self._respond(pending, Status.TRANSIENT_TRANSPORT, 0)
            self._ask()
        else:
            self._arrive(pending)
