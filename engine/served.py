"""One client as the pager serves it: its operations, each a request of the control connection.

Every operation checks what it is given: a client's numbers are a stranger's. Long ones poll the
native core, which never waits for a client.

Must not know: sockets, how a client came here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from userswap.backends.grammar import unknown_name
from userswap.backends.store import PAGES_MAX
from userswap.engine import movers
from userswap.engine.errors import ConfigError, ResidentError
from userswap.engine.evictor import Evictor
from userswap.engine.fault_loop import (
    WAIT_LIMIT_S,
    FaultLoop,
    Pending,
    Served,
    discard_marked,
)
from userswap.engine.page_table import Extents, State
from userswap.engine.policies.prefetch import names
from userswap.engine.stores import Backing, Stores, label_of
from userswap.native import check, ffi, lib

log = logging.getLogger("userswap.pager")
T = TypeVar("T")
_threads = ThreadPoolExecutor(2, "userswap-beside")

PAGE = 4096
POLL_FIRST_S = 0.0001
POLL_MAX_S = 0.005
CHUNK = 64
DISCARD_PAGES = 1 << 18
"""Of one discard, marked at a time: 1 MiB of marks."""
DISCARD_STALL_S = 5.0
PREFETCH_TRIES = 200
STORE_END_S = 10.0
"""How long a store may take to discard a region whose client is gone."""
THREAD_AGAIN_S = 0.1
THREAD_TRIES = 600
"""One minute: an embedded pager whose client is gone must be able to end."""
QUIET_TRIES = 200
"""One second: a client whose agent is stopped must be able to end."""
CENSUS_PAGES = 1 << 16
"""Counted on the loop: more would hold it up for a millisecond."""
COUNTS = ("zero", "load", "awaited", "rescue", "protect", "spurious", "forgotten", "parked")


class OpenRegion(Served):
    """A region with what only the operations need."""

    backing: Backing

    def __init__(
        self, handle: Any, name: str, backing: Backing, *, pages: int, table_base: int, pool: Any
    ) -> None:
        super().__init__(handle, name, backing)
        self.pages = pages
        self.table_base = table_base
        self.pool = pool
        self.closing = self.detached = False
        self.operations = Pending()
        """Requests that loop over the region."""


class ClientService:
    """The operations of one client."""

    def __init__(self, number: int, uffd: int, hello: dict[str, Any], stores: Stores) -> None:
        self.number = number
        """Of this client in its pager, from 1."""
        self.stores = stores
        self.uffd = uffd
        self._may_change = hello["fault_path"] == "auto"
        self.fault_path = "asyncio" if self._may_change else str(hello["fault_path"])
        """Who reads the userfaultfd: the native server, or the loop."""
        self.pid = int(hello["pid"])
        self.placement = int(hello["placement"])
        self.mover = str(hello["mover"])
        mover = movers.NUMBERS[self.mover]
        out = ffi.new("struct us_client **")
        features, canary = int(hello["features"]), int(hello["canary"])
        check(lib.us_client_create(out, uffd, self.pid, features, 0, canary))
        self.native = out[0]
        lib.us_client_set_mover(self.native, mover)
        self.loop = FaultLoop(self.native, uffd)
        self.evictor = Evictor(self.native, self.loop)
        self.regions: dict[int, OpenRegion] = {}
        self._extents = Extents()
        self._beside = Pending()
        self._last_region = 0
        self._timer: asyncio.TimerHandle | None = None
        self._gone: Callable[[], None] = lambda: None

    def descriptors(self) -> list[int]:
        """What the client keeps copies of: table, channel, orders, results."""
        return [lib.us_client_descriptors(self.native, which) for which in range(4)]

    def start(self, staging: int, agent_tid: int, gone: Callable[[], None]) -> None:
        """The client's agent runs: serve, and call `gone` when its memory is no more."""
        self._gone = gone
        lib.us_client_set_agent(self.native, staging, agent_tid)
        check(lib.us_client_start(self.native, self.placement))
        if self.fault_path == "asyncio":
            self.loop.attach()
        else:
            check(lib.us_client_serve(self.native))
        wake = lib.us_client_descriptors(self.native, 4)
        asyncio.get_running_loop().add_reader(wake, self._woken, wake)
        self._tick()

    def _woken(self, wake: int) -> None:
        os.eventfd_read(wake)
        self.loop.drain()
        self.evictor.drain()
        if lib.us_client_news(self.native):
            self._tell_news()

    def _tell_news(self) -> None:
        while (full := lib.us_client_full(self.native)) != ffi.NULL:
            self.evictor.complain(self.loop.region(full), "is full")
        while (held := lib.us_client_held(self.native)) != ffi.NULL:
            region = self.loop.region(held)
            why = movers.held_by(region.handle)
            log.warning("%s: what was written stays in memory: %s", region.name, why)

    def _tick(self) -> None:
        self.loop.look_for_waiting()
        if lib.us_client_gone(self.native):
            self._gone()
        self._timer = asyncio.get_running_loop().call_later(1.0, self._tick)

    async def open(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Open a region; the answer brings the pool's descriptor, for a later take-over."""
        start, pages, limit = (int(request[key]) for key in ("start", "pages", "limit"))
        url = str(request["store"])
        if not 0 < pages <= PAGES_MAX or start <= 0 or start % PAGE or limit < PAGE:
            raise ConfigError(f"a region of {pages} pages at {start:#x} with {limit} bytes")
        self._last_region += 1
        number = self._last_region
        name = str(request.get("name") or f"region-{number}")
        with self.telling("opening", name, label_of(url)):
            backing = await self.stores.open(self.number, url, name, pages)
        try:
            region = self._open_native(name, backing, start, pages, request)
        except BaseException:
            await self.stores.close(backing)
            raise
        self.regions[number] = region
        self.loop.regions[region.handle] = region
        descriptors = [backing.native.fd] if backing.native else []
        return {"region": number, "name": name}, descriptors

    def _open_native(
        self, name: str, backing: Backing, start: int, pages: int, request: dict[str, Any]
    ) -> OpenRegion:
        prefetch = lib.us_prefetch_find(str(request["prefetch"]).encode())
        if prefetch == ffi.NULL:
            raise ConfigError(unknown_name("prefetch policy", str(request["prefetch"]), names()))
        pool = ffi.NULL
        if backing.native is not None:
            pool = backing.native.pool
            self._serve_natively()
            lib.us_client_own_pool(self.native, pool)
        try:
            base = self._extents.allocate(pages)
        except MemoryError:
            raise ConfigError("this process has no room for more regions (16 TiB)") from None
        out = ffi.new("struct us_region **")
        limit, grow = int(request["limit"]), bool(request["grow"])
        try:
            check(
                lib.us_region_open(
                    self.native, start, pages, base, limit, pool, grow, prefetch, out
                )
            )
        except OSError:
            self._extents.release(base, pages)
            raise
        return OpenRegion(out[0], name, backing, pages=pages, table_base=base, pool=pool)

    def _serve_natively(self) -> None:
        """The first pool of a client that left the choice to us: its faults need no interpreter.

        There is no way back: whoever reads the userfaultfd would have to be stopped first."""
        if not self._may_change or self.fault_path == "native":
            return
        check(lib.us_client_serve(self.native))  # where it gets no thread, the loop serves on
        self.loop.detach()
        self.fault_path = "native"

    def region(self, request: dict[str, Any]) -> OpenRegion:
        """The region that a request names."""
        try:
            return self.regions[int(request["region"])]
        except (KeyError, ValueError, TypeError):
            raise ConfigError(f"no region {request.get('region')!r}") from None

    @contextlib.contextmanager
    def telling(self, what: str, name: str, store: str) -> Iterator[None]:
        """Around what a store may hold up for ever: the client's user hears of it after a while.

        Whoever asked may give up waiting; a region that is being closed is closed all the same,
        once the store lets it."""
        text = f"{what} region {name!r} waits for its store {store}"
        help_ = (
            "look at the store, or give up (Ctrl-C): it goes on by itself, or ends with its process"
        )
        teller = asyncio.get_running_loop().call_later(
            WAIT_LIMIT_S, self.loop.say, f"{text}; {help_}"
        )
        try:
            yield
        finally:
            teller.cancel()

    async def quiesce(self, region: OpenRegion) -> None:
        """Stop eviction and readahead; return when nothing of the region is under way.

        Operations that loop over the region see that it closes, and end."""
        delay = POLL_FIRST_S
        region.closing = True
        while lib.us_region_quiesce(region.handle):
            await asyncio.sleep(delay)
            delay = min(delay * 2, POLL_MAX_S)
        await region.operations.settled()
        await self._beside.settled()
        await region.transfers.settled()

    async def close(self, number: int, *, unmapped: bool) -> None:
        """Forget a region that is quiet."""
        region = self.regions[number]
        with self.telling("closing", region.name, region.url):
            await self._close(number, region, unmapped=unmapped)

    async def _close(self, number: int, region: OpenRegion, *, unmapped: bool) -> None:
        await self.quiesce(region)
        lib.us_region_detach(region.handle, unmapped)
        region.detached = True
        self.loop.drain()  # a fault that came before it was detached
        await self.quiesce(region)
        check(lib.us_region_free(region.handle))
        del self.regions[number]
        del self.loop.regions[region.handle]
        self._extents.release(region.table_base, region.pages)
        await self.stores.close(region.backing)

    async def discard(self, region: OpenRegion, first: int, count: int) -> None:
        """Make a range ZERO, in memory and then in the store."""
        if first < 0 or count < 0 or first + count > region.pages:
            raise ConfigError(f"pages {first}+{count} are outside the region's {region.pages}")
        end = first + count
        for start, size in _parts(region, first, end, DISCARD_PAGES):
            await self._discard_part(region, start, size)
        if region.pool:
            return
        for start, size in _parts(region, first, end, CHUNK):
            marked = lib.us_discard_begin(region.handle, start, size)
            if marked:
                await discard_marked(region, start, marked)

    async def _discard_part(self, region: OpenRegion, first: int, count: int) -> None:
        mark = ffi.new("uint32_t[]", count)
        delay, least, since = POLL_FIRST_S, count + 1, time.monotonic()
        while left := lib.us_region_discard(region.handle, first, count, mark):
            if left < 0:
                raise ConfigError(f"region {region.name!r} is being closed")
            now = time.monotonic()
            if left < least:
                least, since = left, now
            elif now - since > DISCARD_STALL_S:
                raise ResidentError(
                    f"region {region.name!r}: {left} pages cannot be discarded: the client's agent "
                    "does not run, or the store does not end what it began"
                )
            await asyncio.sleep(delay)
            delay = min(delay * 2, POLL_MAX_S)

    async def prefetch(self, region: OpenRegion, first: int, count: int) -> int:
        """Bring pages in while there is room; returns the pages dealt with.

        It waits for its own pages alone, and for a chunk of them before it asks for the next: a
        fault's read of the store is not to queue behind thousands that nobody sleeps for.
        """
        if first < 0 or count < 0 or first + count > region.pages:
            raise ConfigError(f"pages {first}+{count} are outside the region's {region.pages}")
        report = ffi.new("struct us_report *")
        lib.us_region_report(region.handle, report)
        count = min(count, report.limit // PAGE * 3 // 4)  # more would evict what it brought
        done, tries = 0, 0
        while done < count and tries < PREFETCH_TRIES:
            at = first + done
            step = lib.us_region_prefetch(region.handle, at, min(CHUNK, count - done))
            if step < 0:
                raise ConfigError(f"region {region.name!r} is being closed")
            done += step
            tries = 0 if step else tries + 1
            self.loop.drain()
            await region.filled(at, step)
            await asyncio.sleep(0 if step else POLL_MAX_S)
        return done

    async def flush(self, region: OpenRegion) -> None:
        """Wait for the writes under way, then for the store."""
        newest = lib.us_client_batches(self.native)
        delay = POLL_FIRST_S
        while lib.us_region_oldest_batch(region.handle) <= newest and not region.closing:
            await asyncio.sleep(delay)
            delay = min(delay * 2, POLL_MAX_S)
        await region.store.flush()

    async def stats_of(self, region: OpenRegion) -> dict[str, Any]:
        """The fields of RegionStats; beside the loop where there is much to count."""
        if region.pages <= CENSUS_PAGES or region.closing:
            return self.stats(region)
        return await self.beside(lambda: self.stats(region))

    async def beside(self, job: Callable[[], T]) -> T:
        """Do native work on another thread; nothing of this client's is freed before it ends."""
        loop = asyncio.get_running_loop()
        self._beside.begin()
        done = _threads.submit(job)
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(self._beside.end))
        return await asyncio.wrap_future(done)

    def stats(self, region: OpenRegion) -> dict[str, Any]:
        """The fields of RegionStats."""
        report = ffi.new("struct us_report *")
        lib.us_region_report(region.handle, report)
        states = ffi.new("uint64_t[]", len(State))
        lib.us_region_census(region.handle, states)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "name": region.name,
            "store": region.url,
            "size": region.pages * PAGE,
            "resident_limit": report.limit,
            "resident_bytes": report.charged - report.kept,
            "staging_bytes": report.leaving,
            "kept_bytes": report.kept,
            "pages": {state.name: states[state] for state in State},
            "faults": {name: getattr(report, name) for name in COUNTS},
            "faults_native": sum(
                getattr(report, n) for n in COUNTS if n not in ("awaited", "forgotten", "parked")
            ),
            "faults_awaited": report.awaited,
            "readahead_pages": report.ahead,
            "evicted_pages": report.moved,
            "dropped_pages": report.dropped,
            "refused_pages": report.refused,
            "put_back_pages": report.put_back,
            "over_budget_pages": report.over_budget,
            "lost_pages": report.lost,
            "vanished_pages": report.vanished,
            "store_full": bool(report.is_full),
            "agent_late": bool(report.agent_late),
            "native_latency": self._latency(region, awaited=False),
            "awaited_latency": self._latency(region, awaited=True),
            **_pool_stats(region.pool),
            "table_bytes": lib.us_client_table_bytes(self.native),
            "pager_pid": os.getpid(),
            "pager_cpu_seconds": usage.ru_utime + usage.ru_stime,
            "pager_rss_bytes": own_memory(),
            "fault_path": self.fault_path,
            "mover": self.mover,
            "held_by": movers.held_by(region.handle),
            "cpu": report.cpu,
        }

    def _latency(self, region: OpenRegion, *, awaited: bool) -> dict[str, float]:
        def at(fraction: float) -> float:
            return float(lib.us_region_latency(region.handle, awaited, fraction)) / 1000

        return {
            "count": lib.us_region_latency_count(region.handle, awaited),
            "p50_us": at(0.5),
            "p90_us": at(0.9),
            "p99_us": at(0.99),
            "p999_us": at(0.999),
            "max_us": at(1.0),
        }

    async def quiet(self) -> None:
        """The client ends: return when no order is open. Its faults are still answered."""
        tries = 0
        while lib.us_client_quiet(self.native) and tries < QUIET_TRIES:
            tries += 1
            await asyncio.sleep(POLL_MAX_S)

    async def end(self) -> None:
        """The client is gone: free everything that was its own."""
        for region in self.regions.values():
            region.closing = True  # who looks after regions leaves it alone from here on
        if self._timer is not None:
            self._timer.cancel()
        asyncio.get_running_loop().remove_reader(lib.us_client_descriptors(self.native, 4))
        # Beside the loop: a worker's read of the client's memory may need it to serve a fault, and
        # lasts as long as the client likes, so that a thread shared with others will not do.
        await on_own_thread(lambda: lib.us_client_stop(self.native))
        self.loop.detach()
        await self.loop.cancel()
        await self.evictor.cancel()
        for region in self.regions.values():
            await region.operations.settled()
        await self._beside.settled()
        regions = list(self.regions.values())
        self.regions.clear()  # before the first is freed: `stat` looks at them at any time
        for region in regions:
            if region.detached:  # its close was cancelled, and the native client knows it no more
                check(lib.us_region_free(region.handle))
            try:
                await asyncio.wait_for(self.stores.close(region.backing), STORE_END_S)
            except TimeoutError:
                log.warning("store %s: does not let go of region %s", region.url, region.name)
        # Only now: a store's buffers may be the client's memory. The table may take a while.
        await on_own_thread(lambda: lib.us_client_destroy(self.native))
        os.close(self.uffd)


def _parts(region: OpenRegion, first: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """First page and length of what may hold something: what was never touched is skipped."""
    while (first := lib.us_region_next(region.handle, first)) < end:
        size = min(most, end - first)
        yield first, size
        first += size


async def on_own_thread(job: Callable[[], None]) -> None:
    """Do a job on a thread that nobody waits for at the end of this process."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle() -> None:
        if not done.done():
            done.set_result(None)

    def run() -> None:
        job()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle)

    for left in reversed(range(THREAD_TRIES)):
        try:
            threading.Thread(target=run, name="userswap-end", daemon=True).start()
            break
        except RuntimeError:  # as many run as may: another may end meanwhile
            if not left:
                raise
            await asyncio.sleep(THREAD_AGAIN_S)
    await done


def _pool_stats(pool: Any) -> dict[str, Any]:
    if pool == ffi.NULL:
        return {
            "pool_bytes": 0,
            "pool_payload_bytes": 0,
            "pool_object_bytes": 0,
            "pool_pages": 0,
            "pool_same_filled": 0,
            "pool_locked": False,
        }
    stats = ffi.new("struct us_pool_stats *")
    lib.us_pool_stats(pool, stats)
    return {
        "pool_bytes": stats.file_bytes,
        "pool_payload_bytes": stats.payload_bytes,
        "pool_object_bytes": stats.object_bytes,
        "pool_pages": stats.objects,
        "pool_same_filled": stats.same_filled,
        "pool_locked": bool(stats.locked),
    }


def own_memory() -> int:
    """Bytes of this process's memory that nobody else has: pool, table and channel left out."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
