"""A namespace's blocks on the pages of a store: what a host's command asks for, done.

Responsible for: reading, writing, zeroing and flushing blocks, also where a page holds several;
whose turn it is where commands meet on a page; and which status a store's error becomes.
Invariants:
 1. No two operations of which one writes or discards are in the store on the same page: a host may
    send such commands at once, and the contract of stores leaves it to their callers. Who came
    first goes first, so nobody starves and nobody waits in a circle.
 2. A block that a command does not name keeps its content, whatever shares its page.
 3. A flush is answered when one that began after it was asked for has returned.
Must not know: hosts, connections, memory limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from userswap.backends.nvme_tcp.command import Io, Status
from userswap.backends.nvme_tcp.identify import Namespace
from userswap.backends.nvme_tcp.pdu import Buffer
from userswap.backends.nvme_tcp.target import Operation
from userswap.backends.store import (
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFullError,
    TransientError,
)

log = logging.getLogger("userswap.nvme")

BLOCK_SIZES = (512, 4096)
DISCARD_PAGES = 1 << 18
"""Of one discard: between two the loop has its turn."""

Outcome = tuple[int, Buffer]
"""Status, and the data of a Read that succeeded."""


class _Claim:
    """Pages that an operation works on, from its turn on, and before that waits for."""

    __slots__ = ("blockers", "end", "exclusive", "first", "followers", "turn")

    def __init__(self, first: int, end: int, exclusive: bool) -> None:
        self.first, self.end, self.exclusive = first, end, exclusive
        self.blockers = 0
        self.followers: list[_Claim] = []
        self.turn: asyncio.Future[None] | None = None

    def meets(self, first: int, end: int) -> bool:
        return self.first < end and first < self.end


class Turns:
    """Who may work on which pages now."""

    def __init__(self) -> None:
        self._claims: dict[_Claim, None] = {}
        self._exclusive: dict[_Claim, None] = {}

    def readable(self, first: int, end: int) -> bool:
        """Whether somebody who reads at once, without waiting, meets nobody."""
        return not any(claim.meets(first, end) for claim in self._exclusive)

    async def take(self, first: int, end: int, *, exclusive: bool) -> _Claim:
        """Wait until all who came before and meet these pages are through; then `end` it."""
        claim = _Claim(first, end, exclusive)
        for other in self._claims if exclusive else self._exclusive:
            if other.meets(first, end):
                other.followers.append(claim)
                claim.blockers += 1
        self._claims[claim] = None
        if exclusive:
            self._exclusive[claim] = None
        if claim.blockers:
            claim.turn = asyncio.get_running_loop().create_future()
            try:
                await claim.turn
            except asyncio.CancelledError:
                self.end(claim)
                raise
        return claim

    def end(self, claim: _Claim) -> None:
        del self._claims[claim]
        self._exclusive.pop(claim, None)
        for follower in claim.followers:
            follower.blockers -= 1
            turn = follower.turn
            if not follower.blockers and turn is not None and not turn.done():
                turn.set_result(None)


class _Flushes:
    """Flushes of a store: who asks while one is under way shares the next one."""

    def __init__(self, flush: Callable[[], Awaitable[None]]) -> None:
        self._flush = flush
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def flush(self) -> None:
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running))
        await asyncio.shield(self._next)

    async def _after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._next = self._next, None
        await self._flush()


class Blocks:
    """See the module. `namespace` is what hosts are told of it."""

    def __init__(self, store: Store, *, block_size: int, nguid: bytes) -> None:
        assert block_size in BLOCK_SIZES
        assert store.page_size % block_size == 0
        self.store = store
        self._size = block_size
        self._per_page = store.page_size // block_size
        self._turns = Turns()
        self._flushes = _Flushes(store.flush)
        self._told: set[str] = set()
        blocks = store.page_count * self._per_page
        self.namespace = Namespace(blocks, block_size, nguid=nguid)

    def read_now(self, operation: Operation) -> bytearray | None:
        """The blocks of a Read, if the store has them at hand and nobody is in the way."""
        ((first, count),) = operation.ranges
        per_page = self._per_page
        if first % per_page or count % per_page:
            return None
        index, end = first // per_page, (first + count) // per_page
        if not self._turns.readable(index, end):
            return None
        data = bytearray(count * self._size)
        try:
            there = self.store.read_now((Run(index, memoryview(data)),))
        except StoreError:
            return None  # awaiting it says what is wrong
        return data if there else None

    async def perform(self, operation: Operation) -> Outcome:
        """Do what a command asks for; never raises but when it is cancelled."""
        try:
            data = await self._perform(operation)
        except StoreError as error:
            return self._status(operation, error), b""
        except Exception:
            log.exception("%s", operation.kind.name)
            return Status.INTERNAL_ERROR, b""
        return Status.SUCCESS, data

    async def _perform(self, operation: Operation) -> Buffer:
        data: Buffer = b""
        if operation.kind == Io.FLUSH:
            await self._flushes.flush()
            return data
        first = min((first for first, _ in operation.ranges), default=0)
        last = max((first + count for first, count in operation.ranges), default=0)
        if first == last:
            return data
        index, end = first // self._per_page, -(-last // self._per_page)
        reads = operation.kind == Io.READ
        claim = await self._turns.take(index, end, exclusive=not reads)
        try:
            if reads:
                data = await self._read(first, last, index, end)
            elif operation.kind == Io.WRITE:
                await self._write(first, last, memoryview(operation.data))
            else:
                for start, count in operation.ranges:
                    await self._clear(start, start + count)
        finally:
            self._turns.end(claim)
        if operation.durable:
            await self._flushes.flush()
        return data

    async def _read(self, first: int, last: int, index: int, end: int) -> memoryview:
        pages = memoryview(bytearray((end - index) * self.store.page_size))
        await self.store.read((Run(index, pages),))
        skipped = (first - index * self._per_page) * self._size
        return pages[skipped : skipped + (last - first) * self._size]

    async def _write(self, first: int, last: int, data: memoryview) -> None:
        """Whole pages go to the store from where they are; a page in part is read before."""
        runs = []
        at = first
        while at < last:
            page = at // self._per_page
            start = page * self._per_page
            part = data[(at - first) * self._size :]
            if at == start and last - at >= self._per_page:
                whole = (last - at) // self._per_page
                runs.append(Run(page, part[: whole * self.store.page_size]))
                at += whole * self._per_page
                continue
            stop = min(start + self._per_page, last)
            content = memoryview(bytearray(self.store.page_size))
            await self.store.read((Run(page, content),))
            place = slice((at - start) * self._size, (stop - start) * self._size)
            content[place] = part[: (stop - at) * self._size]
            runs.append(Run(page, content))
            at = stop
        await self.store.write(runs)

    async def _clear(self, first: int, last: int) -> None:
        """Blocks that read as zeros from now on: whole pages are discarded."""
        index, end = -(-first // self._per_page), last // self._per_page
        if index > end:  # within one page
            await self._write(first, last, memoryview(bytes((last - first) * self._size)))
            return
        for edge, stop in ((first, index * self._per_page), (end * self._per_page, last)):
            if edge < stop:
                await self._write(edge, stop, memoryview(bytes((stop - edge) * self._size)))
        for page in range(index, end, DISCARD_PAGES):
            await self.store.discard(page, min(DISCARD_PAGES, end - page))
            await asyncio.sleep(0)

    def _status(self, operation: Operation, error: StoreError) -> Status:
        """What a host is told; the operator is told once of each kind of failure."""
        kind = type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s failed: %s (further ones are not told)", operation.kind.name, error)
        if isinstance(error, TransientError):
            return Status.INTERRUPTED
        if isinstance(error, PageLostError):
            return Status.UNRECOVERED_READ
        if isinstance(error, StoreFullError):
            return Status.CAPACITY_EXCEEDED
        return Status.INTERNAL_ERROR
