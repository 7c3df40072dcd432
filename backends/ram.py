"""`ram:` keeps pages compressed in this process's memory.

Responsible for: the pool's options and its life, and the awaited view of it. The native fault
server takes the pool as it is (`native`); then the awaited methods stay unused, because a page's
handle can be in one place only. Work is done on the loop's thread, with the GIL released: a page
takes a few microseconds, less than handing it to a thread would.

Must not know: faults, other stores.

Targets: `lz4` (also where none is given), `zstd`, `none`. Options: `limit=SIZE` of memory held,
`level=N` for zstd, `shuffle=auto|off|4|8` for both: the width of numbers whose bytes are put in
order before they are compressed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from userswap.backends.grammar import LayerSpec, Options, format_size, unknown_name
from userswap.backends.store import (
    PAGE_SIZE,
    PAGES_MAX,
    Geometry,
    NativePool,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    StoreFullError,
    pages_between,
    pages_of,
)
from userswap.backends.values import LZ4_ACCELERATION, SHUFFLES, ZSTD_LEVEL, ZSTD_LEVELS
from userswap.native import codecs, ffi, lib

NAME = "ram"
DEFAULT_CODEC = "lz4"
LIMIT_MIN = 1024**2  # below it, the first page of each size class and the tables would be all


class RamStore(Store):
    """Pages in a native pool; see `Store` for the contract."""

    durable = False

    def __init__(
        self,
        page_count: int,
        *,
        page_size: int = PAGE_SIZE,
        codec: str = DEFAULT_CODEC,
        level: int = 1,
        shuffle: str = "auto",
        limit: int = 0,
    ) -> None:
        self.page_size = page_size
        self.page_count = page_count
        self._blocks = page_size // PAGE_SIZE
        """Objects of the pool that one page takes: it keeps 4 KiB each."""
        self._pool: Any = ffi.NULL
        self._pages: Any = ffi.NULL
        try:
            opened = codecs.open_codec(codec)
        except codecs.CodecError as error:
            raise StoreFailedError(str(error), store=NAME) from error
        pool = ffi.new("struct us_pool **")
        rc = lib.us_pool_create(pool, opened.number, level, SHUFFLES[shuffle], limit)
        if rc < 0:
            raise StoreFailedError(f"no room for the pool: {os.strerror(-rc)}", store=NAME)
        self._pool = pool[0]
        self._error = ffi.new("int *")
        held = f" in at most {format_size(limit)}" if limit else ""
        description = f"{codec} {opened.version}{held}".replace("none ", "uncompressed")
        self.space = f"compressed in this process's memory: {description}"
        if self._blocks == 1:
            self.native = NativePool(self._pool, lib.us_pool_fd(self._pool), description)

    async def read(self, runs: Sequence[Run]) -> None:
        self.read_now(runs)

    def read_now(self, runs: Sequence[Run]) -> bool:
        table = self._table()
        for run in runs:
            first, count = self._blocks_of(pages_of(self, run))
            # `with`: an error's traceback must not hold on to the caller's buffer
            with ffi.from_buffer(run.buffer, require_writable=True) as place:
                done = lib.us_ram_read(table, first, count, place, self._error)
            if done < count:
                raise self._failure("cannot be decompressed", (first + done) // self._blocks)
        return True

    async def write(self, runs: Sequence[Run]) -> None:
        table = self._table()
        for run in runs:
            first, count = self._blocks_of(pages_of(self, run))
            with ffi.from_buffer(run.buffer) as place:
                done = lib.us_ram_write(table, first, count, place, self._error)
            if done < count:
                raise self._failure("cannot be kept", (first + done) // self._blocks)

    async def discard(self, index: int, count: int) -> None:
        first, blocks = self._blocks_of(pages_between(self, index, count))
        lib.us_ram_discard(self._table(), first, blocks)

    async def flush(self) -> None:
        self._check_open()

    async def aclose(self) -> None:
        if self._pool == ffi.NULL:
            return
        lib.us_ram_destroy(self._pages)
        lib.us_pool_destroy(self._pool)
        self._pool = self._pages = ffi.NULL
        self.native = None

    def _blocks_of(self, pages: range) -> tuple[int, int]:
        return pages.start * self._blocks, len(pages) * self._blocks

    def _check_open(self) -> None:
        if self._pool == ffi.NULL:
            raise StoreFailedError("is closed", store=NAME)

    def _table(self) -> Any:
        """The array of handles, made when it is first needed: the native server keeps its own."""
        self._check_open()
        if self._pages == ffi.NULL:
            out = ffi.new("struct us_ram **")
            if lib.us_ram_create(out, self._pool, self.page_count * self._blocks) < 0:
                raise StoreFailedError("no room for the table of pages", store=NAME)
            self._pages = out[0]
        return self._pages

    def _failure(self, what: str, page: int) -> StoreError:
        number = -self._error[0]
        if number == errno.ENOSPC:
            held = format_size(lib.us_pool_held(self._pool))
            return StoreFullError(f"the pool holds {held}, its limit", store=NAME, page=page)
        if number == errno.ENOMEM:
            return StoreFullError("no memory left for the pool", store=NAME, page=page)
        return PageLostError(f"{what}: {os.strerror(number)}", store=NAME, page=page)


def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    codec = layer.target or DEFAULT_CODEC
    if codec not in codecs.NAMES:
        raise layer.error(unknown_name("codec", codec, codecs.NAMES))
    page_count = geometry.page_count or PAGES_MAX * PAGE_SIZE // geometry.page_size
    options = Options(layer)
    limit = options.size("limit", default=None, whole=geometry.bytes)
    level = LZ4_ACCELERATION
    if codec == "zstd":
        low, high = ZSTD_LEVELS
        level = options.integer("level", default=ZSTD_LEVEL, low=low, high=high)
    shuffle = "off"
    if codec != "none":
        shuffle = options.choice("shuffle", default="auto", choices=SHUFFLES)
    options.finish()
    if limit is not None and limit < LIMIT_MIN:
        raise layer.error(f"has to be at least {format_size(LIMIT_MIN)}", "limit")
    return RamStore(
        page_count,
        page_size=geometry.page_size,
        codec=codec,
        level=level,
        shuffle=shuffle,
        limit=limit or 0,
    )
