"""A QueuePair whose hot loop is in C (native/nvme_queue.h): to its user the same, but quicker.

Responsible for: handing the connection to C when Connect was answered, holding on to the buffers
that C works with, and taking the connection back, for good, with the first thing that is not in
order, so that there is one place that says what is wrong: `qpair`.
Invariants:
 1. A buffer stays exported from the moment its command is submitted until C touches it no more:
    until the command completed, was abandoned, or the connection is over.
 2. Either C has the commands, and `_pinned` their buffers, or `_outstanding` has both.
Must not know: event loops. A shell may give the socket's number, so that one call receives, places
and completes all that has come (`receive`), and one sends all that waits (`send`).
"""

from __future__ import annotations

import errno
from typing import Any

from userswap.backends.nvme_tcp.command import Command, Connect
from userswap.backends.nvme_tcp.pdu import (
    Buffer,
    ConnectionLostError,
    LocalProtocolError,
    ProtocolError,
)
from userswap.backends.nvme_tcp.qpair import (
    Completed,
    Event,
    Options,
    QueuePair,
    State,
    _Outstanding,
)
from userswap.native import check, ffi, lib

COUNT: int = lib.US_NVME_COUNT
LOOK: int = lib.US_NVME_LOOK
EOF: int = lib.US_NVME_EOF
OUT: int = lib.US_NVME_OUT
LATE: int = lib.US_NVME_LATE
NULL = ffi.NULL
BYTES = ffi.typeof("uint8_t[]")

# A command's deadline; its data, its buffer, and the export of either.
_Pinned = tuple[float | None, memoryview | None, memoryview | None, Any]


class NativeQueuePair(QueuePair):
    """See the module and `QueuePair`."""

    def __init__(self, connect: Connect, options: Options, now: float) -> None:
        super().__init__(connect, options, now)
        self._native: Any = None
        self._was_native = False
        self.was_closed = False
        """The peer closed the connection, and not this end."""
        self.has_answers = False
        """What came has to be answered: `send`."""
        self.was_late = False
        self._pinned: dict[int, _Pinned] = {}
        self._scratch_pin: Any = None
        self._room = ffi.new("struct us_nvme_room *")
        self._done = ffi.new("uint64_t[]", 2 * self.capacity)

    # --- for the user ---

    @property
    def outstanding(self) -> int:
        return len(self._pinned) + len(self._outstanding)

    @property
    def room(self) -> int:
        return super().room if self._native is None else self.capacity - len(self._pinned)

    def submit(
        self,
        command: Command,
        now: float,
        *,
        data: Buffer | None = None,
        into: memoryview | None = None,
        timed: bool = True,
    ) -> int:
        """As the QueuePair's, with less ado."""
        if self._native is None or len(self._pinned) >= self.capacity:
            return super().submit(command, now, data=data, into=into, timed=timed)
        view, pin, source, target = None, NULL, NULL, NULL
        try:
            if data is not None:
                view = memoryview(data).cast("B")
                pin = source = ffi.from_buffer(BYTES, view)
            if into is not None:
                into = into.cast("B")
                pin = target = ffi.from_buffer(BYTES, into, True)
        except (BufferError, TypeError):
            pin = None
        if pin is None or (view is not None and into is not None):  # to be told why
            return super().submit(command, now, data=data, into=into, timed=timed)
        opcode, nsid, cdw = command
        size = 0 if pin is NULL else len(pin)
        cid: int = lib.us_nvme_submit(self._native, opcode, nsid, cdw, source, target, size)
        if cid < 0:
            check(cid)
        tmo = self.options.command_tmo
        deadline = now + tmo if timed and tmo is not None else None
        self._pinned[cid] = (deadline, view, into, pin)
        return cid

    def abandon(self, cid: int) -> None:
        if self._native is None:
            super().abandon(cid)
            return
        rc = lib.us_nvme_abandon(self._native, cid)
        if rc == -errno.ENOENT:
            raise LocalProtocolError(f"no command {cid} is outstanding")
        if rc < 0:
            self._end_with(ConnectionLostError("no memory"))
            return
        self._pinned[cid] = (self._pinned[cid][0], None, None, None)

    def get_timer(self) -> float | None:
        for pinned in self._pinned.values():  # in the order of their deadlines
            if pinned[0] is not None:
                return pinned[0]
        return super().get_timer()

    # --- for the shell ---

    @property
    def direct(self) -> bool:
        """`receive` and `send` may be used."""
        return self._native is not None and not self._out

    def receive(self, fd: int, now: float) -> list[Event]:
        """Receive what a socket has, which does not block."""
        return self._took(lib.us_nvme_receive(self._native, fd, self._done), now)

    def receive_answers(self, fd: int, now: float) -> tuple[list[int], list[Event]]:
        """The same, with CID | status << 16 of each completion in place of its event. They come
        before the events, which are what ends the queue."""
        return self._answers(lib.us_nvme_receive(self._native, fd, self._done), now)

    def exchange(self, fd: int, now: float, wait_ns: int) -> tuple[list[int], list[Event]]:
        """Send, and look for answers for so long, or until something completed; `was_late` tells
        which."""
        return self._answers(lib.us_nvme_exchange(self._native, fd, wait_ns, self._done), now)

    def _answers(self, rc: int, now: float) -> tuple[list[int], list[Event]]:
        answers = self._completions(rc)[::2]
        self.has_answers = self.was_late = False
        return answers, self._went_on(rc, now) if rc & ~COUNT else []

    def send(self, fd: int) -> bool:
        """Send what waits, to a socket that does not block; is all of it sent?

        That the connection broke is told by `receive`, after what came before.
        """
        rc = lib.us_nvme_send(self._native, fd)
        return bool(rc <= 0)

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        if self._native is None:
            return super().get_buffer(sizehint)
        place = self._room
        lib.us_nvme_room(self._native, place)
        room = self._scratch if place.cid < 0 else self._pinned[place.cid][2]
        assert room is not None
        self._offered = place.length
        return room[place.at : place.at + place.length]

    def buffer_updated(self, count: int, now: float) -> list[Event]:
        if self._native is None:
            return super().buffer_updated(count, now)
        if not 0 <= count <= self._offered:
            raise LocalProtocolError(f"{count} bytes in a buffer of {self._offered}")
        self._offered = 0
        return self._took(lib.us_nvme_take(self._native, count, self._done), now)

    def data_to_send(self) -> list[Buffer]:
        out = super().data_to_send()
        if self._native is not None:
            out += self._unsent()
        return out

    # --- to C and back ---

    def _proceed(self, now: float) -> None:
        super()._proceed(now)
        if self.state is State.RUNNING and not self._was_native:
            self._was_native = True
            self._native = self._open()

    def _submit(
        self,
        command: Command,
        now: float,
        data: Buffer | None,
        into: memoryview | None,
        timed: bool,
    ) -> int:
        if self._native is not None:
            raise LocalProtocolError("a buffer that C cannot use")
        return super()._submit(command, now, data, into, timed)

    def _open(self) -> Any:
        assert not self._outstanding
        self._scratch_pin = ffi.from_buffer(BYTES, self._scratch, True)
        form = ffi.new(
            "struct us_nvme_form *",
            {
                "capacity": self.capacity,
                "entries": self.connect.entries if self.connect.flow_control else 0,
                "in_capsule": self.options.in_capsule,
                "maxh2cdata": self._maxh2cdata,
                "r2ts": self.options.r2ts,
                "alignment": self.sending.alignment,
                "next_cid": self._next_cid,
                "largest": self._largest,
                "header_digest": self.sending.header_digest,
                "data_digest": self.sending.data_digest,
                "scratch": self._scratch_pin,
                "scratch_size": len(self._scratch),
                "start": self._start,
                "end": self._end,
            },
        )
        out = ffi.new("struct us_nvme_queue **")
        check(lib.us_nvme_open(out, form))
        return ffi.gc(out[0], lib.us_nvme_close)

    def _took(self, rc: int, now: float) -> list[Event]:
        """What C returned from taking bytes, as events."""
        values = iter(self._completions(rc))
        for key, result in zip(values, values, strict=True):
            self._events.append(Completed(key & 0xFFFF, key >> 16, result))
        return self._went_on(rc, now)

    def _completions(self, rc: int) -> list[int]:
        """The completions among it, each as CID | status << 16 and the result."""
        if rc <= 0 or not (count := rc & COUNT):
            return []
        values: list[int] = ffi.unpack(self._done, 2 * count)
        for key in values[::2]:
            del self._pinned[key & 0xFFFF]
        return values

    def _went_on(self, rc: int, now: float) -> list[Event]:
        """Whether it goes on."""
        if rc < 0:
            try:
                check(rc)
            except OSError as error:
                self.was_closed = isinstance(error, ConnectionError)
                self._end_with(ConnectionLostError(f"the connection broke: {error.strerror}"))
        elif rc & LOOK:
            self._recall()
            self._proceed(now)
        elif rc & EOF:
            self.was_closed = True
            return self.eof_received()
        self.has_answers = rc > 0 and rc & OUT != 0
        self.was_late = rc > 0 and rc & LATE != 0
        return self._take_events()

    def _end_with(self, error: ProtocolError) -> None:
        if self._native is not None:
            self._recall()
        super()._end_with(error)

    def _recall(self) -> None:
        """Take over from C, for good."""
        native = self._native
        form = lib.us_nvme_form(native)
        self._next_cid, self._largest = form.next_cid, form.largest
        self._start, self._end = form.start, form.end
        for cid, (deadline, source, into, _) in self._pinned.items():
            command = lib.us_nvme_command(native, cid)
            expected, data = command.expected, None
            if command.data != ffi.NULL:
                # An abandoned command's is C's own copy.
                data = source or memoryview(bytes(ffi.buffer(command.data, expected)))
            outstanding = _Outstanding(deadline, source, data, into, expected)
            outstanding.moved, outstanding.r2ts = command.moved, command.r2ts
            outstanding.damaged = command.damaged
            self._outstanding[cid] = outstanding
            if command.r2ts:
                self._asked.append(outstanding)
        self._out += self._unsent()
        self._native = None
        self._pinned.clear()

    def _unsent(self) -> list[Buffer]:
        """Take what C has to send."""
        out: list[Buffer] = []
        piece = ffi.new("struct us_nvme_piece *")
        total = 0
        while lib.us_nvme_piece(self._native, len(out), piece):
            source = self._pinned[piece.cid][1] if piece.cid >= 0 else None
            if source is not None:
                out.append(source[piece.offset : piece.offset + piece.length])
            else:
                out.append(bytes(ffi.buffer(piece.bytes, piece.length)))
            total += piece.length
        lib.us_nvme_sent(self._native, total)
        return out
