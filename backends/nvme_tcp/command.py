"""What is said inside the capsules: commands, completions, and what their numbers mean.

Responsible for: the submission queue entry and the completion queue entry; the commands that a host
of one namespace needs, over Fabrics; status codes, their names, and whether to try again.
Must not know: how capsules travel, who sends them.

Sections are those of the NVM Express Base Specification 2.0 and the NVM Command Set 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

# opcode, flags, CID, NSID or FCTYPE, SGL1 (address, length, identifier), CDW10..15
SQE = Struct("<BBHI16xQI3xB24s")
CQE = Struct("<QHHHH")  # result, SQ head, SQ id, CID, status with the phase in bit 0
CONNECT_DATA = Struct("<16sH238x256s256s256x")  # host id, controller id, subsystem NQN, host NQN
RANGE = Struct("<IIQ")  # of Dataset Management: attributes, blocks, first block
assert SQE.size == 64
assert (
    SQE.pack(1, 2, 3, 4, 5, 6, 7, bytes(24))[24:40] == b"\5" + bytes(7) + b"\6" + bytes(6) + b"\7"
)
assert CQE.size == RANGE.size == 16
assert CONNECT_DATA.size == 1024
assert CONNECT_DATA.pack(bytes(16), 1, b"s", b"h").index(b"s") == 256

BY_SGL = 0x40  # flags: PSDT 01b, the only form that Fabrics know
SGL_IN_CAPSULE, SGL_TRANSPORT = 0x01, 0x5A
FABRICS = 0x7F
ANY_CONTROLLER = 0xFFFF
ALL_NAMESPACES = 0xFFFFFFFF
RANGES_MAX = 256


class Admin(IntEnum):
    GET_LOG = 0x02
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C
    KEEP_ALIVE = 0x18


class Io(IntEnum):
    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09


class Fctype(IntEnum):
    PROPERTY_SET = 0x00
    CONNECT = 0x01
    PROPERTY_GET = 0x04


class Property(IntEnum):
    CAP = 0x00
    VS = 0x08
    CC = 0x14
    CSTS = 0x1C


class Cns(IntEnum):
    """What to identify."""

    NAMESPACE = 0
    CONTROLLER = 1
    ACTIVE_NAMESPACES = 2
    DESCRIPTORS = 3
    COMMAND_SET_NAMESPACE = 5
    COMMAND_SET_CONTROLLER = 6


class Log(IntEnum):
    ERRORS = 0x01
    HEALTH = 0x02
    CHANGED_NAMESPACES = 0x04
    EFFECTS = 0x05
    DISCOVERY = 0x70


class Feature(IntEnum):
    VOLATILE_WRITE_CACHE = 0x06
    QUEUES = 0x07
    ASYNC_EVENTS = 0x0B
    KEEP_ALIVE = 0x0F


CC_ENABLE = 1 | 6 << 16 | 4 << 20  # entries of 2**6 and 2**4 bytes
CC_SHUTDOWN = 1 << 14
CSTS_READY, CSTS_FAILED = 1, 2
CSTS_SHUTDOWN_MASK, CSTS_SHUTDOWN_DONE = 0b1100, 0b1000
NO_FLOW_CONTROL = 1 << 2  # CATTR
FUA = 1 << 30
DEALLOCATE = 1 << 25
EVENT_NAMESPACES = 1 << 8  # of the asynchronous events: the list of namespaces changed
EVENT_NAMESPACES_RESULT = 0x0004_0002
"""Of the completion: a notice (02h), the namespaces changed (00h), log 04h says which."""

_CDW = Struct("<6I")
_BLOCKS = Struct("<QI12x")  # the same of a command on blocks: the first, how many, flags


class Command(NamedTuple):
    """A submission queue entry without what belongs to the way it is sent: CID and SGL."""

    opcode: int
    nsid: int = 0
    """FCTYPE of a Fabrics command"""
    cdw: bytes = bytes(24)
    """CDW10 to CDW15"""

    def entry(self, cid: int, length: int = 0, sgl: int = SGL_TRANSPORT) -> bytes:
        return SQE.pack(self.opcode, BY_SGL, cid, self.nsid, 0, length, sgl, self.cdw)

    @property
    def name(self) -> str:
        if self.opcode == FABRICS:
            return f"Fabrics {self.nsid:02x}h"
        return f"command {self.opcode:02x}h"

    def dwords(self) -> tuple[int, ...]:
        return _CDW.unpack(self.cdw)


class Sqe(NamedTuple):
    """A submission queue entry as it came."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    address: int
    length: int
    sgl: int
    cdw: bytes

    @property
    def command(self) -> Command:
        return Command(self.opcode, self.nsid, self.cdw)

    def dwords(self) -> tuple[int, ...]:
        """CDW10 to CDW15."""
        return _CDW.unpack(self.cdw)

    @property
    def direction(self) -> int:
        """0 no data, 1 to the controller, 2 to the host."""
        return (self.nsid if self.opcode == FABRICS else self.opcode) & 3


def _cdw(*dwords: int) -> bytes:
    return _CDW.pack(*dwords, *(0,) * (6 - len(dwords)))


# --- Fabrics ---


@dataclass(frozen=True, slots=True)
class Connect:
    """Who wants which queue of which subsystem."""

    subsystem: str
    host: str
    host_id: bytes
    queue: int = 0
    entries: int = 32
    controller: int = ANY_CONTROLLER
    keep_alive_ms: int = 0
    flow_control: bool = True

    def command(self) -> Command:
        attributes = 0 if self.flow_control else NO_FLOW_CONTROL
        queue = self.queue << 16
        size = self.entries - 1 | attributes << 16
        return Command(FABRICS, Fctype.CONNECT, _cdw(queue, size, self.keep_alive_ms))

    def data(self) -> bytes:
        return CONNECT_DATA.pack(
            self.host_id, self.controller, self.subsystem.encode(), self.host.encode()
        )

    @classmethod
    def parse(cls, command: Command, data: memoryview) -> Connect:
        """ValueError says at which offset of the data there is nonsense."""
        queue, size, keep_alive, *_ = command.dwords()
        host_id, controller, subsystem, host = CONNECT_DATA.unpack(data)
        return cls(
            subsystem=nqn(subsystem),
            host=nqn(host),
            host_id=host_id,
            queue=queue >> 16,
            entries=(size & 0xFFFF) + 1,
            controller=controller,
            keep_alive_ms=keep_alive,
            flow_control=not size >> 16 & NO_FLOW_CONTROL,
        )


def nqn(text: bytes) -> str:
    """A name out of its zero-padded field; ValueError if it is not one."""
    name, ended, _ = text.partition(b"\0")
    if not name or not ended:
        raise ValueError(f"not an NQN: {text[:32]!r}")
    return name.decode()  # a UnicodeDecodeError is a ValueError


def property_get(register: Property) -> Command:
    wide = int(register == Property.CAP)
    return Command(FABRICS, Fctype.PROPERTY_GET, _cdw(wide, register))


def property_set(register: Property, value: int) -> Command:
    return Command(FABRICS, Fctype.PROPERTY_SET, _cdw(0, register, value))


# --- admin ---


def identify(what: Cns, nsid: int = 0) -> Command:
    return Command(Admin.IDENTIFY, nsid, _cdw(what))


def set_features(feature: Feature, value: int) -> Command:
    return Command(Admin.SET_FEATURES, 0, _cdw(feature, value))


def set_queues(count: int) -> Command:
    """Ask for I/O queues; the completion grants (submission - 1 | completion - 1 << 16)."""
    return set_features(Feature.QUEUES, count - 1 | count - 1 << 16)


def get_log(log: Log, length: int, offset: int = 0, nsid: int = ALL_NAMESPACES) -> Command:
    words = length // 4 - 1
    cdw = _cdw(log | (words & 0xFFFF) << 16, words >> 16, offset & 0xFFFFFFFF, offset >> 32)
    return Command(Admin.GET_LOG, nsid, cdw)


KEEP_ALIVE = Command(Admin.KEEP_ALIVE)
ASYNC_EVENT = Command(Admin.ASYNC_EVENT)


# --- I/O ---


def _on_blocks(opcode: Io, nsid: int, first: int, count: int, flags: int = 0) -> Command:
    return Command(opcode, nsid, _BLOCKS.pack(first, count - 1 | flags))


def read(nsid: int, first: int, count: int) -> Command:
    return _on_blocks(Io.READ, nsid, first, count)


def write(nsid: int, first: int, count: int, *, fua: bool = False) -> Command:
    return _on_blocks(Io.WRITE, nsid, first, count, FUA if fua else 0)


def write_zeroes(nsid: int, first: int, count: int, *, deallocate: bool = True) -> Command:
    return _on_blocks(Io.WRITE_ZEROES, nsid, first, count, DEALLOCATE if deallocate else 0)


def flush(nsid: int) -> Command:
    return Command(Io.FLUSH, nsid)


def deallocate(nsid: int, ranges: Sequence[tuple[int, int]]) -> tuple[Command, bytes]:
    """Dataset Management and its data, of ranges (first block, blocks)."""
    data = b"".join(RANGE.pack(0, count, first) for first, count in ranges)
    return Command(Io.DATASET_MANAGEMENT, nsid, _cdw(len(ranges) - 1, 1 << 2)), data


def blocks_of(dwords: tuple[int, ...]) -> tuple[int, int]:
    """First block and number of blocks of a Read, Write or Write Zeroes."""
    low, high, count, *_ = dwords
    return low | high << 32, (count & 0xFFFF) + 1


# --- status ---


class Status(IntEnum):
    """SCT << 8 | SC, of the codes that are met."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    CID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORTED = 0x007
    INVALID_NAMESPACE = 0x00B
    SEQUENCE_ERROR = 0x00C
    SGL_LENGTH_INVALID = 0x00F
    SGL_TYPE_INVALID = 0x011
    KEEP_ALIVE_EXPIRED = 0x019
    KEEP_ALIVE_INVALID = 0x01A
    SANITIZE_FAILED = 0x01C
    NAMESPACE_WRITE_PROTECTED = 0x020
    INTERRUPTED = 0x021
    TRANSIENT_TRANSPORT = 0x022
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    NAMESPACE_NOT_READY = 0x082
    RESERVATION_CONFLICT = 0x083
    ASYNC_EVENTS_EXCEEDED = 0x105
    INVALID_LOG_PAGE = 0x109
    CONNECT_FORMAT = 0x180
    CONNECT_BUSY = 0x181
    CONNECT_INVALID = 0x182
    CONNECT_RESTART_DISCOVERY = 0x183
    CONNECT_INVALID_HOST = 0x184
    WRITE_FAULT = 0x280
    UNRECOVERED_READ = 0x281
    COMPARE_FAILED = 0x285
    ACCESS_DENIED = 0x286
    DEALLOCATED_BLOCK = 0x287
    PATH_ERROR = 0x300
    ASYMMETRIC_ACCESS_LOSS = 0x301
    ASYMMETRIC_ACCESS_INACCESSIBLE = 0x302
    ASYMMETRIC_ACCESS_TRANSITION = 0x303
    CONTROLLER_PATH_ERROR = 0x360
    HOST_PATH_ERROR = 0x370
    HOST_ABORTED = 0x371


DO_NOT_RETRY = 1 << 14
"""Of a status field; bits 0 to 10 are the code, 11 to 13 when to retry and whether a log tells."""


def code_of(status: int) -> int:
    """SCT << 8 | SC out of a completion's status field (without the phase)."""
    return status & 0x7FF


def status_name(status: int) -> str:
    code = code_of(status)
    try:
        words = Status(code).name.lower().replace("_", " ")
    except ValueError:
        words = "status"
    return f"{words} ({code >> 8:x}/{code & 0xFF:02x}h)"


def retryable(status: int) -> bool:
    """May the same command do, tried again, perhaps by another connection?

    Errors of the path tell nothing about the command, whatever the bit says.
    """
    code = code_of(status)
    if code == Status.SUCCESS:
        return False
    return code >> 8 == 3 or not status & DO_NOT_RETRY
