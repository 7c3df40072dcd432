"""What a target says of itself: the pages of Identify and of the discovery log.

Responsible for: the fields that matter to a host of one namespace, at their offsets, both ways.
Must not know: who asks, how pages travel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct, pack_into, unpack_from

PAGE_BYTES = 4096
DISCOVERY_NQN = "nqn.2014-08.org.nvmexpress.discovery"
VERSION = 0x0001_0300  # 1.3: later ones have to offer Identify by command set
TCP = 3
IPV4, IPV6 = 1, 2
SUBTYPE_NVM, SUBTYPE_DISCOVERY = 2, 3

LOG_HEADER = Struct("<QQH1006x")  # generation, records, format
LOG_ENTRY = Struct("<BBBBHHHH20x32s192x256s256s256x")
assert LOG_HEADER.size == LOG_ENTRY.size == 1024
_EXAMPLE = LOG_ENTRY.pack(*bytes(8), b"S", b"N", b"A")
assert [_EXAMPLE.index(text) for text in (b"S", b"N", b"A")] == [32, 256, 512]

AERS = 4
"""Asynchronous event requests that may wait at a controller."""
KEEP_ALIVE_STEP_MS = 1000
ONCS_DATASET_MANAGEMENT, ONCS_WRITE_ZEROES = 1 << 2, 1 << 3
OAES_NAMESPACES = 1 << 8
SGLS_FABRICS = 1 | 1 << 20  # SGLs, and an offset for data inside capsules
DISCOVERY_CONTROLLER, IO_CONTROLLER = 2, 1


def capabilities(entries: int, timeout: float) -> int:
    """CAP: so many entries in a queue, contiguous; so long until it is ready; the NVM commands."""
    return entries - 1 | 1 << 16 | round(timeout * 2) << 24 | 1 << 37


def ready_timeout(cap: int) -> float:
    """CAP.TO in seconds."""
    return max((cap >> 24 & 0xFF) / 2, 0.5)


@dataclass(frozen=True, slots=True)
class Controller:
    """Identify Controller."""

    serial: str = ""
    model: str = ""
    firmware: str = ""
    controller: int = 0
    transfer: int = 0
    """MDTS in bytes; 0: no limit"""
    in_capsule: int = 0
    """bytes of data inside the capsule of an I/O command"""
    namespaces: int = 1
    optional: int = ONCS_DATASET_MANAGEMENT | ONCS_WRITE_ZEROES
    volatile_cache: bool = False
    kind: int = IO_CONTROLLER
    commands: int = 0
    subsystem: str = ""
    page_min: int = PAGE_BYTES
    """CAP.MPSMIN in bytes, in which MDTS is measured"""

    def pack(self) -> bytearray:
        page = bytearray(PAGE_BYTES)
        pack_into("<20s40s8s", page, 4, *map(_ascii, (self.serial, self.model, self.firmware)))
        mdts = (self.transfer // self.page_min).bit_length() - 1 if self.transfer else 0
        pack_into("<BHI", page, 77, mdts, self.controller, VERSION)
        pack_into("<I", page, 92, OAES_NAMESPACES if self.kind == IO_CONTROLLER else 0)
        page[111] = self.kind
        page[259] = AERS - 1
        page[261] = 0b0110 if self.kind == IO_CONTROLLER else 0b0100  # effects log, log offsets
        pack_into("<H", page, 320, KEEP_ALIVE_STEP_MS // 100)
        pack_into("<BBHI", page, 512, 0x66, 0x44, self.commands, self.namespaces)
        pack_into("<H", page, 520, self.optional)
        page[525] = int(self.volatile_cache)
        pack_into("<I", page, 536, SGLS_FABRICS)
        pack_into("<256s", page, 768, self.subsystem.encode())
        pack_into("<IIHBB", page, 1792, (64 + self.in_capsule) // 16, 1, 0, 0, 1)
        return page

    @classmethod
    def parse(cls, page: memoryview | bytearray, page_min: int = PAGE_BYTES) -> Controller:
        serial, model, firmware = unpack_from("<20s40s8s", page, 4)
        mdts, controller = unpack_from("<BH", page, 77)
        (commands, namespaces, optional) = unpack_from("<HIH", page, 514)
        (capsule,) = unpack_from("<I", page, 1792)
        subsystem = bytes(page[768:1024]).partition(b"\0")[0]
        return cls(
            serial=_text(serial),
            model=_text(model),
            firmware=_text(firmware),
            controller=controller,
            transfer=page_min << mdts if 0 < mdts < 32 else 0,
            in_capsule=max(capsule * 16 - 64, 0),
            namespaces=namespaces,
            optional=optional,
            volatile_cache=bool(page[525] & 1),
            kind=page[111],
            commands=commands,
            subsystem=subsystem.decode(errors="replace"),
            page_min=page_min,
        )


@dataclass(frozen=True, slots=True)
class Namespace:
    """Identify Namespace."""

    blocks: int
    block_size: int
    nguid: bytes = bytes(16)
    metadata: int = 0
    """bytes with each block"""
    zeroing: bool = True
    """blocks that were deallocated read as zeros, and Write Zeroes can deallocate"""
    zeros: bool = True
    """the first half of that alone"""

    def pack(self) -> bytearray:
        page = bytearray(PAGE_BYTES)
        pack_into("<QQQ", page, 0, self.blocks, self.blocks, self.blocks)
        page[33] = 0b1001 if self.zeroing else int(self.zeros)
        page[104:120] = self.nguid
        pack_into("<HB", page, 128, self.metadata, self.block_size.bit_length() - 1)
        return page

    @classmethod
    def parse(cls, page: memoryview | bytearray) -> Namespace | None:
        """None: there is no such namespace, its page is of zeros."""
        (blocks,) = unpack_from("<Q", page, 0)
        if not blocks:
            return None
        chosen = page[26] & 0xF | page[26] >> 1 & 0x30
        metadata, shift = unpack_from("<HB", page, 128 + 4 * chosen)
        return cls(
            blocks=blocks,
            block_size=1 << min(shift, 63),
            nguid=bytes(page[104:120]),
            metadata=metadata,
            zeroing=page[33] & 0b1111 == 0b1001,
            zeros=page[33] & 0b111 == 0b001,
        )


def pack_active(namespaces: Iterable[int], after: int = 0) -> bytearray:
    """The list of active namespaces whose numbers are above `after`."""
    page = bytearray(PAGE_BYTES)
    for at, nsid in enumerate(sorted(n for n in namespaces if n > after)[: PAGE_BYTES // 4]):
        pack_into("<I", page, at * 4, nsid)
    return page


def parse_active(page: memoryview | bytearray) -> list[int]:
    numbers = [n for (n,) in Struct("<I").iter_unpack(page)]
    return numbers[: numbers.index(0)] if 0 in numbers else numbers


def pack_descriptors(nguid: bytes) -> bytearray:
    page = bytearray(PAGE_BYTES)
    page[:20] = bytes((2, 16, 0, 0)) + nguid
    return page


@dataclass(frozen=True, slots=True)
class Entry:
    """A subsystem and where it listens, as the discovery log tells it."""

    subsystem: str
    address: str
    service: str
    subtype: int = SUBTYPE_NVM
    transport: int = TCP
    family: int = IPV4
    port: int = 1
    controller: int = 0xFFFF
    admin_entries: int = 32

    def pack(self) -> bytes:
        return LOG_ENTRY.pack(
            self.transport,
            self.family,
            self.subtype,
            0,
            self.port,
            self.controller,
            self.admin_entries,
            0,
            self.service.encode().ljust(32),
            self.subsystem.encode(),
            self.address.encode().ljust(256),
        )

    @classmethod
    def parse(cls, data: memoryview | bytes) -> Entry:
        transport, family, subtype, _, port, controller, entries, _, *texts = LOG_ENTRY.unpack(data)
        service, subsystem, address = map(_text, texts)
        return cls(
            subsystem, address, service, subtype, transport, family, port, controller, entries
        )


def pack_log(generation: int, entries: list[Entry]) -> bytes:
    header = LOG_HEADER.pack(generation, len(entries), 0)
    return header + b"".join(entry.pack() for entry in entries)


def log_size(header: memoryview | bytearray) -> tuple[int, int]:
    """Generation and number of records of the discovery log that begins so."""
    generation, records, _ = LOG_HEADER.unpack(header)
    return generation, records


def _ascii(text: str) -> bytes:
    return text.encode("ascii", "replace").ljust(40)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace").strip()
