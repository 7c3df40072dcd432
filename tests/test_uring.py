"""Transfers on one file: by io_uring and by threads, whatever the kernel does to a request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import run_child
from userswap.native import ffi, lib, transfers
from userswap.native.transfers import CHUNK, DEPTH, READ, SYNC, WRITE, Transfer, Transfers

PAGE = 4096
Opened = Callable[..., Transfers]


@pytest.fixture(params=[True, False], ids=["ring", "threads"])
async def opened(request: pytest.FixtureRequest) -> AsyncIterator[Opened]:
    """Opens transfers on a descriptor, and closes them at the end."""
    made: list[Transfers] = []

    def open_on(fd: int, align: int = 1) -> Transfers:
        made.append(Transfers(fd, align=align, ring=request.param))
        assert bool(made[-1].why_threads) is not request.param
        return made[-1]

    yield open_on
    for each in made:
        await each.aclose()
        await each.aclose()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


# Threads read at an offset, which pipes and sockets have not: what needs those is for the ring.
ring_alone = pytest.mark.parametrize("opened", [True], indirect=True, ids=["ring"])


def moved(
    transfers: Transfers, operation: int, buffer: bytearray | bytes | mmap.mmap, offset: int = 0
) -> Transfer:
    transfer = transfers.new()
    transfers.move(transfer, operation, memoryview(buffer), offset)
    return transfer


def errors(transfer: Transfer) -> list[int]:
    return [failure.error for failure in transfer.failures]


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_much_at_once_comes_back_whole(opened: Opened, file: int, seed: int) -> None:
    rng = random.Random(seed)
    through = opened(file)
    data = [
        rng.randbytes(rng.choice((1, 100, PAGE, CHUNK - 1, CHUNK, 3 * CHUNK))) for _ in range(300)
    ]
    places = [index * 4 * CHUNK for index in range(len(data))]
    for write in [moved(through, WRITE, what, at) for what, at in zip(data, places, strict=True)]:
        await write
        assert not write.failures
    sync = through.new()
    through.change(sync, SYNC)
    await sync
    order = rng.sample(range(len(data)), len(data))
    buffers = {index: bytearray(len(data[index])) for index in order}
    for read in [moved(through, READ, buffers[index], places[index]) for index in order]:
        await read
        assert not read.failures
    assert all(buffers[index] == data[index] for index in order)
    for buffer in buffers.values():
        buffer.clear()  # refused while anybody exports it


async def test_what_lies_behind_the_end_is_zeros(opened: Opened, file: int) -> None:
    os.write(file, b"x" * 10_001)
    through = opened(file)
    buffer = bytearray(b"\xaa" * (4 * PAGE))
    await moved(through, READ, buffer)
    assert buffer == b"x" * 10_001 + bytes(4 * PAGE - 10_001)
    buffer = bytearray(b"\xaa" * PAGE)
    await moved(through, READ, buffer, 1 << 40)
    assert buffer == bytes(PAGE)


async def test_unaligned_memory_past_the_page_cache(
    opened: Opened, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    content = rng.randbytes(20 * PAGE + 700)
    (tmp_path / "file").write_bytes(content)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)
    try:
        through = opened(fd, PAGE)
        whole = memoryview(bytearray(30 * PAGE))
        for shift in (0, 1, 16, 513):
            buffer = whole[shift : shift + 24 * PAGE]
            read = through.new()
            through.move(read, READ, buffer, 0)
            await read
            assert not read.failures
            assert bytes(buffer) == content + bytes(24 * PAGE - len(content))
        new = rng.randbytes(2 * PAGE + 3)
        write = through.new()
        through.move(write, WRITE, memoryview(new)[3:], 5 * PAGE)
        await write
        assert not write.failures
    finally:
        os.close(fd)
    left = (tmp_path / "file").read_bytes()
    assert left == content[: 5 * PAGE] + new[3:] + content[7 * PAGE :]


@ring_alone
async def test_what_comes_in_pieces_is_put_together(opened: Opened, pipe: tuple[int, int]) -> None:
    through = opened(pipe[0])
    buffer = bytearray(1000)
    read = moved(through, READ, buffer)
    for piece in (b"a" * 300, b"b" * 1, b"c" * 699):
        await turns()
        assert not read.done()
        os.write(pipe[1], piece)
    await read
    assert buffer == b"a" * 300 + b"b" + b"c" * 699


@ring_alone
async def test_what_is_not_ready_yet_is_asked_again(opened: Opened, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[0], False)
    buffer = bytearray(5)
    read = moved(opened(pipe[0]), READ, buffer)
    await turns()
    assert not read.done()
    os.write(pipe[1], b"ready")
    await read
    assert buffer == b"ready"


async def test_errors_say_what_was_reached(opened: Opened, file: int) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        write = moved(opened(full), WRITE, bytes(PAGE))
        await write
        assert errors(write) == [errno.ENOSPC]
        area = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area[:] = b"m" * len(area)
        with ffi.from_buffer(area) as there:
            address = int(ffi.cast("uintptr_t", there))
        through = opened(memory)
        buffer = bytearray(2 * PAGE)
        await moved(through, READ, buffer, address)
        assert buffer == b"m" * len(area)
        bad = moved(through, READ, buffer, 0)
        await bad
        assert [(each.error, each.offset, each.end) for each in bad.failures] == [
            (errno.EIO, 0, len(buffer))
        ]
    finally:
        os.close(full)
        os.close(memory)


@ring_alone
@pytest.mark.parametrize("operation", [READ, WRITE])
async def test_a_cancelled_task_ends_with_its_transfer(
    opened: Opened, pipe: tuple[int, int], operation: int
) -> None:
    through = opened(pipe[operation == WRITE])
    buffer = bytearray(CHUNK)

    async def work() -> None:
        await moved(through, operation, buffer)

    task = asyncio.get_running_loop().create_task(work())
    await turns()
    for _ in range(3):
        task.cancel()
        await turns()
    assert not task.done()
    with pytest.raises(BufferError):
        buffer.clear()
    left = len(buffer)
    while left:
        left -= os.write(pipe[1], bytes(PAGE)) if operation == READ else len(os.read(pipe[0], left))
        await turns(3)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    buffer.clear()


async def test_a_cancelled_task_ends_with_its_thread(
    monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    gate, work = threading.Event(), transfers._Threads._work

    def gated(self: transfers._Threads, *request: Any) -> tuple[int, int]:
        gate.wait()
        return work(self, *request)

    monkeypatch.setattr(transfers._Threads, "_work", gated)
    os.write(file, b"r" * 100)
    through = Transfers(file, ring=False)
    buffer = bytearray(100)

    async def read() -> None:
        await moved(through, READ, buffer)

    task = asyncio.get_running_loop().create_task(read())
    await turns()
    task.cancel()
    await turns()
    assert not task.done()
    with pytest.raises(BufferError):
        buffer.clear()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert buffer == b"r" * 100
    await through.aclose()


@ring_alone
async def test_closing_waits_for_what_is_in_flight(opened: Opened, pipe: tuple[int, int]) -> None:
    through = opened(pipe[0])
    read = moved(through, READ, bytearray(4))
    closing = asyncio.ensure_future(through.aclose())
    await turns()
    assert not closing.done()
    os.write(pipe[1], b"done")
    await closing
    assert read.done()


async def test_changes_that_hang_leave_room_for_reads() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        through = Transfers(ours.fileno())
        writes = [moved(through, WRITE, bytes(50_000)) for _ in range(3 * DEPTH)]
        await turns()
        theirs.send(b"read")
        buffer = bytearray(4)
        await asyncio.wait_for(moved(through, READ, buffer), 20)
        assert buffer == b"read"
        assert sum(not write.done() for write in writes) > 2 * DEPTH
        theirs.setblocking(False)
        while not all(write.done() for write in writes):
            with contextlib.suppress(BlockingIOError):
                assert len(theirs.recv(CHUNK)) == 50_000
            await turns(1)
        assert not any(write.failures for write in writes)
        await through.aclose()


async def test_reads_leave_room_for_changes() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        through = Transfers(ours.fileno())
        reads = [moved(through, READ, bytearray(1)) for _ in range(3 * DEPTH)]
        await asyncio.wait_for(moved(through, WRITE, b"written"), 20)
        assert theirs.recv(10) == b"written"
        for _ in reads:
            theirs.send(b"1")
            await turns(3)
        for read in reads:
            await asyncio.wait_for(read, 20)
        await through.aclose()


def test_the_ring_takes_no_more_than_its_depth(pipe: tuple[int, int]) -> None:
    out = ffi.new("struct us_uring **")
    for depth, align in ((0, 1), (1 << 20, 1), (8, 0), (8, 3), (8, 8192)):
        assert lib.us_uring_open(out, pipe[0], depth, align) == -errno.EINVAL
    assert lib.us_uring_open(out, pipe[0], 8, 1) == 0
    ring, buffers = out[0], [ffi.new("char[1]") for _ in range(8)]
    too_long = lib.US_URING_CHUNK + 1
    assert lib.us_uring_ask(ring, READ, buffers[0], too_long, 0) == -errno.EINVAL
    numbers = [lib.us_uring_ask(ring, READ, buffer, 1, 0) for buffer in buffers]
    assert sorted(numbers) == list(range(8))
    assert lib.us_uring_ask(ring, READ, buffers[0], 1, 0) == -errno.EBUSY
    assert lib.us_uring_submit(ring) == 0
    os.write(pipe[1], b"12345678")
    done, ended = ffi.new("uint64_t[]", 8), 0
    while ended < 8:
        ended += lib.us_uring_reap(ring, done)
    assert b"".join(sorted(buffer[0] for buffer in buffers)) == b"12345678"
    lib.us_uring_close(ring)


async def test_a_reader_of_the_cache_says_what_it_has(opened: Opened, file: int) -> None:
    os.write(file, b"c" * 2 * PAGE)
    through = opened(file)
    buffer = bytearray(PAGE)
    assert through.cached(memoryview(buffer), PAGE)
    assert buffer == b"c" * PAGE
    assert not through.cached(memoryview(buffer), 2 * PAGE), "an end is not for it to tell"
    buffer.clear()


def test_where_a_filter_forbids_io_uring_threads_do_it(tmp_path: Path) -> None:
    child = run_child(
        """
import asyncio, ctypes, struct, sys
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run

# load the call's number; io_uring_setup is refused, everything else allowed
program = b"".join(struct.pack("HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50000 | 1), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(program)
header = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0) == 0, ctypes.get_errno()

async def main():
    store = await open_stack(f"file:{sys.argv[1]}/pages", Geometry(100))
    assert "by threads (io_uring: Operation not permitted)" in store.space, store.space
    data = bytes(range(256)) * 48
    await store.write([Run(7, memoryview(data))])
    got = bytearray(len(data))
    await store.read([Run(7, memoryview(got))])
    assert got == data
    await store.discard(8, 1)
    await store.flush()
    await store.read([Run(7, memoryview(got))])
    assert got == data[:4096] + bytes(4096) + data[8192:]
    await store.aclose()

asyncio.run(main())
""",
        args=[str(tmp_path)],
    )
    assert child.returncode == 0, child.stderr


async def test_a_ring_without_memory_is_no_ring(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(transfers, "_Ring", refused)
    through = Transfers(file)
    assert through.why_threads == os.strerror(errno.ENOMEM)
    done: Awaitable[None] = moved(through, WRITE, b"by a thread")
    await done
    assert os.pread(file, 20, 0) == b"by a thread"
    await through.aclose()
