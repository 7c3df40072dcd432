"""The host's end of one queue: commands in, completions out.

Responsible for: ICReq and Connect; capsules, with their data inside where it fits (a target may
never answer a small write that comes otherwise); answering R2Ts; putting read data into the
caller's buffers; time-outs; and finding every way in which a target can break the protocol.
Invariants:
 1. A command has exactly one Completed event, or is among those that the one Terminated event
    lists, whose buffers nothing touches any more.
 2. Received data goes only into the buffer of the command that it names, at the place that comes
    next, while that command is outstanding.
 3. At most `capacity` commands are outstanding, so that the submission queue never overflows: an
    entry is consumed before its command completes, hence the queue holds no more entries than there
    are outstanding commands, and its head, which completions report, can only tell of more room.
 4. A CID is used again only after all others were.
Must not know: sockets, the clock (`now` is an argument), what commands mean beyond their data.

    INITIALIZING --ICResp--> CONNECTING --response to Connect--> RUNNING
    any --close(), an error, the peer's TermReq or end, a time-out--> CLOSED
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.command import (
    CQE,
    DO_NOT_RETRY,
    SGL_IN_CAPSULE,
    SGL_TRANSPORT,
    Command,
    Connect,
    Status,
    status_name,
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
from userswap.backends.nvme_tcp.wire import Wire

ADMIN_IN_CAPSULE = 8192
"""What the capsule of an admin or Connect command takes, whatever the controller says."""
MAXH2CDATA_MIN = 4096
PDA_MAX = 31
CIDS = 1 << 16
AUTHENTICATION = 3 << 16  # of Connect's result: in-band authentication is asked for


class State(Enum):
    INITIALIZING = auto()
    CONNECTING = auto()
    RUNNING = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class Options:
    """How a queue is used; what both sides have to agree on is asked for by ICReq."""

    header_digest: bool = False
    data_digest: bool = False
    in_capsule: int = ADMIN_IN_CAPSULE
    """the most data that goes along with a command, in bytes"""
    r2ts: int = 1
    """that the target may have open for one command"""
    connect_tmo: float = 10.0
    command_tmo: float | None = 30.0


@dataclass(frozen=True, slots=True)
class Connected:
    """The queue takes commands now."""

    controller: int


@dataclass(frozen=True, slots=True)
class Completed:
    cid: int
    status: int
    """the status field without the phase; 0 is success"""
    result: int


@dataclass(frozen=True, slots=True)
class Terminated:
    """The connection is over. Unfinished commands may or may not have been carried out."""

    error: pdu.ProtocolError
    unfinished: tuple[int, ...]


Event = Connected | Completed | Terminated


@dataclass(slots=True)
class _Outstanding:
    deadline: float | None
    source: memoryview | None  # what goes to the controller
    data: memoryview | None  # the same, if it goes only when it is asked for
    into: memoryview | None  # what comes from the controller
    expected: int  # bytes, from there or asked for
    moved: int = 0  # bytes received, or asked for
    r2ts: int = 0
    damaged: bool = False


class QueuePair(Wire[Event]):
    """See the module. `Wire` has the methods that the shell receives and sends by."""

    RECEIVES: ClassVar = {
        State.INITIALIZING: frozenset({PduType.IC_RESP, PduType.C2H_TERM}),
        State.CONNECTING: frozenset({PduType.CAPSULE_RESP, PduType.C2H_TERM}),
        State.RUNNING: frozenset(
            {PduType.CAPSULE_RESP, PduType.C2H_DATA, PduType.R2T, PduType.C2H_TERM}
        ),
    }
    TERM = PduType.H2C_TERM

    def __init__(self, connect: Connect, options: Options, now: float) -> None:
        super().__init__(State.INITIALIZING)
        self.connect = connect
        self.options = options
        self.capacity = connect.entries - (1 if connect.flow_control else 0)
        self._outstanding: dict[int, _Outstanding] = {}
        self._next_cid = 0
        self._maxh2cdata = 0
        self._largest = 0  # of all reads so far; that of each command is looked at when it is known
        self._deadline: float | None = now + options.connect_tmo
        self._current: _Outstanding | None = None  # whose data is being received
        self._current_cid = 0
        self._current_flags = 0
        self._asked: list[_Outstanding] = []  # whose answers to R2Ts wait for data_to_send
        self._digests = (pdu.HDGST if options.header_digest else 0) | (
            pdu.DDGST if options.data_digest else 0
        )
        self._out.append(
            pdu.init(PduType.IC_REQ, alignment=0, digests=self._digests, limit=options.r2ts - 1)
        )

    # --- for the user ---

    @property
    def room(self) -> int:
        """How many more commands may be submitted now."""
        return self.capacity - len(self._outstanding) if self.state is State.RUNNING else 0

    def submit(
        self,
        command: Command,
        now: float,
        *,
        data: Buffer | None = None,
        into: memoryview | None = None,
        timed: bool = True,
    ) -> int:
        """Send a command, with the data that goes along or the buffer that is to be filled.

        Returns the CID that its Completed event will name. The buffer is the queue's until then.
        """
        if self.state is not State.RUNNING:
            raise LocalProtocolError(f"{command.name} while {self.state.name}")
        if not self.room:
            raise LocalProtocolError(f"{self.capacity} commands are outstanding already")
        if data is not None and into is not None:
            raise LocalProtocolError("data in both directions")
        for buffer in (data, into):
            if buffer is not None and not memoryview(buffer).c_contiguous:
                raise LocalProtocolError("a buffer in pieces")
        if into is not None and into.readonly:
            raise LocalProtocolError("a buffer that cannot be written to")
        return self._submit(command, now, data, into, timed)

    def abandon(self, cid: int) -> None:
        """Take a command's buffer away from it; the command itself goes on to its completion."""
        command = self._outstanding.get(cid)
        if command is None:
            raise LocalProtocolError(f"no command {cid} is outstanding")
        if command is self._current:
            self._sink = None
        command.into = None
        self._keep_source(command)

    def _keep_source(self, command: _Outstanding) -> None:
        """What is still to be sent of a command's data goes from a copy."""
        source = command.source
        if source is None:
            return
        kept = None if command.data is None else memoryview(bytes(source))
        command.data = command.source = kept
        self._out = [
            bytes(part) if isinstance(part, memoryview) and part.obj is source.obj else part
            for part in self._out
        ]

    def close(self) -> list[Event]:
        """Give the connection up, without a word to the peer."""
        return self.end(ConnectionLostError("closed by this end"))

    def end(self, error: pdu.ProtocolError) -> list[Event]:
        """The same, for a reason."""
        if self.error is None:
            self._end_with(error)
        return self._take_events()

    def data_to_send(self) -> list[Buffer]:
        for command in self._asked:
            command.r2ts = 0
        self._asked.clear()
        return super().data_to_send()

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to be called."""
        if self._deadline is not None or self.error is not None:
            return self._deadline
        for command in self._outstanding.values():  # in the order of their deadlines
            if command.deadline is not None:
                return command.deadline
        return None

    def handle_timer(self, now: float) -> list[Event]:
        deadline = self.get_timer()
        if self.error is None and deadline is not None and deadline <= now:
            waited = "a command" if self._deadline is None else self.state.name.lower()
            self._end_with(ConnectionLostError(f"no answer in time: {waited}"))
        return self._take_events()

    # --- commands ---

    def _submit(
        self,
        command: Command,
        now: float,
        data: Buffer | None,
        into: memoryview | None,
        timed: bool,
    ) -> int:
        cid = self._next_cid
        while cid in self._outstanding:
            cid = (cid + 1) % CIDS
        self._next_cid = (cid + 1) % CIDS
        tmo = self.options.command_tmo
        view = None if data is None else memoryview(data).cast("B")
        into = None if into is None else into.cast("B")
        size = len(view or into or b"")
        self._largest = max(self._largest, size)
        connecting = self.state is State.CONNECTING
        most = ADMIN_IN_CAPSULE if connecting else self.options.in_capsule
        inside = view is not None and 0 < size <= most
        entry = command.entry(cid, size, SGL_IN_CAPSULE if inside else SGL_TRANSPORT)
        self._outstanding[cid] = _Outstanding(
            deadline=now + tmo if timed and tmo is not None else None,
            source=view,
            data=None if inside else view,
            into=into,
            expected=0 if inside else size,
        )
        along = view if inside and view is not None else b""
        self._out += self.sending.frame(PduType.CAPSULE_CMD, 0, entry, along)
        return cid

    def _complete(self, cid: int, status: int, result: int) -> None:
        command = self._outstanding.pop(cid)
        if command.r2ts:
            self._keep_source(command)
        if command.damaged:
            status = Status.TRANSIENT_TRANSPORT.value
        if self.state is State.CONNECTING:
            self._connected(status, result)
        else:
            self._events.append(Completed(cid, status, result))

    def _connected(self, status: int, result: int) -> None:
        self._deadline = None
        if status == 0 and result & AUTHENTICATION:
            status = Status.ACCESS_DENIED | DO_NOT_RETRY
        if status:
            self._end_with(ConnectRefusedError(status, result))
            return
        self.state = State.RUNNING
        self._events.append(Connected(result & 0xFFFF))

    def _ended(self, error: pdu.ProtocolError) -> None:
        unfinished = tuple(self._outstanding) if self.state is State.RUNNING else ()
        self.state = State.CLOSED
        self._deadline = None
        self._current = None
        self._outstanding.clear()
        self._asked.clear()
        self._events.append(Terminated(error, unfinished))

    # --- what comes ---

    def _data_max(self, kind: PduType) -> int:
        return self._largest

    def _begin(self, header: Header, body: memoryview, size: int, now: float) -> memoryview | None:
        match header.kind:
            case PduType.CAPSULE_RESP:
                self._response(body)
            case PduType.C2H_DATA:
                return self._read_data(header, body, size)
            case PduType.R2T:
                self._ready_to_transfer(body)
            case PduType.IC_RESP:
                self._initialized(body, now)
            case _:
                fatal, info = pdu.TERM.unpack(body)
                message = f"the target gave up: FES {fatal}, FEI {info}"
                self._end_with(ConnectionLostError(message))
        return None

    def _initialized(self, body: memoryview, now: float) -> None:
        version, alignment, digests, maxh2cdata = pdu.INIT.unpack(body)
        field = Fatal.HEADER_FIELD
        check(version == 0, field, pdu.AT_PFV, "ICResp: PDU format {}", version)
        check(alignment <= PDA_MAX, field, pdu.AT_PDA, "ICResp: CPDA {}", alignment)
        agreed = digests == self._digests
        check(agreed, field, pdu.AT_DGST, "ICResp: digests {}, not {}", digests, self._digests)
        good = maxh2cdata >= MAXH2CDATA_MIN and maxh2cdata % 4 == 0
        check(good, field, pdu.AT_MAX, "ICResp: MAXH2CDATA {}", maxh2cdata)
        self._maxh2cdata = maxh2cdata
        header_digest, data_digest = bool(digests & pdu.HDGST), bool(digests & pdu.DDGST)
        self.receiving = Framing(header_digest, data_digest)
        self.sending = Framing(header_digest, data_digest, (alignment + 1) * 4)
        self.state = State.CONNECTING
        self._submit(self.connect.command(), now, self.connect.data(), None, timed=False)

    def _named(self, cid: int, kind: str) -> _Outstanding:
        command = self._outstanding.get(cid)
        # The CID of a completion is in its entry, elsewhere it is the first field.
        at = pdu.AT_CCCID if kind != "CapsuleResp" else 20
        if command is None:
            raise pdu.RemoteProtocolError(
                Fatal.HEADER_FIELD, at, f"{kind}: no command {cid} is outstanding"
            )
        return command

    def _response(self, body: memoryview) -> None:
        result, head, _, cid, status = CQE.unpack(body)
        status >>= 1
        command = self._named(cid, "CapsuleResp")
        if self.connect.flow_control and self.state is State.RUNNING:
            right = head < self.connect.entries
            check(right, Fatal.HEADER_FIELD, 16, "CapsuleResp: SQ head {}", head)
        if status == 0:
            missing = command.expected - command.moved
            check(not missing, Fatal.SEQUENCE, 0, "CapsuleResp: success, {} bytes missing", missing)
        self._complete(cid, status, result)

    def _read_data(self, header: Header, body: memoryview, size: int) -> memoryview | None:
        cid, _, offset, length = TRANSFER.unpack(body)
        command = self._named(cid, "C2HData")
        out_of_range = Fatal.OUT_OF_RANGE
        field = Fatal.HEADER_FIELD
        check(command.data is None, field, pdu.AT_CCCID, "C2HData: the command reads nothing")
        check(length == size > 0, field, pdu.AT_LENGTH, "C2HData: length {}", length)
        check(offset == command.moved, out_of_range, pdu.AT_OFFSET, "C2HData: offset {}", offset)
        end = offset + length
        check(end <= command.expected, out_of_range, pdu.AT_LENGTH, "C2HData: too much data")
        if header.flags & SUCCESS:
            last = header.flags & LAST and end == command.expected
            check(last, field, pdu.AT_FLAGS, "C2HData: SUCCESS before the end")
        command.moved = end
        self._current, self._current_cid = command, cid
        self._current_flags = header.flags
        return None if command.into is None else command.into[offset:end]

    def _finish(self, intact: bool, now: float) -> None:
        command, self._current = self._current, None
        assert command is not None
        if not intact:
            command.damaged = True
        if self._current_flags & SUCCESS:
            self._complete(self._current_cid, 0, 0)

    def _ready_to_transfer(self, body: memoryview) -> None:
        cid, tag, offset, length = TRANSFER.unpack(body)
        command = self._named(cid, "R2T")
        data = command.data
        if data is None:
            message = "R2T: the command has no data to send"
            raise pdu.RemoteProtocolError(Fatal.HEADER_FIELD, pdu.AT_CCCID, message)
        right = offset == command.moved
        check(right, Fatal.OUT_OF_RANGE, pdu.AT_OFFSET, "R2T: offset {}", offset)
        end = offset + length
        right = length > 0 and end <= command.expected
        check(right, Fatal.OUT_OF_RANGE, pdu.AT_LENGTH, "R2T: length {}", length)
        check(command.r2ts < self.options.r2ts, Fatal.LIMIT, 0, "R2T: too many")
        command.moved = end
        command.r2ts += 1
        self._asked.append(command)
        for at in range(offset, end, self._maxh2cdata):
            part = data[at : min(at + self._maxh2cdata, end)]
            flags = LAST if at + len(part) == end else 0
            fields = TRANSFER.pack(cid, tag, at, len(part))
            self._out += self.sending.frame(PduType.H2C_DATA, flags, fields, part)


class ConnectRefusedError(ConnectionLostError):
    """The controller refused the queue; `status` and `result` say why."""

    def __init__(self, status: int, result: int) -> None:
        super().__init__(f"Connect: {status_name(status)}, result {result:x}h")
        self.status = status
        self.result = result
