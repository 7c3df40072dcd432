"""What is on a medium: a volume, nothing, or what is somebody else's.

Responsible for: telling the three apart by reads alone, and for the first superblock. Must not
know: which store it is, how extents are handed out.

A medium is blank when its first and last pages, where partition tables and filesystems keep their
marks, and some pages spread over the rest are zeros.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar
from uuid import uuid4

from userswap.backends.grammar import format_size
from userswap.backends.ranges import Ranges
from userswap.backends.store import PageLostError, Run, Store, StoreFailedError
from userswap.backends.superblock import (
    SUPERBLOCKS,
    VERSION,
    DamagedError,
    Extent,
    Superblock,
    TablePage,
    area_for,
    recognize,
    unpack_superblock,
    unpack_table,
    version_of,
)

CHUNK_BYTES = 1 << 20
"""Of one read: media are looked over, and tables read, in such steps."""
PROBE_BYTES = 1 << 20
"""At each end of a medium: partition tables and filesystems keep their marks there."""
PROBE_BTRFS = 64 << 20
"""Where a filesystem keeps its second superblock, in case that the first was wiped."""
SAMPLE_BYTES = 1 << 20
"""Read in single pages that are spread over the whole medium."""

T = TypeVar("T", Superblock, TablePage)


class VolumeError(StoreFailedError):
    """This medium cannot be used as a volume; the message says why, and what to do.

    It is the second half of a sentence about the medium, whose URL may well end in a colon.
    """

    found = ""
    """What is there, alone: for who has asked before anything was to be written."""

    def __str__(self) -> str:
        return f"{self.store} {self.args[0]}"


@dataclass(frozen=True, slots=True)
class Contents:
    """A volume as it is on its medium."""

    superblock: Superblock
    older: int
    """The copy of the superblock that the next write may destroy."""
    tables: tuple[tuple[TablePage, int], ...]
    """Pages of the table, each with its older copy."""

    @property
    def extents(self) -> list[Extent]:
        return [extent for table, _ in self.tables for extent in table.extents]


async def examine(store: Store, *, name: str) -> Contents | None:
    """What volume is on the medium; None where the medium is blank. Nothing is written.

    A medium that holds something else, or a volume that is damaged or newer, is a VolumeError.
    """
    least = SUPERBLOCKS + 2
    if store.page_count <= least:
        size = format_size((least + 1) * store.page_size)
        raise VolumeError(f"is too small for a volume, which takes {size}", store=name)
    try:
        copies = await _read_pages(store, range(SUPERBLOCKS))
        superblock, older = _newest(copies, unpack_superblock)
    except DamagedError as damage:
        known = [version for copy in copies if (version := version_of(copy or b"")) is not None]
        if not known:
            await _check_blank(store, name)
            return None
        raise _unusable(name, max(known), f"its superblock {damage}") from None
    _check_geometry(store, superblock, name)
    tables = await _read_tables(store, superblock, name)
    contents = Contents(superblock, older, tuple(tables))
    _check_extents(store, contents, name)
    return contents


async def write_superblock(store: Store) -> Superblock:
    """Begin a volume without extents."""
    area = area_for(store.page_count, store.page_size)
    superblock = Superblock(uuid4(), 1, store.page_size, area, 0, int(time.time()))
    page = memoryview(superblock.pack())
    await store.write([Run(copy, page) for copy in range(SUPERBLOCKS)])
    await store.flush()
    return superblock


async def _read_pages(store: Store, pages: Iterable[int]) -> list[bytes | None]:
    """The pages, None for each that is lost."""
    wanted = list(pages)
    size = store.page_size
    buffer = bytearray(len(wanted) * size)
    try:
        await store.read(_runs(wanted, buffer))
    except PageLostError:
        if len(wanted) == 1:
            return [None]
        return [(await _read_pages(store, [page]))[0] for page in wanted]
    return [bytes(buffer[at : at + size]) for at in range(0, len(buffer), size)]


def _runs(pages: Sequence[int], buffer: bytearray) -> list[Run]:
    """Runs that fill the buffer with these pages; adjacent ones share a run."""
    view = memoryview(buffer)
    size = len(buffer) // len(pages)
    runs = []
    start = 0
    for at in range(1, len(pages) + 1):
        if at == len(pages) or pages[at] != pages[at - 1] + 1:
            runs.append(Run(pages[start], view[start * size : at * size]))
            start = at
    return runs


def _newest(copies: Iterable[bytes | None], unpack: Callable[[bytes], T]) -> tuple[T, int]:
    """Of two copies the good one with the higher number, and which copy is the other."""
    good: list[tuple[int, int, T]] = []
    damage = DamagedError("cannot be read")
    for at, page in enumerate(copies):
        try:
            if page is not None:
                copy = unpack(page)
                good.append((copy.sequence, at, copy))
        except DamagedError as error:
            damage = error
    if not good:
        raise damage
    _, at, newest = max(good, key=lambda each: each[:2])
    return newest, 1 - at


async def _read_tables(
    store: Store, superblock: Superblock, name: str
) -> list[tuple[TablePage, int]]:
    """The pages of the table, each the newer of its copies."""
    found = []
    pairs = max(1, CHUNK_BYTES // (2 * store.page_size))
    for start in range(0, superblock.tables, pairs):
        numbers = range(start, min(start + pairs, superblock.tables))
        first = SUPERBLOCKS + 2 * start
        pages = await _read_pages(store, range(first, first + 2 * len(numbers)))
        for number in numbers:
            at = 2 * (number - start)
            unpack = functools.partial(unpack_table, volume=superblock.uuid, number=number)
            try:
                found.append(_newest(pages[at : at + 2], unpack))
            except DamagedError as damage:
                raise _unusable(name, VERSION, f"page {number} of its table {damage}") from None
    return found


def _check_geometry(store: Store, superblock: Superblock, name: str) -> None:
    if superblock.page_size != store.page_size:
        theirs, ours = format_size(superblock.page_size), format_size(store.page_size)
        message = f"is a volume of pages of {theirs}; it was opened with pages of {ours}"
        raise VolumeError(message, store=name)
    if not superblock.tables <= superblock.area or superblock.data_start >= store.page_count:
        size = format_size(store.page_count * store.page_size)
        damage = f"it has {superblock.area} pages of table on a medium of {size}"
        raise _unusable(name, VERSION, damage)


def _check_extents(store: Store, contents: Contents, name: str) -> None:
    end = contents.superblock.data_start
    extents = sorted(contents.extents, key=lambda extent: extent.base)
    for extent in extents:
        if extent.base < end or not extent.pages:
            raise _unusable(name, VERSION, f"it has extents that overlap ({extent.name!r})")
        end = extent.base + extent.pages
    if len({extent.uuid for extent in extents}) < len(extents):
        raise _unusable(name, VERSION, "it lists an extent twice")
    if end > store.page_count:
        has, needs = (format_size(pages * store.page_size) for pages in (store.page_count, end))
        message = f"has {has} now, but extents up to {needs}: give the medium its size back"
        raise VolumeError(message, store=name)


def _unusable(name: str, version: int, damage: str) -> VolumeError:
    remedy = "`userswap store format --force` makes an empty volume of it, and loses its extents"
    if version > VERSION:
        message = f"is a volume of version {version}; this userswap reads version {VERSION}. Use a "
        return VolumeError(f"{message}newer userswap, or {remedy}", store=name)
    return VolumeError(f"is a damaged volume: {damage}. {remedy}", store=name)


async def _check_blank(store: Store, name: str) -> None:
    """Refuse a medium on which something was found: at its ends, or at places spread over it."""
    page_size, count = store.page_size, store.page_count
    ends = min(count, max(1, PROBE_BYTES // page_size))
    samples = max(1, SAMPLE_BYTES // page_size)
    places = Ranges()
    for place in (PROBE_BTRFS // page_size, *(n * count // samples for n in range(samples))):
        if place < count:
            places.add(place, 1)
    places.add(0, ends)
    places.add(count - ends, ends)
    pages = [page for first, length in places for page in range(first, first + length)]
    step = max(1, CHUNK_BYTES // page_size)
    zeros = bytes(step * page_size)
    for at in range(0, len(pages), step):
        chunk = pages[at : at + step]
        buffer = bytearray(len(chunk) * page_size)
        with contextlib.suppress(PageLostError):
            await store.read(_runs(chunk, buffer))
            if buffer == memoryview(zeros)[: len(buffer)]:
                continue
        await _refuse(store, name, chunk)


async def _refuse(store: Store, name: str, pages: list[int]) -> NoReturn:
    """Say what was found on these pages."""
    zeros = bytes(store.page_size)
    found = dict(zip(pages, await _read_pages(store, pages), strict=True))
    page = next(page for page, content in found.items() if content != zeros)
    head = b"".join(content or zeros for content in found.values()) if pages[0] == 0 else b""
    raise _foreign(name, page * store.page_size, recognize(head), lost=found[page] is None)


def _foreign(name: str, offset: int, what: str, *, lost: bool) -> VolumeError:
    if what:
        found = f"holds {what}"
    elif lost:
        found = f"holds something that cannot be read (at {format_size(offset)})"
    else:
        found = f"holds something else (at {format_size(offset)})"
    remedy = "`userswap store format --force` takes it, and loses what is there"
    found = f"is no volume and not blank: it {found}"
    error = VolumeError(f"{found}. Nothing was written; {remedy}", store=name)
    error.found = found
    return error
