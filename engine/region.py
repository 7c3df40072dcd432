"""Region: memory of this process that a pager keeps at a budget, the rest of it in a store.

The memory is a private anonymous mapping. It is never unmapped while a buffer on it is alive, and
never before the pager has confirmed that no order on it is under way: the agent drops pages by
address, and an address may be somebody else's a moment after it was unmapped.

Must not know: how faults are served, what a store is.
"""

from __future__ import annotations

import contextlib
import mmap
import operator
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self, SupportsIndex

from userswap.backends.grammar import GrammarError, format_size, parse_size
from userswap.backends.store import Geometry, Store
from userswap.engine import client as clients
from userswap.engine import probe
from userswap.engine.client import Client, Settings
from userswap.engine.errors import (
    ConfigError,
    ReleasedError,
    ResidentError,
    UnsupportedError,
    UserswapError,
)
from userswap.engine.objects import pickled, refuse_in_import
from userswap.engine.stats import RegionStats
from userswap.native import ffi, lib

PAGE = 4096
PAGES_MIN = 256
"""The smallest budget: room for the pages that each thread needs at once, and for those on their
way out."""
PAGES_PER_THREAD = 8
SIZE_MAX = (1 << 44) - (1 << 21)
"""A client's page table has words for 16 TiB."""
NORESERVE = 0x4000
RESIZE_STALL_S = 5.0
POLL_FIRST_S = 0.0005
POLL_MAX_S = 0.02
NAME_MAX = 128
MADV_COLD = 20


class _Mapping(mmap.mmap):
    """The memory of a region; ends with the last buffer on it."""

    client: Client | None = None
    number = 0
    name = ""

    def __del__(self) -> None:
        if self.client is not None and self.client.owner_pid == os.getpid():
            # A finalizer may run anywhere: the keeper's job holds the memory until it can go.
            clients.keeper.leave(self._end_unseen)

    def end(self) -> None:
        """Unmap, on the keeper's thread; BufferError while buffers are alive."""
        client = self.client
        if client is not None:
            client.close_region(self.number, super().close)
            self.client = None
            clients.release(client)

    def _end_unseen(self) -> None:
        with contextlib.suppress(UserswapError):
            self.end()

    def close(self) -> None:
        if self.client is not None:
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
            not. At least 1 MiB, and 32 KiB for each thread of the process. More than `size` means
            `size`, or that minimum for a region that is smaller still.
        store: where the rest goes, as a store URL: "ram:lz4", "ram:zstd?level=1&limit=512MiB",
            "memory:"; or a store of your own: a `userswap.backends.store.Store` that can be
            pickled, or a function that makes one, such as `functools.partial(MyStore, path)`.
        name: for statistics and messages.
        fault_path: "native" answers faults without the interpreter, or hands them to it where the
            store has to be awaited; "asyncio" has the event loop take every fault, which saves that
            hand-over; "auto": the loop, until a store of this process is one that is not awaited.
        on_full: what faults do once the store is full: "grow" lets the region go over its budget,
            "stall" makes them wait for room.
        on_pager_death: "abort" this process, or "block" the threads that touch what is out of
            reach.
        user_mode_only: ask for a userfaultfd without privileges. System calls on memory that is
            paged out then fail with EFAULT.
        placement: which CPU serves faults: "same" as the faulting thread's, "other", "none" (as
            the scheduler likes) or "auto".
        prefetch: what is read ahead at a fault: "streams" (sequential and strided scans, many at
            once), "successor" (what followed last time: irregular orders that come again),
            "linux" or "leap" (as others do it, for comparison), or "none".
        mover: how written pages leave: "move" (Linux 6.8), by which the kernel itself refuses pages
            that I/O has hold of, or "protect" (Linux 5.7), which loses direct I/O (O_DIRECT) that
            takes longer than a grace of 100 ms, and takes no written page while the process holds
            memory pinned. "auto" is "move".
        pager: the socket of a daemon (`userswap serve`) that shall page this region, in place of a
            pager of this process's own. `store` is then the name of one of the daemon's stores, and
            `resident` an upper limit: the daemon's budget may grant less. A daemon that ends gives
            the region back: its memory is ordinary memory then (see `RegionStats.released`).

    Raises ConfigError for what cannot be meant, UnsupportedError for what this machine cannot do,
    PagerError when the pager is gone. Usable as a context manager.

    A region is one memory in one process: it cannot be copied or pickled. A forked child does not
    inherit the memory: touching it there is SIGSEGV.
    """

    def __init__(
        self,
        size: int | str,
        *,
        resident: int | str,
        store: str | Store | Callable[[Geometry], Any] = "ram:lz4",
        name: str | None = None,
        fault_path: str = "auto",
        on_full: str = "grow",
        on_pager_death: str = "abort",
        user_mode_only: bool = False,
        placement: str = "auto",
        prefetch: str = "streams",
        mover: str = "auto",
        pager: str | None = None,
    ) -> None:
        self._mapping: _Mapping | None = None
        self.name, self.size = "?", 0
        refuse_in_import()
        self.name = _check_name(name)
        if on_full not in ("grow", "stall"):
            raise ConfigError(f"on_full={on_full!r}: use grow or stall")
        if pager is not None and not isinstance(store, str):
            raise ConfigError(f"store={store!r}: with pager=, use the name of a store of the pager")
        settings = Settings(fault_path, on_pager_death, user_mode_only, placement, mover, pager)
        self.size = check_size(size)
        self._limit = check_resident(resident, self.size)
        request = {
            "pages": self.size // PAGE,
            "limit": self._limit,
            "store": store if isinstance(store, str) else pickled(store),
            "name": name,
            "grow": on_full == "grow",
            "prefetch": prefetch,
        }
        self._mapping = clients.keeper.run(lambda: _open(settings, self.size, request))
        self.name = self._mapping.name
        self._memory = memoryview(self._mapping)

    @property
    def memory(self) -> memoryview:
        """The region's bytes, writable. Slices and arrays on it keep the memory alive."""
        self._open_mapping()
        return self._memory

    @property
    def resident(self) -> int:
        """The budget in bytes."""
        return self._limit

    def stats(self) -> RegionStats:
        """A snapshot of sizes, page states, faults and latencies."""
        try:
            return RegionStats.from_message(self._call("stats")["stats"])
        except ReleasedError:
            return RegionStats.from_message(self._last_word())

    def resize_resident(self, resident: int | str) -> None:
        """Change the budget and wait until it holds.

        Raises ResidentError, saying what holds the pages, when for 5 seconds nothing more goes
        out; the new budget then stays in force all the same.
        """
        limit = check_resident(resident, self.size)
        self._call("limit", limit=limit)
        self._limit = limit
        least, deadline, pause = None, 0.0, POLL_FIRST_S
        while True:
            stats = self.stats()
            held = stats.resident_bytes + stats.kept_bytes
            if held <= limit:
                return
            now = time.monotonic()
            if least is None or held < least:
                least, deadline = held, now + RESIZE_STALL_S
            if now > deadline:
                raise ResidentError(_why_not(stats, limit))
            time.sleep(pause)
            pause = min(pause * 2, POLL_MAX_S)

    def prefetch(self, offset: int, length: int) -> None:
        """Bring stored pages of a range into memory, as far as the budget reaches."""
        first, count = self._range(*_integers(offset, length))
        with contextlib.suppress(ReleasedError):
            self._call("prefetch", first=first, count=count)

    def discard(self, offset: int, length: int) -> None:
        """Forget a range: it reads as zeros from now on. Whole pages only."""
        offset, length = _integers(offset, length)
        if offset % PAGE or length % PAGE:
            raise ConfigError(
                f"discard works on whole pages of {PAGE} bytes: {offset} and {length} are not"
            )
        first, count = self._range(offset, length)
        try:
            self._call("discard", first=first, count=count)
        except ReleasedError:
            mmap.mmap.madvise(self._open_mapping(), mmap.MADV_DONTNEED, offset, length)

    def flush(self) -> None:
        """Wait until every page that has left memory is accepted by the store, and flush it."""
        with contextlib.suppress(ReleasedError):
            self._call("flush")

    def close(self) -> None:
        """Give the memory and the stored pages back; again, it does nothing.

        While a buffer on the memory is alive (a numpy array, a slice) the region stays in service
        until the last one goes, and a ResourceWarning says so: unmapping under it would crash.
        """
        self._close(stacklevel=3)

    def _close(self, stacklevel: int) -> None:
        mapping = self._mapping
        if mapping is None or sys.is_finalizing():
            return
        if mapping.client is None or mapping.client.owner_pid != os.getpid():
            return  # a forked child: the region is the parent's
        with contextlib.suppress(BufferError):
            self._memory.release()
        try:
            clients.keeper.run(mapping.end)
        except BufferError:
            warnings.warn(
                f"region {self.name!r}: buffers on its memory are still alive; it stays in "
                "service until the last one goes",
                ResourceWarning,
                stacklevel=stacklevel,
            )
        finally:
            self._mapping = None

    def __enter__(self) -> Self:
        self._open_mapping()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(stacklevel=3)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # A copy would be a second owner of one memory, and close it under the first.
        raise TypeError("a Region cannot be copied or pickled: copy the bytes of its memory")

    def __repr__(self) -> str:
        closed = ", closed" if self._mapping is None else ""
        return f"<userswap.Region {self.name!r} of {format_size(self.size)}{closed}>"

    def _open_mapping(self) -> _Mapping:
        if self._mapping is None:
            raise ValueError(f"region {self.name!r} is closed")
        return self._mapping

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        mapping = self._open_mapping()
        client = mapping.client
        if client is None:  # another thread closes it
            raise ValueError(f"region {self.name!r} is closed")
        return client.call(operation, region=mapping.number, **arguments)

    def _last_word(self) -> dict[str, Any]:
        """What the pager said of the region as it let go of it."""
        mapping = self._open_mapping()
        assert mapping.client is not None
        return {**mapping.client.released[mapping.number], "released": True}

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ConfigError(
                f"offset {offset}, length {length}: outside the region's {self.size} bytes"
            )
        first = offset // PAGE
        return first, -(-(offset + length) // PAGE) - first


def _integers(offset: int, length: int) -> tuple[int, int]:
    """Integers of Python's own; numpy's are as welcome."""
    try:
        return operator.index(offset), operator.index(length)
    except TypeError:
        raise ConfigError(
            f"offset {offset!r} and length {length!r} must be integers, in bytes"
        ) from None


def _open(settings: Settings, size: int, request: dict[str, Any]) -> _Mapping:
    mapping, start = _map_memory(size)
    client = clients.acquire(settings)
    try:
        mapping.number, mapping.name = client.open_region(start, size, request)
    except BaseException:
        clients.release(client)
        raise
    mapping.client = client
    return mapping


def _check_name(name: str | None) -> str:
    """Names go into messages of one line."""
    if name is None:
        return ""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= NAME_MAX:
        raise ConfigError(f"name={name!r}: use 1 to {NAME_MAX} printable characters")
    return name


def _parse(what: str, value: int | str, whole: int | None = None) -> int:
    try:
        size = parse_size(value, whole=whole)
    except GrammarError as error:
        raise ConfigError(f"{what}: {error}") from None
    if not 0 < size <= SIZE_MAX:
        raise ConfigError(f"{what}: {size} bytes: more than 0 and less than 16TiB are possible")
    return -(-size // PAGE) * PAGE


def _threads() -> int:
    """Threads of this process that may touch memory."""
    return len(os.listdir("/proc/self/task")) - clients.own_threads()


def check_size(size: int | str) -> int:
    """A region's size in whole pages; raises ConfigError."""
    return _parse("size", size)


def check_resident(resident: int | str, size: int) -> int:
    """The budget in bytes of a region of `size` bytes; raises ConfigError."""
    limit = _parse("resident", resident, size)
    threads = _threads()
    least = (PAGES_MIN + PAGES_PER_THREAD * threads) * PAGE
    if limit < least:
        raise ConfigError(
            f"resident: {format_size(limit)} is below the minimum of {format_size(least)} (1MiB, "
            f"and 32KiB for each of the {threads} threads)"
        )
    return min(limit, max(size, least))


def _map_memory(size: int) -> tuple[_Mapping, int]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        mapping = _Mapping(-1, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, OverflowError, ValueError) as error:
        raise UnsupportedError(_why_no_memory(size, error)) from None
    start = int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))
    if lib.us_probe_merging() == 1:
        raise UnsupportedError(
            "the memory is mergeable (KSM), which drops write protection: start the program "
            "without PR_SET_MEMORY_MERGE (systemd: MemoryKSM=no)"
        )
    _check_ordinary(mapping, start)
    return mapping, start


def _why_no_memory(size: int, error: Exception) -> str:
    cause = f"{format_size(size)} of address space cannot be mapped ({error})"
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"{cause}: RLIMIT_AS is {format_size(limit)}; raise it (ulimit -v unlimited)"
    if probe.read_number("/proc/sys/vm/overcommit_memory") == 2:
        return f"{cause}: vm.overcommit_memory is 2; set it to 0 or 1 (sysctl -w)"
    return cause


def _check_ordinary(mapping: _Mapping, start: int) -> None:
    """Refuse memory of which the kernel moves no page: locked or hugetlb.

    MADV_COLD refuses the same two, and costs one call; what the memory is, is looked up only then.
    """
    try:
        mmap.mmap.madvise(mapping, MADV_COLD)
    except OSError:
        flags = _mapping_flags(start)
        if "ht" in flags:
            raise UnsupportedError("hugetlb memory cannot be paged: map ordinary pages") from None
        if "lo" in flags:
            raise UnsupportedError(
                "this process locks the memory it maps, and locked pages cannot leave: no "
                "mlockall(MCL_FUTURE), please"
            ) from None
        raise


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
    elif stats.held_by:
        cause = stats.held_by
    elif stats.store_full:
        cause = f"the store {stats.store} is full"
    elif stats.staging_bytes:
        pending = format_size(stats.staging_bytes)
        cause = f"the store {stats.store} has not accepted {pending} yet"
    else:
        cause = "its pages cannot be taken (mlocked, pinned by I/O, or shared with a forked child)"
    return f"region {stats.name!r} is still {over} over its budget: {cause}"
