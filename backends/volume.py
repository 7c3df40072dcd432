"""A volume: a store that several regions share, each in an extent of its own.

Responsible for: whose a medium is, which pages belong to whom, and that both stay true whatever
happens to the process or the power. Must not know: which store it is, what the pages hold, pagers.

A medium is ours when its first pages hold our superblock (backends/superblock.py has the layout,
backends/medium.py tells it from others). One that holds anything else is refused and not written
to; only `format_volume` takes it, by force. At most one process has a volume open: stores over a
medium that others can reach see to that.

Invariants:
 1. No two extents overlap, neither in memory nor, after a crash at any moment, on the medium. A
    range is free again only when a flush has confirmed that its entry is gone.
 2. Whatever the table on the medium may list after a crash, memory lists too: an operation that
    failed half-way, or was cancelled, leaves its extent in the list, as a stale one.
 3. An extent's pages read as zeros when it is handed out. Free pages are not trusted to do so,
    unless this process has discarded them since they were last used.

Why a torn or lost write does no harm: a page of the table, and the superblock, has two copies. Only
the older one is ever written, and the two change roles only when a flush has returned. So at any
moment one good copy is durable, and the next write goes to the other. Opening flushes first: what
it read may be what a killed process wrote and did not flush. Each entry lies in one page, so each
operation is one page's old or new content. A table page that comes into use is written (both
copies, over whatever lay there) and flushed before the superblock counts it in.

Cost: an operation rewrites one page, whatever the number of extents; operations that come while a
write is under way share the next one.

Extents that the table lists when a volume is opened were left by a pager that was killed. They are
`stale`: kept, until one is reclaimed on demand or its room is needed. Those of exported namespaces
are stale whenever nobody exports them; their room is never needed.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

from userswap.backends.grammar import format_size
from userswap.backends.medium import Contents, VolumeError, examine, write_superblock
from userswap.backends.ranges import Ranges
from userswap.backends.store import Run, Store, StoreFailedError, StoreFullError
from userswap.backends.superblock import (
    SUPERBLOCKS,
    Extent,
    TablePage,
    check_name,
    extents_per_page,
)

__all__ = [
    "Contents",
    "Extent",
    "Volume",
    "VolumeError",
    "check_name",
    "examine",
    "format_volume",
    "open_volume",
]

DISCARD_PAGES = 1 << 18
"""Of one discard: between two the loop has its turn."""


class _State(enum.Enum):
    LIVE = enum.auto()
    STALE = enum.auto()
    CLEARING = enum.auto()  # being discarded, for good
    GONE = enum.auto()  # no longer listed in what is written


@dataclass(slots=True)
class _Entry:
    extent: Extent
    table: _Table
    state: _State


class _Table:
    """A page of the table in memory, and where its next copy goes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.entries: list[_Entry] = []
        self.sequence = 0
        """Of the newer copy; 0 while neither has been written."""
        self.older = 0
        """The copy that the next write may destroy."""

    @property
    def first_copy(self) -> int:
        return SUPERBLOCKS + 2 * self.number


async def open_volume(store: Store, *, name: str) -> Volume:
    """Open the volume on a store, which then belongs to it; a blank medium is formatted.

    `name` is what messages call it. When this raises, the store is still the caller's to close.
    """
    contents = await examine(store, name=name)
    if contents is None:
        contents = Contents(await write_superblock(store), 0, ())
    else:
        await store.flush()
    return Volume(store, contents, name)


async def format_volume(store: Store, *, name: str, force: bool = False) -> None:
    """Make an empty volume. Without `force` only a blank medium is taken; with it, whatever the
    medium held is discarded."""
    blank = False
    try:
        blank = await examine(store, name=name) is None
    except VolumeError:
        if not force or store.page_count <= SUPERBLOCKS + 2:
            raise
    if not blank and not force:
        remedy = "to lose it, use `userswap store format --force`"
        raise VolumeError(f"holds a volume already; {remedy}", store=name)
    if not blank:
        await store.discard(0, store.page_count)
    await write_superblock(store)


class Volume:
    """Hands out extents of a store; `open_volume` makes one."""

    def __init__(self, store: Store, contents: Contents, name: str) -> None:
        self.store = store
        self.page_size = store.page_size
        self.name = name
        self._superblock = contents.superblock
        self._older = contents.older
        self._entries: dict[UUID, _Entry] = {}
        self._tables: list[_Table] = []
        self._per_page = extents_per_page(store.page_size)
        self._free = Ranges()
        start = contents.superblock.data_start
        self._free.add(start, store.page_count - start)
        self._clean = Ranges()
        """Free pages that this process has discarded."""
        self._removed = asyncio.Event()
        self._dirty: set[_Table] = set()
        self._lock = asyncio.Lock()
        self._round: asyncio.Task[None] | None = None
        """The next write of the table, which what changes now will be part of."""
        self._closed = False
        for page, older in contents.tables:
            table = self._add_table()
            table.sequence, table.older = page.sequence, older
            for extent in page.extents:
                self._list(_Entry(extent, table, _State.STALE))
                self._free.remove(extent.base, extent.pages)

    @property
    def uuid(self) -> UUID:
        return self._superblock.uuid

    @property
    def extents(self) -> list[Extent]:
        """All that are listed, oldest first."""
        return self._in_state(*_State)

    @property
    def stale(self) -> list[Extent]:
        """Those that nobody uses, oldest first: left by a pager that was killed, or by an
        operation that failed."""
        return self._in_state(_State.STALE)

    @property
    def free_pages(self) -> int:
        return sum(count for _, count in self._free)

    async def allocate(self, name: str, pages: int, *, reclaim: bool = True) -> Extent:
        """An extent whose pages read as zeros; a StoreFullError where there is no room. Stale
        extents make room, unless `reclaim` is False."""
        check_name(name)
        assert pages > 0, f"an extent of {pages} pages"
        self._check_open()
        entry = await self._take(name, pages, reclaim)
        extent = entry.extent
        try:
            if not self._clean.covers(extent.base, pages):
                await self._discard(extent)
            self._clean.remove(extent.base, pages)
            await self._settle()
        except BaseException:
            # The medium may list it or not: nobody else gets it before that is settled.
            entry.state = _State.STALE
            raise
        return extent

    def adopt(self, name: str) -> Extent | None:
        """The oldest stale extent of that name, if there is one: in use again, as it is."""
        for extent in self.stale:
            if extent.name == name:
                self._entries[extent.uuid].state = _State.LIVE
                return extent
        return None

    async def release(self, extent: Extent) -> None:
        """Discard an extent, and forget it for good. When this fails the extent is stale; then it
        may be tried again."""
        self._check_open()
        entry = self._entries.get(extent.uuid)
        if entry is not None and entry.state in (_State.LIVE, _State.STALE):
            await self._remove(entry)

    async def reclaim(self, extent: Extent) -> None:
        """The same for a stale extent, whatever it holds."""
        self._check_open()
        entry = self._entries.get(extent.uuid)
        if entry is None or entry.state is not _State.STALE:
            raise VolumeError(f"has no stale extent {extent.uuid}", store=self.name)
        await self._remove(entry)

    async def aclose(self) -> None:
        """Close the store. Extents that were not released are stale to whoever opens it next."""
        self._closed = True
        if self._round is not None:
            await asyncio.wait([self._round])
        async with self._lock:
            await self.store.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=self.name)

    def _in_state(self, *states: _State) -> list[Extent]:
        found = [entry.extent for entry in self._entries.values() if entry.state in states]
        return sorted(found, key=lambda extent: (extent.created, extent.base))

    # --- room ---

    async def _take(self, name: str, pages: int, reclaim: bool) -> _Entry:
        """Enter a new extent, for which stale ones have to go where there is no room."""
        while True:
            base = self._free.find(pages)
            table = None if base is None else self._roomy_table()
            if base is not None and table is not None:
                break
            await self._make_room(pages, reclaim)
        self._free.remove(base, pages)
        extent = Extent(base, pages, name, uuid4(), int(time.time()))
        entry = _Entry(extent, table, _State.LIVE)
        self._list(entry)
        self._dirty.add(table)
        return entry

    def _roomy_table(self) -> _Table | None:
        for table in self._tables:
            if len(table.entries) < self._per_page:
                return table
        if len(self._tables) < self._superblock.area:
            return self._add_table()
        return None

    async def _make_room(self, pages: int, reclaim: bool) -> None:
        """Wait for what is being removed; or reclaim the oldest stale extent, if that can lead to
        anything."""
        self._check_open()
        kept = {_State.LIVE} if reclaim else {_State.LIVE, _State.STALE}
        held = [
            entry
            for entry in self._entries.values()
            if entry.state in kept or (entry.state is _State.STALE and entry.extent.kept)
        ]
        in_use = Ranges()
        for entry in held:
            in_use.add(entry.extent.base, entry.extent.pages)
        room = Ranges()
        room.add(self._superblock.data_start, self.store.page_count - self._superblock.data_start)
        for first, count in in_use:
            room.remove(first, count)
        if room.find(pages) is None:
            most = format_size(max((count for _, count in room), default=0) * self.page_size)
            message = (
                f"no room for {format_size(pages * self.page_size)}: {len(held)} extents are in "
                f"use, and at most {most} are free in one piece"
            )
            raise StoreFullError(message, store=self.name)
        stale = [extent for extent in self.stale if not extent.kept] if reclaim else []
        if len(held) + len(stale) < len(self._entries):
            self._removed.clear()
            await self._removed.wait()
        elif stale:
            await self._remove(self._entries[stale[0].uuid])
        else:
            message = f"lists {len(held)} extents, the most that its table holds"
            raise StoreFullError(message, store=self.name)

    async def _remove(self, entry: _Entry) -> None:
        extent = entry.extent
        entry.state = _State.CLEARING
        try:
            await self._discard(extent)
            entry.state = _State.GONE
            self._dirty.add(entry.table)
            await self._settle()
        except BaseException:
            entry.state = _State.STALE
            self._dirty.add(entry.table)
            raise
        finally:
            self._removed.set()
        del self._entries[extent.uuid]
        entry.table.entries.remove(entry)
        self._free.add(extent.base, extent.pages)
        self._clean.add(extent.base, extent.pages)

    async def _discard(self, extent: Extent) -> None:
        end = extent.base + extent.pages
        for first in range(extent.base, end, DISCARD_PAGES):
            await self.store.discard(first, min(DISCARD_PAGES, end - first))
            await asyncio.sleep(0)

    # --- the table ---

    def _add_table(self) -> _Table:
        table = _Table(len(self._tables))
        self._tables.append(table)
        return table

    def _list(self, entry: _Entry) -> None:
        self._entries[entry.extent.uuid] = entry
        entry.table.entries.append(entry)

    async def _settle(self) -> None:
        """Return when every change so far is durable."""
        if self._round is None:
            self._round = asyncio.create_task(self._write_round())
            self._round.add_done_callback(_retrieve)
        await asyncio.shield(self._round)

    async def _write_round(self) -> None:
        async with self._lock:
            self._round = None  # what changes from here on is for the next round
            dirty, self._dirty = self._dirty, set()
            if not dirty:  # the round before took it along
                return
            try:
                await self._write_tables(dirty)
            except BaseException:
                self._dirty |= dirty
                raise

    async def _write_tables(self, tables: Iterable[_Table]) -> None:
        ordered = sorted(tables, key=lambda table: table.number)
        runs = []
        for table in ordered:
            page = memoryview(self._packed(table))
            # When it is counted in, nothing may be left of what lay there.
            copies = (table.older,) if table.sequence else (0, 1)
            runs += [Run(table.first_copy + copy, page) for copy in copies]
        await self.store.write(runs)
        await self.store.flush()
        for table in ordered:
            table.sequence += 1
            table.older = 1 - table.older
        written = max(table.number + 1 for table in ordered)
        if written > self._superblock.tables:
            await self._count_in(written)

    def _packed(self, table: _Table) -> bytes:
        kept = [entry.extent for entry in table.entries if entry.state is not _State.GONE]
        page = TablePage(self.uuid, table.number, table.sequence + 1, kept)
        return page.pack(self.page_size)

    async def _count_in(self, tables: int) -> None:
        """Extend the table on the medium by pages that are durable now."""
        sequence = self._superblock.sequence + 1
        superblock = replace(self._superblock, sequence=sequence, tables=tables)
        page = memoryview(superblock.pack())
        await self.store.write([Run(self._older, page)])
        await self.store.flush()
        self._superblock = superblock
        self._older = 1 - self._older
        # The other copy too, whenever it may arrive: then a page that goes bad costs no extents.
        await self.store.write([Run(self._older, page)])


def _retrieve(task: asyncio.Task[None]) -> None:
    """Everybody who waited may have been cancelled; then nobody is told of the error."""
    if not task.cancelled():
        task.exception()
