"""The asyncio half of the fault path: awaits the store for pages that are not in memory.

The native fault server (or, with fault_path="asyncio", this loop itself) turns faults into misses;
each miss is a run of pages in FILLING that carry its ticket. It ends in `us_fill_done` or
`us_fill_failed`, always: a miss that were dropped would leave a thread asleep for ever. Each miss
is awaited on its own, so that no fault waits for another page's I/O.

Must not know: which store it is, clients' sockets, policies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Collection, Coroutine
from typing import Any, Protocol

from userswap.backends.store import PageLostError, Run, Store, StoreError, TransientError
from userswap.engine.gate import Gate, Urgency
from userswap.native import ffi, lib

log = logging.getLogger("userswap.pager")

PAGE = 4096
MISSES_PER_DRAIN = 256
RUN_PAGES_MAX = 32
BUFFER = f"uint8_t[{RUN_PAGES_MAX * PAGE}]"
RETRY_FIRST_S = 0.001
RETRY_MAX_S = 1.0
WAIT_LIMIT_S = 5
SERVE_ROUNDS = 64
"""Reads of the userfaultfd in one turn of the loop: then signals and timers have theirs."""


def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task, at once where Python can (3.12): a store in memory then needs no loop turn."""
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    return loop.create_task(coroutine)


async def cancel_all(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks, and return when each has ended."""
    for task in list(tasks):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Pending:
    """Counts what is under way, and lets one wait for its end."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        self._count += 1
        self._idle.clear()

    def end(self) -> None:
        self._count -= 1
        if not self._count:
            self._idle.set()

    async def settled(self) -> None:
        """Return when nothing is under way."""
        await self._idle.wait()


class Backing(Protocol):
    """Where a region's pages go."""

    @property
    def label(self) -> str: ...
    @property
    def store(self) -> Store: ...
    @property
    def base(self) -> int: ...
    @property
    def gate(self) -> Gate: ...


class Served:
    """What the loop needs to know of an open region."""

    def __init__(self, handle: Any, name: str, backing: Backing) -> None:
        self.handle = handle
        self.name = name
        self.backing = backing
        self.url = backing.label
        self.store: Store = backing.store
        self.base = backing.base
        """The store's index of the region's first page."""
        self.gate: Gate = backing.gate
        self.transfers = Pending()
        """Reads and writes of the store under way."""
        self.fills: dict[asyncio.Task[None], range] = {}
        """The reads, each with the pages that it brings."""

    async def filled(self, first: int, count: int) -> None:
        """Return when the reads have ended that are under way for pages of a range."""
        end = first + count
        mine = [
            task for task, run in self.fills.items() if max(first, run.start) < min(end, run.stop)
        ]
        if mine:
            await asyncio.wait(mine)


class FaultLoop:
    """Serves one client's misses."""

    def __init__(self, client: Any, uffd: int) -> None:
        self.client = client
        self.regions: dict[Any, Served] = {}
        """By the native region's pointer, as misses name it."""
        self._uffd = uffd
        self._misses = ffi.new("struct us_miss[]", MISSES_PER_DRAIN)
        self._each_miss = [self._misses + i for i in range(MISSES_PER_DRAIN)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[int, tuple[float, Served]] = {}
        self._told: set[int] = set()
        self._parked_looks = 0
        self._buffers: list[Any] = []
        self._now = ffi.new(BUFFER)
        self._now_views = [
            memoryview(ffi.buffer(self._now, count * PAGE)).cast("B") if count else memoryview(b"")
            for count in range(RUN_PAGES_MAX + 1)
        ]
        """The buffer for what needs no waiting, as runs of each length."""
        self._void = ffi.new("uint64_t *")

    def region(self, handle: Any) -> Served:
        """The region that a native pointer names."""
        return self.regions[handle]

    def attach(self) -> None:
        """Take every fault, in the native server's place."""
        asyncio.get_running_loop().add_reader(self._uffd, self.serve)

    def detach(self) -> None:
        asyncio.get_running_loop().remove_reader(self._uffd)

    def serve(self) -> None:
        """Answer what can be answered from memory; the rest become misses."""
        count = lib.us_serve_misses(self.client, SERVE_ROUNDS, self._misses, MISSES_PER_DRAIN)
        self._fill_all(count)
        if count == MISSES_PER_DRAIN:
            self.drain()

    def drain(self) -> None:
        """Start a fill for each miss that is there, demand before readahead."""
        while True:
            count = lib.us_take_misses(self.client, self._misses, MISSES_PER_DRAIN)
            self._fill_all(count)
            if count < MISSES_PER_DRAIN:
                return

    def _fill_all(self, count: int) -> None:
        """Start a fill for each of the misses that were just taken; negative: none were."""
        misses = self._each_miss[: max(count, 0)]
        for miss in sorted(misses, key=_is_ahead) if count > 1 else misses:
            region = self.regions[miss.region]
            if self._fill_now(region, miss):
                continue
            copy = ffi.new("struct us_miss *", miss[0])
            region.transfers.begin()
            task = start(self._fill(region, copy))
            if not task.done():
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                region.fills[task] = range(copy.first, copy.first + copy.count)
                task.add_done_callback(region.fills.pop)

    def _fill_now(self, region: Served, miss: Any) -> bool:
        """Serve a miss whose pages the store has at hand, without the price of a task.

        Whatever else there is to say, errors too, is said by the task."""
        try:
            run = Run(region.base + miss.first, self._now_views[miss.count])
            if not region.store.read_now((run,)):
                return False
        except Exception:
            return False
        lib.us_fill_done(region.handle, miss, self._now, self._void)
        if self._void[0]:
            region.transfers.begin()
            task = start(_discard_void(region, int(miss.first), int(self._void[0])))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return True

    async def _fill(self, region: Served, miss: Any) -> None:
        ticket = int(miss.ticket)
        urgency = Urgency.READAHEAD if miss.ahead else Urgency.DEMAND
        if not miss.ahead:
            self._waiting[ticket] = (time.monotonic(), region)
        try:
            await region.gate.enter(urgency)
        except asyncio.CancelledError:
            self._waiting.pop(ticket, None)
            region.transfers.end()
            raise
        buffer = self._buffers.pop() if self._buffers else ffi.new(BUFFER)
        try:
            if await self._read(region, miss, buffer):
                await self._install(region, miss, buffer)
            elif miss.count == 1:
                await self._lose(region, miss)
            else:
                await self._fill_singly(region, miss, buffer)
        finally:
            self._waiting.pop(ticket, None)
            self._told.discard(ticket)
            self._buffers.append(buffer)
            region.gate.leave()
            region.transfers.end()

    async def _read(self, region: Served, miss: Any, buffer: Any) -> bool:
        """Read the miss's run; False when a page of it is lost. Transient errors are waited out."""
        view = memoryview(ffi.buffer(buffer, miss.count * PAGE)).cast("B")
        delay = RETRY_FIRST_S
        while True:
            try:
                await region.store.read([Run(region.base + miss.first, view)])
                return True
            except TransientError as error:
                log.warning("%s: read of page %d: %s; again", region.name, miss.first, error)
            except PageLostError as error:
                log.error("%s: page %d is lost: %s", region.name, miss.first, error)
                return False
            except StoreError as error:
                log.error("%s: page %d cannot be read: %s", region.name, miss.first, error)
                return False
            except Exception:
                log.exception("%s: the store %s broke its contract", region.name, region.url)
                return False
            await asyncio.sleep(delay)
            delay = min(delay * 2, RETRY_MAX_S)

    async def _fill_singly(self, region: Served, miss: Any, buffer: Any) -> None:
        """A run that failed is read page by page: one bad page takes no neighbour along."""
        for offset in range(miss.count):
            single = ffi.new("struct us_miss *", miss[0])
            single.first, single.count = miss.first + offset, 1
            if await self._read(region, single, buffer):
                await self._install(region, single, buffer)
            else:
                await self._lose(region, single)

    async def _lose(self, region: Served, miss: Any) -> None:
        void = lib.us_fill_failed(region.handle, miss, 1)
        if void:
            await discard_marked(region, miss.first, void)

    async def _install(self, region: Served, miss: Any, buffer: Any) -> None:
        void = ffi.new("uint64_t *")
        lib.us_fill_done(region.handle, miss, buffer, void)
        if void[0]:
            await discard_marked(region, miss.first, void[0])

    def look_for_waiting(self) -> None:
        """Once a second: have the agent tell of a fault that waits too long."""
        self._look_for_parked()
        now = time.monotonic()
        for ticket, (since, region) in self._waiting.items():
            if now - since > WAIT_LIMIT_S and ticket not in self._told:
                self._told.add(ticket)
                self.say(
                    f"a page fault in region {region.name!r} waits for its store {region.url}; "
                    "look at the store, or end this process"
                )

    def _look_for_parked(self) -> None:
        parked = lib.us_client_stuck(self.client)
        self._parked_looks = self._parked_looks + 1 if parked != ffi.NULL else 0
        if self._parked_looks != WAIT_LIMIT_S:
            return
        region = self.region(parked)
        report = ffi.new("struct us_report *")
        lib.us_region_report(parked, report)
        why = "which does not end its writes: look at the store, or end this process"
        if report.is_full:
            why = "which is full: discard data, raise resident or the store's limit, or use "
            why += 'on_full="grow"'
        self.say(
            f"region {region.name!r} is at its budget and nothing goes out to {region.url}, {why}"
        )

    def say(self, text: str) -> None:
        """Have the agent tell the client's user what a fault waits for."""
        lib.us_client_say(self.client, text.encode(), 1)

    async def cancel(self) -> None:
        """The client is gone: nobody waits any more."""
        await cancel_all(self._tasks)


def _is_ahead(miss: Any) -> bool:
    return bool(miss.ahead)


async def _discard_void(region: Served, first: int, marked: int) -> None:
    try:
        await discard_marked(region, first, marked)
    finally:
        region.transfers.end()


async def discard_marked(region: Served, first: int, marked: int) -> None:
    """Discard from the store the pages whose bits are set, which are BUSY until that has ended."""
    try:
        offset = 0
        while marked >> offset:
            if not marked >> offset & 1:
                offset += 1
                continue
            count = 1
            while marked >> (offset + count) & 1:
                count += 1
            await region.store.discard(region.base + first + offset, count)
            offset += count
    except StoreError as error:
        log.warning("%s: discard in the store failed: %s", region.name, error)
    finally:
        lib.us_discard_end(region.handle, first, marked)
