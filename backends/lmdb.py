"""`lmdb:/path` keeps pages as values in an LMDB database: a directory of its own on a file system.

Responsible for: what a page becomes there, who may block on it, and what survives. Every 4 KiB of a
page are one value (backends/values.py) under their index. LMDB gives a value of more than 2,022
bytes pages of its own, and 4,080 bytes fit into one: what does not get short is cut there, and its
last bytes are kept in a second table, so that no value costs two pages.

Invariants:
 1. All writes are one thread's. It makes values of blocks, then commits what has queued up, in
    order of keys, in one short transaction. A write returns when its transaction is committed: what
    returned is in the file (in the page cache at least), and outlives this process.
 2. A read transaction lasts for one batch of gets and no value is used after it: a held one would
    keep the file from reusing pages.
 3. The event loop reads only what was in memory when it was last seen, and is there now by the
    kernel's word (mincore); anything else is read by threads. Branch pages of the tree, used by
    every read, are taken to be there.
 4. What finds no room changes nothing. What is discarded while there is no room even for that is
    remembered, reads as zeros, and is deleted when there is room.
 5. One opener at a time, by a lock on the file; not usable in a forked child.

Options: `map_size=SIZE`, the most that the file may grow to; `codec=`, `level=`, `shuffle=` of
backends/values.py; `durability=`: with `none` (the default) nothing waits for the medium, and a
machine that loses power may leave a database that is damaged; with `interval` it is brought to the
medium every `interval=DURATION`, and by `flush`, which narrows that but does not exclude it; with
`commit` every write that returned is on the medium.

Must not know: faults, other stores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import lmdb

from userswap.backends.grammar import LayerSpec, Options, format_size
from userswap.backends.lmdb_file import NAME, block_key, open_database
from userswap.backends.lmdb_writer import Writer
from userswap.backends.store import (
    PAGE_SIZE,
    PAGES_MAX,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    pages_between,
    pages_of,
)
from userswap.backends.values import BLOCK_SIZE, Codec, codec_option
from userswap.native import ffi, lib

MAP_SIZE = 1 << 40
MAP_SIZE_MIN = 1 << 20
DURABILITIES = ("none", "interval", "commit")
INTERVAL_S = 1.0
READ_BLOCKS = 64
INLINE_BLOCKS = 16
"""More are read by a thread also where all are in memory: the loop serves others too."""
READERS = 4


class _Places:
    """Where in the map the values of blocks were last seen: 8 bytes a block, in chunks."""

    CHUNK = 4096

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}

    def get(self, block: int) -> int:
        chunk = self._chunks.get(block // self.CHUNK)
        return chunk[block % self.CHUNK] if chunk else 0

    def set(self, block: int, address: int) -> None:
        chunk = self._chunks.get(block // self.CHUNK)
        if chunk is None:
            chunk = self._chunks[block // self.CHUNK] = array("Q", bytes(8 * self.CHUNK))
        chunk[block % self.CHUNK] = address


class LmdbStore(Store):
    """Pages in a database; see `Store` for the contract."""

    def __init__(
        self,
        page_count: int,
        *,
        page_size: int,
        path: str,
        codec: Codec,
        map_size: int = MAP_SIZE,
        durability: str = "none",
        interval: float = INTERVAL_S,
        existing: bool = False,
    ) -> None:
        """Open or make it: blocks. Every other method belongs to the running event loop."""
        self.page_size = page_size
        self.page_count = page_count
        self.durable = durability == "commit"
        self.space = f"{path}, {format_size(map_size)} at most, {codec.description}"
        self._per_page = page_size // BLOCK_SIZE
        self._interval = interval if durability == "interval" else 0.0
        self._ended = ""
        """Why it cannot be used any more."""
        self._database = open_database(
            path, map_size, page_size=page_size, sync=self.durable, existing=existing
        )
        self._places = _Places()
        self._writer = Writer(self._database, codec, self._per_page, self._find)
        self._syncing: asyncio.Task[None] | None = None
        self._readers = ThreadPoolExecutor(
            READERS, thread_name_prefix="lmdb-read", initializer=lib.us_place_freely
        )
        _opened.add(self)

    # --- what the loop does ---

    async def read(self, runs: Sequence[Run]) -> None:
        if self.read_now(runs):
            return
        wanted = list(self._blocks(runs))
        loop = asyncio.get_running_loop()
        batches = [wanted[at : at + READ_BLOCKS] for at in range(0, len(wanted), READ_BLOCKS)]
        reads = [loop.run_in_executor(self._readers, self._get, batch) for batch in batches]
        del wanted, batches  # an error's traceback must not hold on to the caller's buffers
        _raise(await _first_error(reads))

    def read_now(self, runs: Sequence[Run]) -> bool:
        self._check()
        if len(runs) == 1 and runs[0].buffer.nbytes == BLOCK_SIZE:  # what most faults ask for
            wanted = [(pages_of(self, runs[0]).start, runs[0].buffer)]
        else:
            wanted = list(self._blocks(runs))
        if len(wanted) > INLINE_BLOCKS:
            return False
        is_resident, places = lib.us_is_resident, self._places
        for block, _ in wanted:
            place = places.get(block)
            if not place or not is_resident(place):
                return False
        _raise(self._get(wanted))
        return True

    async def write(self, runs: Sequence[Run]) -> None:
        self._check()
        _raise(await _first_error([self._writer.write(list(self._blocks(runs)))]))

    async def discard(self, index: int, count: int) -> None:
        self._check()
        pages = pages_between(self, index, count)
        first, end = pages.start * self._per_page, pages.stop * self._per_page
        _raise(await _first_error([self._writer.discard(first, end)]))

    async def flush(self) -> None:
        self._check()
        await self._settle()

    async def aclose(self) -> None:
        if self._ended:
            return
        self._ended = "is closed"
        _opened.discard(self)
        if self._syncing is not None:
            self._syncing.cancel()
        await asyncio.to_thread(self._end)

    def _blocks(self, runs: Sequence[Run]) -> Iterator[tuple[int, memoryview]]:
        for run in runs:
            first = pages_of(self, run).start * self._per_page
            buffer = run.buffer.cast("B")
            for at in range(0, buffer.nbytes, BLOCK_SIZE):
                yield first + at // BLOCK_SIZE, buffer[at : at + BLOCK_SIZE]

    async def _settle(self) -> None:
        _raise(await _first_error([self._writer.settle(sync=self._interval > 0)]))

    def _check(self) -> None:
        if self._ended:
            raise StoreFailedError(self._ended, store=NAME)
        if self._interval and self._syncing is None:
            self._syncing = asyncio.get_running_loop().create_task(self._sync_regularly())

    async def _sync_regularly(self) -> None:
        with contextlib.suppress(StoreError):
            while True:
                await asyncio.sleep(self._interval)
                await self._settle()

    # --- what any thread does ---

    def _get(self, wanted: list[tuple[int, memoryview]]) -> StoreError | None:
        """Fill the buffers; what went wrong."""
        lost = None
        try:
            with self._database.env.begin(buffers=True) as txn:
                for block, place in wanted:
                    if not self._read_block(txn, block, place) and lost is None:
                        lost = block
        except (lmdb.CorruptedError, lmdb.PageNotFoundError):
            lost = wanted[0][0]
        except lmdb.Error as error:
            return StoreFailedError(str(error), store=NAME)
        finally:
            wanted.clear()
        if lost is None:
            return None
        return PageLostError("what is stored is damaged", store=NAME, page=lost // self._per_page)

    def _read_block(self, txn: lmdb.Transaction[memoryview], block: int, place: memoryview) -> bool:
        database, key = self._database, block_key(block)
        value = txn.get(key, None, database.values)
        if value is None or block in self._writer.forgotten:
            place[:] = bytes(BLOCK_SIZE)
            return True
        source, length = ffi.from_buffer(value), len(value)
        with ffi.from_buffer(place) as into:
            if length == database.value_max:
                rest = txn.get(key, b"", database.tails)
                rc = lib.us_value_join(source, length, ffi.from_buffer(rest), len(rest), into)
            else:
                rc = lib.us_value_decode(source, length, into)
        self._places.set(block, int(ffi.cast("uintptr_t", source)))
        return bool(rc == 0)

    def _find(self, written: list[int]) -> None:
        """Remember where the values of these blocks are: they are in memory now."""
        with self._database.env.begin(buffers=True) as txn:
            for block in written:
                value = txn.get(block_key(block), None, self._database.values)
                if value is not None:
                    with ffi.from_buffer(value) as source:
                        self._places.set(block, int(ffi.cast("uintptr_t", source)))

    def _end(self) -> None:
        """Write what is queued, then close; in a thread, because that waits for a medium."""
        self._writer.end()
        self._readers.shutdown()
        try:
            if self._interval:
                self._database.env.sync(True)
        finally:
            self._database.env.close()
            os.close(self._database.lock)

    def abandon(self) -> None:
        """In a forked child: let go of the lock, so that it ends with the parent."""
        if not self._ended:
            self._ended = "was opened by another process"
            os.close(self._database.lock)


_opened: weakref.WeakSet[LmdbStore] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A forked child shares the database's file and lock with its parent, and must use neither."""
    for store in list(_opened):
        store.abandon()


os.register_at_fork(after_in_child=_leave_to_parent)


async def _first_error(
    futures: Sequence[asyncio.Future[StoreError | None]],
) -> StoreError | None:
    """When all have ended: also after a cancellation, because threads work on."""
    cancelled = False
    while pending := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    return next((error for future in futures if (error := future.result())), None)


def _raise(error: StoreError | None) -> None:
    """Here, so that no frame of the error's traceback holds the error, and with it the caller's
    buffers."""
    if error is not None:
        try:
            raise error
        finally:
            del error


async def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    if not layer.target:
        raise layer.error("needs the path of a directory: lmdb:/path")
    options = Options(layer)
    map_size = options.size("map_size", default=MAP_SIZE)
    codec = codec_option(options)
    durability = options.choice("durability", default="none", choices=DURABILITIES)
    interval = INTERVAL_S
    if durability == "interval":
        interval = options.duration("interval", default=INTERVAL_S)
    options.finish()
    if map_size < MAP_SIZE_MIN:
        raise layer.error(f"has to be at least {format_size(MAP_SIZE_MIN)}", "map_size")
    if not interval:
        raise layer.error("has to be more than nothing", "interval")
    return await asyncio.to_thread(
        LmdbStore,
        geometry.page_count or PAGES_MAX * PAGE_SIZE // geometry.page_size,
        page_size=geometry.page_size,
        path=layer.target,
        codec=codec,
        map_size=map_size,
        durability=durability,
        interval=interval,
        existing=geometry.existing,
    )
