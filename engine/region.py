"""Region: memory of this process that a pager keeps at a budget, the rest of it in a store.

The memory is a private anonymous mapping. It is never unmapped while a buffer on it is alive, and
never before the pager has confirmed that no order on it is under way: the agent drops pages by
address, and an address may be somebody else's a moment after it was unmapped.

Must not know: how faults are served, what a store is.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import warnings
from types import TracebackType
from typing import Any, Self

from userswap.backends.grammar import GrammarError, format_size, parse_size
from userswap.engine import client as clients
from userswap.engine.client import Client, Settings
from userswap.engine.errors import ConfigError, PagerError, ResidentError, UnsupportedError
from userswap.engine.stats import RegionStats
from userswap.native import check, ffi, lib

PAGE = 4096
PAGES_MIN = 256
"""The smallest budget: room for the pages that each thread needs at once, and for those on their
way out."""
PAGES_PER_THREAD = 8
SIZE_MAX = 1 << 44
NORESERVE = 0x4000
RESIZE_STALL_S = 5.0
POLL_S = 0.0005


class _Mapping(mmap.mmap):
    """The memory of a region; ends with the last buffer on it."""

    region: Region | None = None

    def __del__(self) -> None:
        if self.region is not None:
            self.region._end(unmapped=False)

    def close(self) -> None:
        if self.region is not None:
            raise ConfigError("this memory belongs to a region: close the region")
        super().close()

    def resize(self, newsize: int) -> None:
        raise ConfigError("a region's memory cannot be resized; see Region.resize_resident")

    def madvise(self, *arguments: int) -> None:
        raise ConfigError("use Region.discard and Region.prefetch on a region's memory")


class Region:
    """Memory of `size` bytes, of which at most `resident` are in RAM uncompressed.

    Parameters:
        size: bytes, or text such as "1GiB"; rounded up to whole pages of 4096 bytes.
        resident: the budget: bytes, "256MiB" or a share such as "25%". Pages on their way out and
            compressed copies kept of clean pages count in it; what the store itself holds does
            not. At least 1 MiB, and 32 KiB for each thread of the process.
        store: where the rest goes, as a store URL: "ram:lz4", "ram:zstd?level=1&limit=512MiB",
            "memory:".
        name: for statistics and messages.
        fault_path: "native" answers faults whose page is in memory without the interpreter;
            "asyncio" sends every fault through the event loop.
        on_full: what faults do once the store is full: "grow" lets the region go over its budget,
            "stall" makes them wait for room.
        on_pager_death: "abort" this process, or "block" the threads that touch what is out of
            reach.
        user_mode_only: ask for a userfaultfd without privileges. System calls on memory that is
            paged out then fail with EFAULT.
        placement: which CPU serves faults: "same" as the faulting thread's, "other", "none" (as
            the scheduler likes) or "auto".
        prefetch: "streams" or "none".

    Raises ConfigError for what cannot be meant, UnsupportedError for what this machine cannot do,
    PagerError when the pager is gone. Usable as a context manager.

    A forked child does not inherit the memory: touching it there is SIGSEGV.
    """

    def __init__(
        self,
        size: int | str,
        *,
        resident: int | str,
        store: str = "ram:lz4",
        name: str | None = None,
        fault_path: str = "native",
        on_full: str = "grow",
        on_pager_death: str = "abort",
        user_mode_only: bool = False,
        placement: str = "auto",
        prefetch: str = "streams",
    ) -> None:
        self._client: Client | None = None
        self._mapping: _Mapping | None = None
        if on_full not in ("grow", "stall"):
            raise ConfigError(f"on_full={on_full!r}: use grow or stall")
        settings = Settings(fault_path, on_pager_death, user_mode_only, placement)
        self.size = _parse("size", size)
        limit = _check_resident(_parse("resident", resident, self.size))
        with clients.lock():
            mapping, start = _map_memory(self.size)
            client = clients.acquire(settings)
            try:
                _refuse_mergeable(start)
                answer = client.call(
                    "open",
                    start=start,
                    pages=self.size // PAGE,
                    limit=limit,
                    store=store,
                    name=name,
                    grow=on_full == "grow",
                    prefetch=prefetch,
                )
                self._id: int = answer["region"]
                client.regions[self._id] = (start, self.size)
                self.name: str = answer["name"]
                try:
                    check(lib.us_agent_register(client.uffd, start, self.size))
                except OSError as error:
                    client.call("close", region=self._id, unmapped=True)
                    del client.regions[self._id]
                    raise UnsupportedError(f"the memory cannot be registered ({error})") from None
            except BaseException:
                clients.release(client)
                raise
        self._client = client
        self._mapping = mapping
        mapping.region = self
        self._memory: memoryview | None = memoryview(mapping)

    @property
    def memory(self) -> memoryview:
        """The region's bytes, writable. Slices and arrays on it keep the memory alive."""
        if self._memory is None:
            raise ValueError("the region is closed")
        return self._memory

    @property
    def resident(self) -> int:
        """The budget in bytes."""
        return self.stats().resident_limit

    def stats(self) -> RegionStats:
        """A snapshot of sizes, page states, faults and latencies."""
        return RegionStats.from_message(self._call("stats")["stats"])

    def resize_resident(self, resident: int | str) -> None:
        """Change the budget and wait until it holds.

        Raises ResidentError, saying what holds the pages, when for 5 seconds nothing more goes
        out; the new budget then stays in force all the same.
        """
        limit = _check_resident(_parse("resident", resident, self.size))
        self._call("limit", limit=limit)
        least, deadline = None, 0.0
        while True:
            stats = self.stats()
            if stats.resident_bytes + stats.kept_bytes <= limit:
                return
            now = time.monotonic()
            if least is None or stats.resident_bytes < least:
                least, deadline = stats.resident_bytes, now + RESIZE_STALL_S
            if now > deadline:
                raise ResidentError(_why_not(stats, limit))
            time.sleep(POLL_S)

    def prefetch(self, offset: int, length: int) -> None:
        """Bring stored pages of a range into memory, as far as the budget reaches."""
        first, count = self._range(offset, length)
        self._call("prefetch", first=first, count=count)

    def discard(self, offset: int, length: int) -> None:
        """Forget a range: it reads as zeros from now on. Whole pages only."""
        if offset % PAGE or length % PAGE:
            raise ConfigError(f"discard works on whole pages: {offset} and {length} are not")
        first, count = self._range(offset, length)
        self._call("discard", first=first, count=count)

    def flush(self) -> None:
        """Wait until every page that has left memory is accepted by the store, and flush it."""
        self._call("flush")

    def close(self) -> None:
        """Give the memory and the stored pages back.

        While a buffer on the memory is alive (a numpy array, a slice) the region stays in service
        until the last one goes, and a ResourceWarning says so: unmapping under it would crash.
        """
        if self._memory is None:
            return
        if self._client is None or os.getpid() != self._client.owner_pid:
            return  # a forked child: the region is the parent's
        with contextlib.suppress(BufferError):
            self._memory.release()
        self._memory = None
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        with clients.lock():
            self._quiesce()
            mapping.region = None
            try:
                mapping.close()
            except BufferError:
                mapping.region = self
                self._call("resume")
            else:
                self._end(unmapped=True)
                return
        warnings.warn(
            f"region {self.name!r}: buffers on its memory are still alive; it stays in service "
            "until the last one goes",
            ResourceWarning,
            stacklevel=2,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<userswap.Region {getattr(self, 'name', '?')!r} of {format_size(self.size)}>"

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        if self._client is None:
            raise ValueError("the region is closed")
        return self._client.call(operation, region=self._id, **arguments)

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ConfigError(f"{offset}+{length} is outside the region's {self.size} bytes")
        first = offset // PAGE
        return first, -(-(offset + length) // PAGE) - first

    def _quiesce(self) -> None:
        """Wait until no order on the memory is under way, and none will come."""
        self._call("quiesce")

    def _end(self, *, unmapped: bool) -> None:
        """The last step, once: called by close, or by the mapping when its last buffer went."""
        client, self._client = self._client, None
        if client is None or os.getpid() != client.owner_pid:
            return
        with clients.lock(), contextlib.suppress(PagerError):
            if not unmapped:
                client.call("quiesce", region=self._id)
            client.call("close", region=self._id, unmapped=unmapped)
            client.regions.pop(self._id, None)
            clients.release(client)


def _parse(what: str, value: int | str, whole: int | None = None) -> int:
    try:
        size = parse_size(value, whole=whole)
    except GrammarError as error:
        raise ConfigError(f"{what}: {error}") from None
    if not 0 < size <= SIZE_MAX:
        raise ConfigError(f"{what}: {format_size(size)} is not between 1 byte and 16TiB")
    return -(-size // PAGE) * PAGE


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _check_resident(limit: int) -> int:
    least = (PAGES_MIN + PAGES_PER_THREAD * _threads()) * PAGE
    if limit < least:
        raise ConfigError(
            f"resident: {format_size(limit)} is below the minimum of {format_size(least)} (1MiB, "
            f"and 32KiB for each of the {_threads()} threads)"
        )
    return limit


def _map_memory(size: int) -> tuple[_Mapping, int]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        mapping = _Mapping(-1, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, OverflowError, ValueError) as error:
        raise UnsupportedError(_why_no_memory(size, error)) from None
    return mapping, int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))


def _why_no_memory(size: int, error: Exception) -> str:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/sys/vm/overcommit_memory", encoding="ascii") as file:
        overcommit = file.read().strip()
    cause = f"{format_size(size)} of address space cannot be mapped ({error})"
    if limit != resource.RLIM_INFINITY:
        return f"{cause}: RLIMIT_AS is {format_size(limit)}; raise it (ulimit -v unlimited)"
    if overcommit == "2":
        return f"{cause}: vm.overcommit_memory is 2; set it to 0 or 1 (sysctl -w)"
    return cause


def _refuse_mergeable(start: int) -> None:
    """KSM drops write protection without telling: a page could change unseen."""
    flags = _mapping_flags(start)
    if "mg" in flags:
        raise UnsupportedError(
            "the memory is mergeable (KSM), which drops write protection: switch it off for this "
            "process (prctl PR_SET_MEMORY_MERGE)"
        )
    if "ht" in flags:
        raise UnsupportedError("hugetlb memory cannot be paged: map ordinary pages")


def _mapping_flags(start: int) -> list[str]:
    inside = False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
        for line in file:
            head = line.split(maxsplit=1)[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                inside = low <= start < high
            elif inside and head == "VmFlags:":
                return line.split()[1:]
    return []


def _why_not(stats: RegionStats, limit: int) -> str:
    over = format_size(stats.resident_bytes + stats.kept_bytes - limit)
    if stats.agent_late:
        cause = "the client's agent thread does not run (stopped, traced or starved of CPU)"
    elif stats.store_full:
        cause = f"the store {stats.store} is full"
    else:
        cause = "its pages cannot be taken (mlocked, pinned by I/O, or shared with a forked child)"
    return f"region {stats.name!r} is still {over} over its budget: {cause}"
