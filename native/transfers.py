"""Reads, writes and changes of one file, awaited: by io_uring, or by threads where that is off.

Responsible for: what is in flight on a file, its bounds, and its end. A `Transfer` is what one call
of a store waits for: any number of requests. Requests beyond the depth wait in two queues here:
reads go before what changes the file, and neither takes every place.

Invariant: a request holds on to its buffer from the moment it is asked until the kernel has let go
of it. A `Transfer` therefore cannot be cancelled: a task that is cancelled while it awaits one gets
its CancelledError when the last request has ended.

The threads are our own: aiofiles, which reads key and password files elsewhere, has no positioned
reads and writes, and no buffers of the caller's.

Must not know: pages, stores, what an error means to them.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from userswap.native import check, ffi, lib

DEPTH = 64
"""Requests in flight; each may need a bounce area of CHUNK bytes."""
READS_MAX = DEPTH * 7 // 8
CHANGES_MAX = DEPTH // 2
THREADS = 8
CHUNK: int = lib.US_URING_CHUNK
SUBMIT_AGAIN_S = 0.001

READ, WRITE = lib.US_FILE_READ, lib.US_FILE_WRITE
SYNC, PUNCH, ZERO, ALLOCATE = (
    lib.US_FILE_SYNC,
    lib.US_FILE_PUNCH,
    lib.US_FILE_ZERO,
    lib.US_FILE_ALLOCATE,
)

Ended = Callable[[int, int, int], None]
"""Told of each request that ended: its number, errno or 0, and the bytes that it had moved."""
Refill = Callable[[], None]
"""Told that there are places again."""


@dataclass(slots=True)
class Failure:
    """A request that failed: with what, and the first byte of the file that it did not reach."""

    error: int
    offset: int
    end: int


class Transfer(asyncio.Future[None]):
    """What one call waits for; done when its last request is."""

    left = 0
    """Requests that have not ended."""
    failures: Sequence[Failure] = ()
    places: tuple[Any, ...] = ()
    """The buffers that its requests use."""

    def cancel(self, msg: Any | None = None) -> bool:
        """Not before the kernel has let go: whoever awaits this is cancelled then."""
        return False


class Request(NamedTuple):
    """A part of what a transfer moves, or a change."""

    transfer: Transfer
    operation: int
    place: Any
    length: int
    offset: int


class Transfers:
    """The requests on one file. Made, used and closed on one running loop."""

    def __init__(self, fd: int, *, align: int = 1, ring: bool = True) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._looks_at_cache = True
        self._requests: list[Request | None] = [None] * DEPTH
        self._reads = self._changes = 0
        self._waiting_reads: deque[Request] = deque()
        self._waiting_changes: deque[Request] = deque()
        self._closing: asyncio.Event | None = None
        self.why_threads = "" if ring else "not wanted"
        """Why threads do what io_uring would; empty where it does."""
        self._means: _Ring | _Threads | None = None
        if ring:
            try:
                self._means = _Ring(fd, align, self._ended, self._refill)
            except OSError as error:
                self.why_threads = os.strerror(error.errno or 0)
        if self._means is None:
            self._means = _Threads(fd, align, self._ended, self._refill)

    def new(self) -> Transfer:
        return Transfer(loop=self._loop)

    def move(self, transfer: Transfer, operation: int, buffer: memoryview, offset: int) -> None:
        """Read or write a buffer, in as many requests as it takes."""
        place = ffi.from_buffer("uint8_t[]", buffer, operation == READ)
        transfer.places += (place,)
        size = len(place)
        if size <= CHUNK:
            self._start(Request(transfer, operation, place, size, offset))
            return
        for start in range(0, size, CHUNK):
            length = min(CHUNK, size - start)
            self._start(Request(transfer, operation, place + start, length, offset + start))

    def cached(self, buffer: memoryview, offset: int) -> bool:
        """Read from the page cache, where all of it is there."""
        if not self._looks_at_cache:
            return False
        with ffi.from_buffer("uint8_t[]", buffer, True) as place:
            rc = lib.us_transfer_cached(self._fd, place, len(place), offset)
        self._looks_at_cache = rc in (0, -errno.EAGAIN)
        return bool(rc == 0)

    def change(self, transfer: Transfer, operation: int, offset: int = 0, length: int = 0) -> None:
        """PUNCH, ZERO or ALLOCATE a range; SYNC."""
        self._start(Request(transfer, operation, ffi.NULL, length, offset))

    async def aclose(self) -> None:
        """Wait for what is in flight, then let go of the file."""
        if self._reads + self._changes:
            self._closing = asyncio.Event()
            await self._closing.wait()
        if self._means is not None:
            self._means.close()
            self._means = None

    def _start(self, request: Request) -> None:
        request.transfer.left += 1
        if request.operation == READ:
            if self._reads < READS_MAX and self._reads + self._changes < DEPTH:
                self._ask(request)
            else:
                self._waiting_reads.append(request)
        elif self._changes < CHANGES_MAX and self._reads + self._changes < DEPTH:
            self._ask(request)
        else:
            self._waiting_changes.append(request)

    def _ask(self, request: Request) -> None:
        if request.operation == READ:
            self._reads += 1
        else:
            self._changes += 1
        assert self._means is not None
        self._requests[self._means.ask(request)] = request

    def _ended(self, number: int, error: int, moved: int) -> None:
        request = self._requests[number]
        assert request is not None
        self._requests[number] = None
        transfer = request.transfer
        if request.operation == READ:
            self._reads -= 1
        else:
            self._changes -= 1
        if error:
            end = request.offset + request.length
            failure = Failure(error, request.offset + moved, end)
            transfer.failures = [*transfer.failures, failure]
        transfer.left -= 1
        if not transfer.left:
            for place in transfer.places:
                ffi.release(place)
            transfer.set_result(None)

    def _refill(self) -> None:
        """Only after every request that ended was told of: the numbers are given out again."""
        if not (self._waiting_reads or self._waiting_changes):
            if self._closing is not None and not self._reads + self._changes:
                self._closing.set()
            return
        while (
            self._waiting_reads and self._reads < READS_MAX and self._reads + self._changes < DEPTH
        ):
            self._ask(self._waiting_reads.popleft())
        while (
            self._waiting_changes
            and self._changes < CHANGES_MAX
            and self._reads + self._changes < DEPTH
        ):
            self._ask(self._waiting_changes.popleft())


class _Ring:
    """io_uring: what was asked in one turn of the loop goes to the kernel in one system call."""

    def __init__(self, fd: int, align: int, ended: Ended, refill: Refill) -> None:
        out = ffi.new("struct us_uring **")
        check(lib.us_uring_open(out, fd, DEPTH, align))
        self._ring = out[0]
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._refill = refill
        self._done = ffi.new("uint64_t[]", DEPTH)
        self._in_flight = 0
        self._submitting = False
        self._event = lib.us_uring_eventfd(self._ring)
        self._loop.add_reader(self._event, self._reap)

    def ask(self, request: Request) -> int:
        _, operation, place, length, offset = request
        number: int = lib.us_uring_ask(self._ring, operation, place, length, offset)
        assert number >= 0, "more was asked than has places"
        self._in_flight += 1
        if self._in_flight == 1:
            self._submit()  # nothing to wait together with
        elif not self._submitting:
            self._submitting = True
            self._loop.call_soon(self._submit)
        return number

    def _submit(self) -> None:
        self._submitting = False
        if check(lib.us_uring_submit(self._ring)):
            self._submitting = True
            self._loop.call_later(SUBMIT_AGAIN_S, self._submit)

    def _reap(self) -> None:
        count = check(lib.us_uring_reap(self._ring, self._done))
        self._in_flight -= count
        ended = self._ended
        for value in ffi.unpack(self._done, count):
            number, error = value >> 32, value & 0xFFFFFFFF
            ended(number, error, lib.us_uring_moved(self._ring, number) if error else 0)
        self._refill()

    def close(self) -> None:
        self._loop.remove_reader(self._event)
        lib.us_uring_close(self._ring)


class _Threads:
    """A few threads, each of which waits for one request at a time."""

    def __init__(self, fd: int, align: int, ended: Ended, refill: Refill) -> None:
        self._fd = fd
        self._align = align
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._refill = refill
        self._free = list(range(DEPTH))
        self._pool = ThreadPoolExecutor(THREADS, "userswap-file", initializer=lib.us_place_freely)

    def ask(self, request: Request) -> int:
        number = self._free.pop()
        work = self._pool.submit(self._work, *request[1:])
        work.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._finish, number, done)
        )
        return number

    def _work(self, operation: int, place: Any, length: int, offset: int) -> tuple[int, int]:
        moved = ffi.new("uint64_t *")
        rc = lib.us_transfer_now(operation, self._fd, place, length, offset, self._align, moved)
        return -rc, moved[0]

    def _finish(self, number: int, done: Future[tuple[int, int]]) -> None:
        self._free.append(number)
        self._ended(number, *done.result())
        self._refill()

    def close(self) -> None:
        self._pool.shutdown(wait=False)
