"""What goes over the wire: the protocol data units of NVMe/TCP, their layout and their digests.

Responsible for: every PDU's fields, sizes and offsets (asserted below, on import); putting a PDU
together, with alignment and digests; and the errors by which the two ends tell their own mistakes
from those of the peer.
Must not know: queues, commands, in which order PDUs come.

All numbers are little-endian. A PDU is a header of HLEN bytes, of which the first eight are common
to all; then, if agreed on, the header's digest; then, where there is data, padding up to PDO, the
data, and if agreed on its digest. PLEN counts all of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from userswap.native import ffi, lib

Buffer = bytes | bytearray | memoryview


class PduType(IntEnum):
    IC_REQ = 0
    IC_RESP = 1
    H2C_TERM = 2
    C2H_TERM = 3
    CAPSULE_CMD = 4
    CAPSULE_RESP = 5
    H2C_DATA = 6
    C2H_DATA = 7
    R2T = 9


class Fatal(IntEnum):
    """FES of a TermReq: why one end gives the connection up."""

    HEADER_FIELD = 1
    SEQUENCE = 2
    HEADER_DIGEST = 3
    OUT_OF_RANGE = 4
    LIMIT = 5
    UNSUPPORTED = 6


HDGST, DDGST = 1, 2
"""Which digests: in the flags of a PDU, and in the DGST field of ICReq and ICResp."""
LAST, SUCCESS = 4, 8

COMMON = Struct("<BBBBI")  # type, flags, HLEN, PDO, PLEN
INIT = Struct("<HBBI112x")  # PFV, HPDA or CPDA, DGST, MAXR2T or MAXH2CDATA
TRANSFER = Struct("<HHII4x")  # CCCID, TTAG, offset, length: of R2T, H2CData and C2HData
TERM = Struct("<HI10x")  # FES, FEI
SQE_BYTES, CQE_BYTES, DIGEST_BYTES = 64, 16, 4

HLEN = {
    PduType.IC_REQ: 128,
    PduType.IC_RESP: 128,
    PduType.H2C_TERM: 24,
    PduType.C2H_TERM: 24,
    PduType.CAPSULE_CMD: 72,
    PduType.CAPSULE_RESP: 24,
    PduType.H2C_DATA: 24,
    PduType.C2H_DATA: 24,
    PduType.R2T: 24,
}
WITH_DATA = {PduType.CAPSULE_CMD, PduType.H2C_DATA, PduType.C2H_DATA}
WITHOUT_DIGEST = {PduType.IC_REQ, PduType.IC_RESP, PduType.H2C_TERM, PduType.C2H_TERM}
KNOWN = frozenset(HLEN)

TERM_DATA_MAX = 128  # the header of the PDU at fault, at its longest
PDO_MAX = 255  # one byte

# Where errors point at (FEI), by the field's offset in the PDU.
AT_TYPE, AT_FLAGS, AT_HLEN, AT_PDO, AT_PLEN = range(5)
AT_PFV, AT_PDA, AT_DGST, AT_MAX = 8, 10, 11, 12
AT_CCCID, AT_TTAG, AT_OFFSET, AT_LENGTH = 8, 10, 12, 16


assert COMMON.size == 8
assert COMMON.pack(1, 2, 3, 4, 5) == b"\1\2\3\4\5\0\0\0"
assert dict.fromkeys((PduType.IC_REQ, PduType.IC_RESP), 8 + INIT.size).items() <= HLEN.items()
assert HLEN[PduType.CAPSULE_CMD] == 8 + SQE_BYTES
assert HLEN[PduType.CAPSULE_RESP] == 8 + CQE_BYTES
assert all(8 + TRANSFER.size == HLEN[PduType(kind)] for kind in (6, 7, 9))
assert all(8 + TERM.size == HLEN[PduType(kind)] for kind in (2, 3))
assert bytes(8) + INIT.pack(0x0100, 2, 3, 4) == bytes(9) + b"\1\2\3\4" + bytes(115)
assert bytes(8) + TRANSFER.pack(1 << 8, 1, 1, 1) == (
    bytes(AT_CCCID + 1) + b"\1" + b"\1\0" + b"\1\0\0\0" + b"\1\0\0\0" + bytes(4)
)
assert bytes(8) + TERM.pack(1, 2) == bytes(8) + b"\1\0" + b"\2\0\0\0" + bytes(10)


class ProtocolError(Exception):
    """The connection, or the call, cannot go on."""


class LocalProtocolError(ProtocolError):
    """This end's user asked for what the protocol, or the state of the queue, does not allow.

    Nothing was sent and nothing changed.
    """


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; `fatal` and `info` are what the TermReq told it."""

    def __init__(self, fatal: Fatal, info: int, message: str) -> None:
        super().__init__(message)
        self.fatal = fatal
        self.info = info


class ConnectionLostError(ProtocolError):
    """The connection ended, or the peer gave it up, or did not answer in time."""


class Header(NamedTuple):
    """The eight bytes that all PDUs begin with."""

    kind: int
    flags: int
    hlen: int
    pdo: int
    plen: int


def crc32c(data: Buffer, crc: int = 0) -> int:
    """The checksum of `data` after bytes whose checksum is `crc`."""
    return int(lib.us_crc32c(crc, ffi.from_buffer(data), memoryview(data).nbytes))


def digest(data: Buffer) -> bytes:
    return crc32c(data).to_bytes(DIGEST_BYTES, "little")


@dataclass(frozen=True, slots=True)
class Framing:
    """What the two ends agreed on about the form of the PDUs that one of them sends."""

    header_digest: bool = False
    data_digest: bool = False
    alignment: int = 4
    """of the data, in bytes from the start of the PDU"""

    def frame(self, kind: PduType, flags: int, body: bytes, data: Buffer = b"") -> list[Buffer]:
        """The PDU as buffers to be sent one after the other; `data` itself is among them."""
        hlen = plen = COMMON.size + len(body)
        pdo = 0
        if self.header_digest:
            flags |= HDGST
            plen += DIGEST_BYTES
        size = memoryview(data).nbytes
        if size:
            pdo = -(-plen // self.alignment) * self.alignment
            plen = pdo + size
            if self.data_digest:
                flags |= DDGST
                plen += DIGEST_BYTES
        head = COMMON.pack(kind, flags, hlen, pdo, plen) + body
        if self.header_digest:
            head += digest(head)
        if not size:
            return [head]
        head = head.ljust(pdo, b"\0")
        return [head, data, digest(data)] if self.data_digest else [head, data]


PLAIN = Framing()
"""Of ICReq, ICResp and the TermReqs, whatever was agreed on."""


def init(kind: PduType, *, alignment: int, digests: int, limit: int, version: int = 0) -> bytes:
    """ICReq with HPDA and MAXR2T, or ICResp with CPDA and MAXH2CDATA."""
    (head,) = PLAIN.frame(kind, 0, INIT.pack(version, alignment, digests, limit))
    return bytes(head)


def term(kind: PduType, error: RemoteProtocolError, header: bytes) -> bytes:
    """A TermReq; it carries the header of the PDU that was at fault."""
    header = header[:TERM_DATA_MAX]
    plen = HLEN[kind] + len(header)
    body = TERM.pack(error.fatal, error.info & 0xFFFFFFFF)
    return COMMON.pack(kind, 0, HLEN[kind], 0, plen) + body + header


def check(true: object, fatal: Fatal, info: int, message: str, *details: object) -> None:
    """Raise a RemoteProtocolError of those words, which details are put into, if it is not true."""
    if not true:
        raise RemoteProtocolError(fatal, info, message.format(*details))
