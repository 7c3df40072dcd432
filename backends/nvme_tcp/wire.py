"""One end of a connection, whichever: bytes in, PDUs checked and taken apart, buffers out.

Responsible for: where the next received bytes belong (`get_buffer`), finding the PDUs in them, both
digests, and ending the connection with the right TermReq when the peer broke the protocol.
Invariants:
 1. How the bytes are cut does not matter: the same bytes give the same events and the same answer.
 2. Data goes to the buffer that `_begin` named for it, and never beyond; the scratch buffer holds
    headers, and data only until the next call.
 3. Nothing of a PDU is looked at before its header's digest was found right, but for the first
    eight bytes, without which the digest cannot be found.
 4. After `error` is set nothing is received, sent or completed any more.
Must not know: what PDUs mean, sockets, the time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.pdu import (
    DIGEST_BYTES,
    Buffer,
    ConnectionLostError,
    Fatal,
    Framing,
    Header,
    LocalProtocolError,
    PduType,
    RemoteProtocolError,
    check,
)

SCRATCH_BYTES = 64 * 1024
"""Takes many small PDUs in one receive; copying a page out of it costs less than another one."""
SCRATCH_SMALL = 8 * 1024
"""Enough to begin with, for one whose peer has not said who it is."""
SCRATCH_LOW = 4096
"""With less room than this what is left over moves to the front; it is part of a header at most."""
CHECKED_MAX = 32
"""First eight bytes of PDUs that were found right; a queue's traffic has few different ones."""
DIRECT_MIN = 1024
"""Of data that is missing, in bytes: from here on a receive of its own beats a copy."""

Event = TypeVar("Event")


class Wire(ABC, Generic[Event]):
    """What host and target have in common; each adds what it does with a PDU."""

    RECEIVES: ClassVar[Mapping[Any, frozenset[PduType]]]
    """Which PDUs may come in which state."""
    TERM: ClassVar[PduType]
    """The TermReq that this end sends."""

    def __init__(self, state: Enum, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self.state = state
        self.error: pdu.ProtocolError | None = None
        self.receiving = Framing()
        self.sending = Framing()
        self._out: list[Buffer] = []
        self._events: list[Event] = []
        self._possible = frozenset[int]().union(*self.RECEIVES.values())
        self._checked: dict[tuple[Enum, bytes], tuple[Header, PduType, int]] = {}
        self._known = 0  # bytes of a header at fault that may be quoted, however they were cut
        self._scratch = memoryview(bytearray(scratch_bytes))
        self._start = self._end = 0  # of what was received into scratch and not yet taken
        self._offered = 0  # bytes that the last get_buffer() had room for
        self._direct = False  # it was the data's own buffer
        # Of the PDU whose header was taken and whose data has not come entirely:
        self._in_data = False
        self._padding = 0
        self._sink: memoryview | None = None  # None: nobody wants the data
        self._missing = 0
        self._trailer = False
        self._crc = 0

    # --- for the shell ---

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes belong; then tell `buffer_updated` how many there were."""
        sink = self._sink
        self._direct = (
            sink is not None
            and self._missing >= DIRECT_MIN
            and not self._padding
            and self._start == self._end
            and self.error is None
        )
        if sink is not None and self._direct:
            room = sink[len(sink) - self._missing :]
        else:
            self._make_room()
            room = self._scratch[self._end :]
        self._offered = len(room)
        return room

    def buffer_updated(self, count: int, now: float) -> list[Event]:
        """So many bytes came into the buffer that `get_buffer` gave; what follows from them."""
        if not 0 <= count <= self._offered:
            raise LocalProtocolError(f"{count} bytes in a buffer of {self._offered}")
        self._offered -= count
        if self.error is not None:
            return self._take_events()
        if self._direct:
            sink = self._sink
            assert sink is not None
            at = len(sink) - self._missing
            self._count_data(sink[at : at + count])
            self._direct = False
            self._offered = 0
        else:
            self._end += count
            self._offered = 0
        self._proceed(now)
        return self._take_events()

    def receive_data(self, data: Buffer, now: float) -> list[Event]:
        """Receive bytes that already lie somewhere: copies them to where they belong."""
        events: list[Event] = []
        rest = memoryview(data).cast("B")
        while len(rest):
            room = self.get_buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            events += self.buffer_updated(count, now)
            rest = rest[count:]
        return events

    def eof_received(self) -> list[Event]:
        """The peer sends nothing more, or the connection broke."""
        if self.error is None:
            self._end_with(ConnectionLostError("the peer closed the connection"))
        return self._take_events()

    def data_to_send(self) -> list[Buffer]:
        """What to send now, in order; buffers of the user are among it, uncopied."""
        out, self._out = self._out, []
        return out

    # --- for the ends ---

    @abstractmethod
    def _data_max(self, kind: PduType) -> int:
        """The most data that a PDU of this kind may bring."""

    @abstractmethod
    def _begin(self, header: Header, body: memoryview, size: int, now: float) -> memoryview | None:
        """Take a PDU's header; says where its `size` bytes of data go (None: nowhere)."""

    @abstractmethod
    def _finish(self, intact: bool, now: float) -> None:
        """The data of the PDU that began last has come; is its digest right?"""

    @abstractmethod
    def _ended(self, error: pdu.ProtocolError) -> None:
        """The connection is over; `error` says why."""

    def _end_with(self, error: pdu.ProtocolError) -> None:
        self.error = error
        self._out.clear()
        self._sink = None
        self._in_data = False
        self._start = self._end = 0
        self._ended(error)

    def _refuse(self, error: RemoteProtocolError, header: bytes) -> None:
        self._end_with(error)
        self._out.append(pdu.term(self.TERM, error, header))

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _widen(self) -> None:
        """Have the whole scratch buffer from now on; not while something is being received."""
        left = self._scratch[self._start : self._end]
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._scratch[: len(left)] = left
        self._start, self._end, self._offered = 0, len(left), 0

    # --- taking PDUs apart ---

    def _proceed(self, now: float) -> None:
        """Take all that was received."""
        try:
            while self._advance(now):
                pass
        except RemoteProtocolError as error:
            self._refuse(error, bytes(self._scratch[self._start : self._start + self._known]))

    def _make_room(self) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._scratch) - self._end < SCRATCH_LOW:
            left = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(left)] = left
            self._start, self._end = 0, len(left)

    def _advance(self, now: float) -> bool:
        """Take one step; False when more bytes are needed for it, or the connection is over."""
        if self.error is not None:
            return False
        if not self._in_data:
            return self._take_header(now)
        skipped = min(self._end - self._start, self._padding)
        self._padding -= skipped
        self._start += skipped
        if not self._padding and self._missing:
            self._place(min(self._end - self._start, self._missing))
        if self._padding or self._missing:
            return False
        intact = True
        if self._trailer:
            if self._end - self._start < DIGEST_BYTES:
                return False
            found = self._scratch[self._start : self._start + DIGEST_BYTES]
            intact = int.from_bytes(found, "little") == self._crc
            self._start += DIGEST_BYTES
        self._in_data = False
        self._sink = None
        self._known = 0
        self._finish(intact, now)
        return True

    def _place(self, count: int) -> None:
        """Put the next bytes of data, which came into scratch, where they belong."""
        chunk = self._scratch[self._start : self._start + count]
        if self._sink is not None:
            at = len(self._sink) - self._missing
            self._sink[at : at + count] = chunk
        self._count_data(chunk)
        self._start += count

    def _count_data(self, chunk: memoryview) -> None:
        self._missing -= len(chunk)
        if self._trailer:
            self._crc = pdu.crc32c(chunk, self._crc)

    def _take_header(self, now: float) -> bool:
        available = self._end - self._start
        self._known = pdu.COMMON.size
        if available < pdu.COMMON.size:
            return False
        key = (self.state, bytes(self._scratch[self._start : self._start + pdu.COMMON.size]))
        if (checked := self._checked.get(key)) is None:
            checked = self._check_header(Header._make(pdu.COMMON.unpack(key[1])))
            if len(self._checked) < CHECKED_MAX:
                self._checked[key] = checked
        header, kind, size = checked
        hlen = header.hlen
        digested = self.receiving.header_digest and kind not in pdu.WITHOUT_DIGEST
        total = hlen + DIGEST_BYTES if digested else hlen
        if available < total:
            return False
        self._known = hlen
        start = self._start
        if digested:
            found = int.from_bytes(self._scratch[start + hlen : start + total], "little")
            right = pdu.crc32c(self._scratch[start : start + hlen])
            check(found == right, Fatal.HEADER_DIGEST, found, "wrong header digest")
        body = self._scratch[start + pdu.COMMON.size : start + hlen]
        sink = self._begin(header, body, size, now)
        if self.error is not None:
            return False
        assert sink is None or len(sink) == size
        self._start += total
        if size:
            self._in_data = True
            self._sink = sink
            self._missing = size
            self._padding = max(header.pdo - total, 0)
            self._trailer = self.receiving.data_digest and kind in pdu.WITH_DATA
            self._crc = 0
        return True

    def _check_header(self, header: Header) -> tuple[Header, PduType, int]:
        """Of the PDU that begins so: its kind and how much data it has.

        What is right stays right in a state: forms of PDUs change only with it, and limits grow.
        """
        at_field = Fatal.HEADER_FIELD
        check(header.kind in self._possible, at_field, pdu.AT_TYPE, "type {}", header.kind)
        kind = PduType(header.kind)
        expected = kind in self.RECEIVES[self.state]
        check(expected, Fatal.SEQUENCE, pdu.AT_TYPE, "{0.name} while {1.name}", kind, self.state)
        check(header.hlen == pdu.HLEN[kind], at_field, pdu.AT_HLEN, "{0.name}: HLEN", kind)
        if kind in (PduType.H2C_TERM, PduType.C2H_TERM):
            size = header.plen - header.hlen
            fits = 0 <= size <= pdu.TERM_DATA_MAX
            check(fits, at_field, pdu.AT_PLEN, "{0.name}: PLEN", kind)
            return header, kind, size
        plain = kind in pdu.WITHOUT_DIGEST
        agreed = pdu.HDGST if self.receiving.header_digest and not plain else 0
        check(header.flags & pdu.HDGST == agreed, at_field, pdu.AT_FLAGS, "{0.name}: HDGSTF", kind)
        least = header.hlen + (DIGEST_BYTES if agreed else 0)
        if header.plen == least or kind not in pdu.WITH_DATA:
            check(header.plen == least, at_field, pdu.AT_PLEN, "{0.name}: PLEN", kind)
            return header, kind, 0
        agreed = pdu.DDGST if self.receiving.data_digest else 0
        check(header.flags & pdu.DDGST == agreed, at_field, pdu.AT_FLAGS, "{0.name}: DDGSTF", kind)
        aligned = header.pdo >= least and header.pdo % self.receiving.alignment == 0
        check(aligned, at_field, pdu.AT_PDO, "{0.name}: data at {1}", kind, header.pdo)
        size = header.plen - header.pdo - (DIGEST_BYTES if agreed else 0)
        check(size > 0, at_field, pdu.AT_PLEN, "{0.name}: PLEN", kind)
        few = size <= self._data_max(kind)
        check(few, Fatal.LIMIT, pdu.AT_PLEN, "{0.name}: {1} bytes of data", kind, size)
        return header, kind, size
