"""What a volume writes on a medium, byte by byte: its superblock and the pages of its table.

Responsible for: the layout, the checksums, and recognizing what others have written.
Must not know: stores, when what is written; it is pure.

    page 0, 1         superblock, copies A and B
    page 2k+2, 2k+3   page k of the table of extents, copies A and B; so many pairs (`area`) are set
                      aside, and the first `tables` of them are in use
    from 2*area + 2   data

Every copy has a sequence number, and a checksum over all that it says. Of two good copies the one
with the higher number holds. A page of the table carries the volume's UUID and its own number, so
that what an earlier volume left on the medium is not taken for this one's. Integers are
little-endian. Magic and version stand where every version must keep them.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from uuid import UUID

from userswap.backends.grammar import GrammarError

MAGIC = b"userswap"
TABLE_MAGIC = b"uswtable"
VERSION = 1
SUPERBLOCKS = 2
EXTENTS_MAX = 1 << 16
PAGES_PER_PAIR = 1024
"""Pages of the medium for which one pair of table pages is set aside: a share of 0.2 %."""

_SUPERBLOCK = struct.Struct("<8sHH4x16s16sQIIIxxxxQ")
_TABLE = struct.Struct("<8sHH4x16s16sQII")
_CHECKSUM = slice(16, 32)
_RECORD = struct.Struct("<16sQQQ88s")
_HEADER_BYTES = _RECORD.size
NAME_BYTES = 88
KEPT = "nqn."
"""What the names of extents begin with that are exported, each by its subsystem's NQN."""

_SIGNATURES = (
    (0, b"LUKS\xba\xbe", "an encrypted LUKS device"),
    (0, b"XFSB", "an XFS filesystem"),
    (0x40 + 0x10000, b"_BHRfS_M", "a btrfs filesystem"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 filesystem"),
    (512, b"EFI PART", "a GPT partition table"),
    (512, b"LABELONE", "an LVM physical volume"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of a Linux RAID"),
    (4086, b"SWAPSPACE2", "kernel swap space"),
    (32769, b"CD001", "an ISO 9660 image"),
    (16, b"\xde\xc0\xef\xbe", "an LMDB database"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x7fELF", "an ELF file"),
    (257, b"ustar", "a tar archive"),
    (510, b"\x55\xaa", "a boot sector or partition table"),
)


class DamagedError(ValueError):
    """What ought to be a volume's page is not; the message says how."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Adjacent pages of a volume that belong to one region."""

    base: int
    pages: int
    name: str
    uuid: UUID
    created: int
    """Seconds since 1970."""

    @property
    def kept(self) -> bool:
        """Its content is waited for: it makes room for nobody while it is stale."""
        return self.name.startswith(KEPT)

    def pack(self) -> bytes:
        name = self.name.encode()
        return _RECORD.pack(self.uuid.bytes, self.base, self.pages, self.created, name)


@dataclass(frozen=True, slots=True)
class Superblock:
    """Who a volume is, and how much of its table is in use."""

    uuid: UUID
    sequence: int
    page_size: int
    area: int
    tables: int
    created: int

    @property
    def data_start(self) -> int:
        """The first page that an extent may have."""
        return SUPERBLOCKS + 2 * self.area

    def pack(self) -> bytes:
        page = bytearray(self.page_size)
        _SUPERBLOCK.pack_into(
            page, 0, MAGIC, VERSION, 0, b"", self.uuid.bytes, self.sequence,
            self.page_size, self.area, self.tables, self.created,
        )  # fmt: skip
        page[_CHECKSUM] = _checksum(page, _SUPERBLOCK.size)
        return bytes(page)


@dataclass(frozen=True, slots=True)
class TablePage:
    """One page of the table: some of the extents."""

    volume: UUID
    number: int
    sequence: int
    extents: list[Extent] = field(default_factory=list)

    def pack(self, page_size: int) -> bytes:
        records = b"".join(extent.pack() for extent in self.extents)
        page = bytearray(page_size)
        _TABLE.pack_into(
            page, 0, TABLE_MAGIC, VERSION, 0, b"", self.volume.bytes, self.sequence,
            self.number, len(self.extents),
        )  # fmt: skip
        page[_HEADER_BYTES : _HEADER_BYTES + len(records)] = records
        page[_CHECKSUM] = _checksum(page, _HEADER_BYTES + len(records))
        return bytes(page)


def extents_per_page(page_size: int) -> int:
    return (page_size - _HEADER_BYTES) // _RECORD.size


def area_for(page_count: int, page_size: int) -> int:
    """Pairs of table pages to set aside on a medium of so many pages."""
    most = -(-EXTENTS_MAX // extents_per_page(page_size))
    return min(max(page_count // PAGES_PER_PAIR, 1), most)


def check_name(name: str) -> None:
    """Refuse a name that a table cannot keep, or a terminal cannot show, with a GrammarError."""
    problem = ""
    if not name or name != name.strip():
        problem = "is empty, or has spaces at its ends"
    elif not name.isprintable():
        problem = "has characters that cannot be printed"
    elif len(name.encode()) > NAME_BYTES:
        problem = f"takes {len(name.encode())} bytes; {NAME_BYTES} are possible"
    if problem:
        raise GrammarError(f"the region's name {name!r} {problem}")


def version_of(page: bytes) -> int | None:
    """The version that a superblock claims to have; None for what is none."""
    return int.from_bytes(page[8:10], "little") if page.startswith(MAGIC) else None


def unpack_superblock(page: bytes) -> Superblock:
    """Read a copy; a DamagedError where it is not good, or not of this version."""
    fields = _SUPERBLOCK.unpack_from(page)
    magic, version, _, checksum, uuid, sequence, page_size, area, tables, created = fields
    if magic != MAGIC:
        raise DamagedError("has no magic number")
    if version != VERSION:
        raise DamagedError(f"has version {version}")
    if checksum != _checksum(page, _SUPERBLOCK.size):
        raise DamagedError("has a wrong checksum")
    return Superblock(UUID(bytes=uuid), sequence, page_size, area, tables, created)


def unpack_table(page: bytes, volume: UUID, number: int) -> TablePage:
    """Read a copy of one volume's table page; a DamagedError where it is not that."""
    magic, version, _, checksum, uuid, sequence, own_number, used = _TABLE.unpack_from(page)
    if magic != TABLE_MAGIC or version != VERSION:
        raise DamagedError("is no page of a table")
    if used > extents_per_page(len(page)):
        raise DamagedError("has an impossible length")
    end = _HEADER_BYTES + used * _RECORD.size
    if checksum != _checksum(page, end):
        raise DamagedError("has a wrong checksum")
    if uuid != volume.bytes or own_number != number:
        raise DamagedError("belongs to another volume")
    extents = [
        Extent(base, pages, name.rstrip(b"\0").decode(errors="replace"), UUID(bytes=own), created)
        for own, base, pages, created, name in _RECORD.iter_unpack(page[_HEADER_BYTES:end])
    ]
    return TablePage(volume, number, sequence, extents)


def recognize(head: bytes) -> str:
    """What the first bytes of a medium look like, in words; empty where they say nothing."""
    for offset, mark, what in _SIGNATURES:
        if head.startswith(mark, offset):
            return what
    return ""


def _checksum(page: bytes | bytearray, end: int) -> bytes:
    digest = hashlib.blake2b(page[: _CHECKSUM.start], digest_size=16)
    digest.update(page[_CHECKSUM.stop : end])
    return digest.digest()
