"""`redis://host:port/0` keeps pages as values in the memory of a Redis or Valkey server.

Responsible for: keys and values, and what a value that is not the expected one means for a page. A
page is one value for each of its blocks of 4 KiB, written by one command. A value begins with the
session that wrote it and a number, which this process remembers for every block: one that vanished
or went back to an older one (a server that restarted, somebody who flushed it) is a PageLostError,
and never zeros or old content. What earlier sessions wrote is believed until the server turns out
to have changed. Values are made and read by a thread where there are many.

Target: `//[user@]host[:port][/database]`, or `unix:/path`. Options: `prefix=` of every key,
`database=`, `password_file=` (else the environment's REDISCLI_AUTH); `codec=`, `level=` and
`shuffle=` as userswap.backends.values has them. The package redis comes with `userswap[redis]`.

Must not know: connections (redis_server.py), volumes, the engine.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import secrets
import stat
import struct
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import unquote

import aiofiles

from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.redis_server import NAME, Address, Server
from userswap.backends.store import (
    PAGE_SIZE,
    PAGES_MAX,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreFailedError,
    StoreFullError,
    pages_between,
    pages_of,
)
from userswap.backends.values import Codec, codec_option

BATCH = 512
"""Blocks of one command: a page of the largest size."""
INLINE = 4
"""Blocks whose values are made or read at once, without a thread."""
KNOWN_NOTHING, FORGOTTEN = 0, 0xFFFFFFFF
"""Numbers of a block that this session has not written, or has discarded."""
MAP_NORESERVE = 0x4000
_STAMP = struct.Struct("<II")
_TARGET = re.compile(r"//(?:([^@/]*)@)?(\[[^]]+\]|[^:/]+)(?::([0-9]{1,9}))?(?:/([0-9]{0,4}))?")
_PREFIX = re.compile(r"[!-~]{1,200}")

T = TypeVar("T")
Blocks = list[tuple[int, memoryview]]


class RedisStore(Store):
    """Pages on a server; see `Store` for the contract. Made on a running loop."""

    durable = False

    def __init__(
        self, server: Server, prefix: str, codec: Codec, page_count: int, page_size: int
    ) -> None:
        self.page_size = page_size
        self.page_count = page_count
        self._blocks = page_size // PAGE_SIZE
        self._server = server
        self._prefix = f"{prefix}:".encode()
        self._codec = codec
        self._session = secrets.randbits(32)
        self._last = 0
        # Four bytes a block, of which the kernel gives those that are touched.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._area = mmap.mmap(-1, page_count * self._blocks * 4, flags=flags)
        self._numbers = memoryview(self._area).cast("I")
        self._doubts: dict[int, set[int]] = {}
        """Numbers that blocks may carry as well: their last write or discard was not answered."""
        self._thread = ThreadPoolExecutor(1, "userswap-redis")
        self._closed = False
        self.space = f"memory of the server {server.address}, {codec.description}"

    async def read(self, runs: Sequence[Run]) -> None:
        await self._in_batches(runs, self._read)

    async def write(self, runs: Sequence[Run]) -> None:
        await self._in_batches(runs, self._write)

    async def discard(self, index: int, count: int) -> None:
        self._check_open()
        pages = pages_between(self, index, count)
        first, end = pages.start * self._blocks, pages.stop * self._blocks
        for start in range(first, end, BATCH):
            await _to_its_end(self._forget(start, min(start + BATCH, end)))

    async def flush(self) -> None:
        self._check_open()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._thread.shutdown(wait=False)
        await self._server.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=NAME)

    async def _in_batches(
        self, runs: Sequence[Run], work: Callable[[Blocks], Coroutine[Any, Any, None]]
    ) -> None:
        self._check_open()
        for run in runs:
            pages_of(self, run)
        for blocks in self._batches(runs):
            try:
                await _to_its_end(work(blocks))
            finally:
                # An error's traceback must not hold on to the caller's buffers.
                for _, place in blocks:
                    place.release()

    def _batches(self, runs: Sequence[Run]) -> Iterator[Blocks]:
        """Whole pages, some BATCH blocks at a time."""
        blocks: Blocks = []
        for run in runs:
            with run.buffer.cast("B") as whole:
                for page in pages_of(self, run):
                    start = (page - run.index) * self.page_size
                    first = page * self._blocks
                    blocks += [
                        (first + n, whole[start + n * PAGE_SIZE : start + (n + 1) * PAGE_SIZE])
                        for n in range(self._blocks)
                    ]
                    if len(blocks) >= BATCH:
                        yield blocks
                        blocks = []
        if blocks:
            yield blocks

    def _key(self, block: int) -> bytes:
        return b"%b%d" % (self._prefix, block)

    async def _aside(self, amount: int, work: Any, *arguments: Any) -> Any:
        """Do what takes a while on the thread."""
        if amount <= INLINE:
            return work(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, *arguments)

    # --- reading ---

    async def _read(self, blocks: Blocks) -> None:
        wanted: Blocks = []
        for block, place in blocks:
            if self._is_zeros(block):
                place[:] = bytes(PAGE_SIZE)
            else:
                wanted.append((block, place))
        if not wanted:
            return
        found = await self._server.values([self._key(block) for block, _ in wanted])
        await self._aside(len(wanted), self._place, wanted, found)

    def _is_zeros(self, block: int) -> bool:
        """Known without asking."""
        if block in self._doubts:
            return False
        number = self._numbers[block]
        return number == FORGOTTEN or (number == KNOWN_NOTHING and not self._server.was_used)

    def _place(self, wanted: Blocks, found: list[bytes | None]) -> None:
        for (block, place), value in zip(wanted, found, strict=True):
            if value is None or not self._is_expected(block, value):
                self._zeros_or_lost(block, value is None)
                place[:] = bytes(PAGE_SIZE)
                continue
            try:
                self._codec.decode(memoryview(value)[_STAMP.size :], place)
            except ValueError as error:
                raise self._lost(block, f"is damaged: {error}") from error

    def _is_expected(self, block: int, value: bytes) -> bool:
        if len(value) < _STAMP.size:
            return False
        session, number = _STAMP.unpack_from(value)
        allowed = {self._numbers[block], *self._doubts.get(block, ())}
        if session == self._session:
            return number in allowed
        server = self._server
        return KNOWN_NOTHING in allowed and server.was_used and not server.has_changed

    def _zeros_or_lost(self, block: int, is_missing: bool) -> None:
        """The value is not there, or not the one that should be."""
        allowed = {self._numbers[block], *self._doubts.get(block, ())}
        if FORGOTTEN in allowed:
            return
        server = self._server
        if KNOWN_NOTHING in allowed and (
            not server.was_used or (is_missing and not server.has_changed)
        ):
            return
        what = "vanished" if is_missing else "is not what was written"
        raise self._lost(block, f"{what}: the server was restarted, flushed or changed")

    def _lost(self, block: int, why: str) -> PageLostError:
        return PageLostError(why, store=NAME, page=block // self._blocks)

    # --- changing ---

    async def _write(self, blocks: Blocks) -> None:
        values = await self._aside(len(blocks), self._encoded, blocks)
        self._last = self._last % (FORGOTTEN - 1) + 1
        stamp = _STAMP.pack(self._session, self._last)
        pairs: list[bytes] = []
        for (block, _), value in zip(blocks, values, strict=True):
            pairs += (self._key(block), stamp + value)
        numbers = [block for block, _ in blocks]
        before = self._expect(numbers, self._last)
        try:
            await self._server.command("MSET", *pairs)
        except (StoreFullError, StoreFailedError) as error:
            # The server has said no, to all of it.
            for block, (number, doubts) in zip(numbers, before, strict=True):
                self._numbers[block] = number
                self._settle(block, doubts)
            error.page = numbers[0] // self._blocks
            raise
        for block in numbers:
            self._settle(block, None)

    def _encoded(self, blocks: Blocks) -> list[bytes]:
        return [self._codec.encode(place) for _, place in blocks]

    async def _forget(self, first: int, end: int) -> None:
        numbers = [block for block in range(first, end) if not self._is_zeros(block)]
        if not numbers:
            return
        self._expect(numbers, FORGOTTEN)
        await self._server.command("DEL", *(self._key(block) for block in numbers))
        for block in numbers:
            self._settle(block, None)

    def _expect(self, blocks: list[int], number: int) -> list[tuple[int, set[int] | None]]:
        """A new number for blocks, until it is settled beside the old ones; returns those."""
        before: list[tuple[int, set[int] | None]] = []
        for block in blocks:
            old, doubts = self._numbers[block], self._doubts.get(block)
            before.append((old, doubts))
            self._doubts[block] = {old, *(doubts or ())}
            self._numbers[block] = number
        return before

    def _settle(self, block: int, doubts: set[int] | None) -> None:
        if doubts is None:
            self._doubts.pop(block, None)
        else:
            self._doubts[block] = doubts


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await something that must not be left behind: a command that was sent may still be obeyed,
    and buffers are in use. Who is cancelled meanwhile learns it then."""
    task = asyncio.get_running_loop().create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()
        raise cancelled
    return task.result()


# --- opening ---


def _address(layer: LayerSpec, database: int, password: str | None) -> Address:
    target = layer.target
    if target.startswith("unix:/"):
        path = target.removeprefix("unix:")
        return Address(socket=path, database=database, password=password)
    match = _TARGET.fullmatch(target)
    if not match:
        raise layer.error("needs a server: redis://host:port/0, or redis:unix:/path")
    if match[3] and not 0 < int(match[3]) < 65536:
        raise layer.error(f"port {match[3]}: ports are 1 to 65535; Redis listens on 6379")
    if ":" in (match[1] or ""):
        raise layer.error("a password does not belong in a URL: use password_file=")
    return Address(
        host=match[2].strip("[]"),
        port=int(match[3] or 6379),
        database=int(match[4]) if match[4] else database,
        username=unquote(match[1]) if match[1] else None,
        password=password,
    )


async def _password(layer: LayerSpec, path: str | None) -> str | None:
    if path is None:
        return os.environ.get("REDISCLI_AUTH")
    async with aiofiles.open(path, encoding="utf-8") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise StoreFailedError(f"{path} can be read by others: chmod 600 {path}", store=NAME)
        return (await file.readline()).rstrip("\n")


async def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    options = Options(layer)
    prefix = options.text("prefix", default="userswap")
    database = options.integer("database", default=0, low=0, high=9999)
    password = await _password(layer, options.text("password_file", default=None))
    codec = codec_option(options, "zstd")
    options.finish()
    if not _PREFIX.fullmatch(prefix):
        raise layer.error("1 to 200 printable characters without spaces", "prefix")
    page_count = geometry.page_count or PAGES_MAX * PAGE_SIZE // geometry.page_size
    server = Server(_address(layer, database, password), prefix)
    try:
        await server.open()
        return RedisStore(server, prefix, codec, page_count, geometry.page_size)
    except BaseException:
        await server.aclose()
        raise
