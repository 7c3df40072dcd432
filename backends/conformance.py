"""The contract of a store (backends/store.py) as checks that every store and filter has to pass.

Responsible for: what the contract means when it is tried out. Must not know: any store; pytest.

A check is a coroutine function that takes a `Harness`; it raises when the store does not conform,
and NotApplicableError where it has nothing to say. A test file, whole:

    import pytest
    from userswap.backends.conformance import CHECKS, against
    test_mine = pytest.mark.parametrize("check", CHECKS)(against("mine:{dir}/x"))
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from userswap.backends.conformance_failures import check_failures_of_the_store_below
from userswap.backends.harness import (
    PAGES,
    SAFE_PAGES,
    Check,
    ConformanceError,
    Harness,
    NotApplicableError,
    against,
    content,
    perform,
    read,
    require,
    run,
    write,
)
from userswap.backends.store import (
    Geometry,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    StoreFullError,
)

__all__ = [
    "CHECKS",
    "Check",
    "ConformanceError",
    "Harness",
    "NotApplicableError",
    "against",
    "perform",
    "run",
]

STEPS = 400
TURNS = 8
"""Turns of the event loop after which operations are cancelled: 0 up to this."""
LATE_S = 0.005
"""Time for what a cancelled operation may still do behind our back."""


async def check_zeros_before_the_first_write(harness: Harness) -> None:
    store = await harness.open()
    require(store.page_count == PAGES, f"has {store.page_count} pages, not the {PAGES} asked for")
    require(store.page_size == harness.geometry.page_size, "has other pages than it was asked for")
    for index, pages in ((0, 1), (PAGES - 1, 1), (200, 32)):
        await _expect(store, index, bytes(pages * store.page_size), "was never written")


async def check_what_was_written_is_read(harness: Harness) -> None:
    store = await harness.open()
    for generation in range(3):
        for index in range(40, 60):
            await write(store, index, harness.page(index, generation))
            await _expect(store, index, harness.expected(harness.page(index, generation)))
    for index in range(40, 60):
        await _expect(store, index, harness.expected(harness.page(index, 2)), "was overwritten")
    await _expect(store, 39, bytes(store.page_size), "lies before what was written")
    await _expect(store, 60, bytes(store.page_size), "lies behind what was written")


async def check_runs_equal_singles(harness: Harness) -> None:
    store = await harness.open()
    pages = [harness.page(index) for index in range(100, 120)]
    await write(store, 100, b"".join(pages))
    for index, page in enumerate(pages, 100):
        await _expect(store, index, harness.expected(page), "was written in a run")
    for index, page in enumerate(pages, 200):
        await write(store, index, page)
    await _expect(store, 200, harness.expected(b"".join(pages)), "was written singly")
    await write(store, 205, b"".join(pages[:3]))
    mixed = [*pages[:5], *pages[:3], *pages[8:]]
    await _expect(store, 200, harness.expected(b"".join(mixed)), "was overwritten in part")


async def check_vectored_equals_one_by_one(harness: Harness) -> None:
    store = await harness.open()
    places = [(500, 3), (7, 1), (300, 8), (8, 2), (PAGES - 1, 1), (120, 1)]
    written = {at: b"".join(harness.page(at + i) for i in range(n)) for at, n in places}
    await store.write([Run(at, memoryview(data)) for at, data in written.items()])
    for at, data in written.items():
        await _expect(store, at, harness.expected(data), "was written in one call with others")
    buffers = {at: bytearray(len(data)) for at, data in reversed(written.items())}
    await store.read([Run(at, memoryview(buffer)) for at, buffer in buffers.items()])
    for at, data in written.items():
        require(buffers[at] == harness.expected(data), f"page {at}: read wrongly beside others")
    await store.read([])
    await store.write([])


async def check_discarded_pages_read_as_zeros(harness: Harness) -> None:
    store = await harness.open()
    pages = [harness.page(index) for index in range(100, 120)]
    await write(store, 100, b"".join(pages))
    await store.discard(103, 6)
    await store.discard(0, 50)
    await store.discard(110, 0)
    kept = [*pages[:3], *[bytes(store.page_size)] * 6, *pages[9:]]
    await _expect(store, 100, harness.expected(b"".join(kept)), "was discarded in part")
    await store.discard(0, PAGES)
    await _expect(store, 100, bytes(20 * store.page_size), "was discarded")
    await write(store, 104, pages[0])
    await _expect(store, 104, harness.expected(pages[0]), "was discarded and written again")


async def check_the_first_and_the_last_page(harness: Harness) -> None:
    store = await harness.open()
    for index in (0, PAGES - 1):
        await write(store, index, harness.page(index))
    for index in (0, PAGES - 1):
        await _expect(store, index, harness.expected(harness.page(index)))
    last = [harness.page(index, 1) for index in range(PAGES - 5, PAGES)]
    await write(store, PAGES - 5, b"".join(last))
    await _expect(store, PAGES - 5, harness.expected(b"".join(last)))
    await store.discard(PAGES - 1, 1)
    await _expect(store, PAGES - 1, bytes(store.page_size), "was discarded")
    await _expect(store, PAGES - 2, harness.expected(last[3]), "is beside a discarded one")


async def check_pages_that_do_not_exist(harness: Harness) -> None:
    """Out of range is the caller's bug, for which stores assert; and nothing happens."""
    store = await harness.open()
    size = store.page_size
    await write(store, PAGES - 1, harness.page(1))
    for index, length in ((PAGES, size), (-1, size), (PAGES - 1, 2 * size), (0, size // 2 + 1)):
        run_ = Run(index, memoryview(bytearray(length)))
        await _asserts(store.read([run_]), f"a read of {length} bytes at page {index}")
        await _asserts(store.write([run_]), f"a write of {length} bytes at page {index}")
    for index, count in ((PAGES, 1), (-1, 2), (0, PAGES + 1), (5, -1)):
        await _asserts(store.discard(index, count), f"a discard of {count} pages at {index}")
    await _expect(store, PAGES - 1, harness.expected(harness.page(1)))
    await _expect(store, 0, bytes(size))


async def check_every_page_size(harness: Harness) -> None:
    for size in harness.page_sizes:
        store = await harness.open(Geometry(16, size))
        require((store.page_size, store.page_count) == (size, 16), f"pages of {size}: are others")
        pages = [content(harness.seed, index, size) for index in range(3)]
        await write(store, 0, pages[0])
        await write(store, 14, pages[1] + pages[2])
        await _expect(store, 0, harness.expected(pages[0]), f"is of {size} bytes, was written")
        await _expect(
            store, 14, harness.expected(pages[1] + pages[2]), f"is of {size} bytes, was written"
        )
        await _expect(store, 1, bytes(size), f"is of {size} bytes, was never written")
        await store.discard(14, 1)
        await _expect(store, 13, bytes(2 * size), f"is of {size} bytes, was discarded")
        await _expect(store, 15, harness.expected(pages[2]), f"is of {size} bytes, was written")
        await store.aclose()


async def check_concurrent_operations(harness: Harness) -> None:
    """Many at once on disjoint pages, begun in any order."""
    store = await harness.open()
    rng = random.Random(harness.seed)
    model: dict[int, bytes] = {}
    for generation in range(3):
        pages = list(range(PAGES))
        rng.shuffle(pages)
        work: list[Coroutine[Any, Any, None]] = []
        after = dict(model)
        for index in pages[:300]:
            after[index] = harness.page(index, generation)
            work.append(write(store, index, after[index]))
        for index in pages[300:360]:
            after.pop(index, None)
            work.append(store.discard(index, 1))
        for index in pages[360:]:
            expected = harness.expected(model.get(index, bytes(store.page_size)))
            work.append(_expect(store, index, expected, "was read beside other operations"))
        work.append(store.flush())
        rng.shuffle(work)
        await asyncio.gather(*work)
        model = after
        for index in range(PAGES):
            expected = harness.expected(model.get(index, bytes(store.page_size)))
            await _expect(store, index, expected, "was one of many at once")


async def check_buffers_after_return(harness: Harness) -> None:
    """A buffer is the caller's again when the call returns: nobody reads, writes or holds it."""
    store = await harness.open()
    data = harness.page(5) + harness.page(6)
    buffer = bytearray(data)
    await write(store, 5, buffer)
    buffer[:] = b"\xff" * len(buffer)
    await _expect(store, 5, harness.expected(data), "was written from a buffer that changed later")
    await store.flush()
    await _expect(store, 5, harness.expected(data), "was written from a buffer that changed later")
    target = bytearray(len(data))
    await store.read([Run(5, memoryview(target))])
    target[:] = b"\xee" * len(target)
    await read(store, 5, 2)
    await asyncio.sleep(LATE_S)
    require(target == b"\xee" * len(data), "a buffer was written to after its read had returned")
    for free in (buffer, target):
        try:
            free.clear()
        except BufferError:
            raise ConformanceError("a buffer is still held after the call returned") from None


async def check_buffers_after_cancellation(harness: Harness) -> None:
    """The same when the call is cancelled; a page is then old or new, and whole."""
    store = await harness.open()
    old = harness.page(5) + harness.page(6)
    await write(store, 5, old)
    noise = b"\xdd" * len(old)
    for turns in range(TURNS):
        buffer = bytearray(len(old))
        await _cancelled(store.read([Run(5, memoryview(buffer))]), turns)
        buffer[:] = noise
        await asyncio.sleep(LATE_S)
        require(buffer == noise, "a buffer was written to after its read had been cancelled")
        new = harness.page(5, turns + 1) + harness.page(6, turns + 1)
        buffer[:] = new
        await _cancelled(write(store, 5, buffer), turns)
        buffer[:] = noise
        await asyncio.sleep(LATE_S)
        old = await _old_or_new(store, 5, harness.expected(old), harness.expected(new))


async def check_closed_twice_and_used_after(harness: Harness) -> None:
    store = await harness.open()
    await write(store, 1, harness.page(1))
    await store.aclose()
    await store.aclose()
    run_ = Run(1, memoryview(bytearray(store.page_size)))
    calls: dict[str, Callable[[], Awaitable[None]]] = {
        "read": lambda: store.read([run_]),
        "write": lambda: store.write([run_]),
        "discard": lambda: store.discard(1, 1),
        "flush": store.flush,
    }
    for name, call in calls.items():
        try:
            await call()
        except StoreFailedError:
            continue
        except Exception as error:
            raise ConformanceError(f"{name} of a closed store raises {error!r}") from error
        raise ConformanceError(f"{name} of a closed store does not raise StoreFailedError")


async def check_closed_while_it_works(harness: Harness) -> None:
    """Only StoreErrors come out, also of what was under way."""
    store = await harness.open()
    work: list[asyncio.Task[object]] = []
    for index in range(0, 200, 4):
        work.append(asyncio.create_task(write(store, index, harness.page(index))))
        work.append(asyncio.create_task(read(store, index + 1)))
        work.append(asyncio.create_task(store.discard(index + 2, 1)))
        work.append(asyncio.create_task(store.flush()))
    await asyncio.sleep(0)
    await store.aclose()
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, StoreError):
            raise ConformanceError(f"{result!r} came out while it was closed") from result


async def check_a_full_store_keeps_what_it_has(harness: Harness) -> None:
    store = await harness.open_limited()
    rng = random.Random(harness.seed)
    kept: dict[int, bytes] = {}
    for index in range(0, store.page_count - 8, 4):
        page = rng.randbytes(store.page_size)
        try:
            await write(store, index, page)
        except StoreFullError:
            break
        kept[index] = page
    else:
        raise ConformanceError("is never full, though its limit was named")
    require(kept, "is full before anything was written")
    await _expect(store, index, bytes(store.page_size), "did not fit", alternative=page)
    run_ = rng.randbytes(6 * store.page_size)
    with contextlib.suppress(StoreFullError):
        await write(store, index, run_)
    for index, page in kept.items():
        await _expect(store, index, page, "was there before the store was full")
    for index in list(kept)[: len(kept) // 2]:
        await store.discard(index, 1)
        del kept[index]
    await write(store, 0, page)
    await _expect(store, 0, page, "was written after room was made")
    for index, page in kept.items():
        await _expect(store, index, page, "was there before the store was full")


async def check_what_was_flushed_survives(harness: Harness) -> None:
    """A process is killed while it writes: another finds everything that was flushed."""
    store = await harness.open()
    if not store.durable:
        raise NotApplicableError("it is not durable")
    await store.aclose()
    await harness.write_and_kill()
    store = await harness.reopen()
    gone = range(SAFE_PAGES // 2, SAFE_PAGES // 2 + 4)
    for index in range(SAFE_PAGES):
        expected = bytes(store.page_size) if index in gone else harness.page(index)
        await _expect(store, index, harness.expected(expected), "was flushed before a kill")
    await write(store, 0, harness.page(0, 1))
    await store.flush()
    await store.aclose()
    store = await harness.reopen()
    await _expect(store, 0, harness.expected(harness.page(0, 1)), "was flushed before a close")


async def check_opened_by_one_at_a_time(harness: Harness) -> None:
    """A medium that outlives its store has one user."""
    store = await harness.open()
    await write(store, 1, harness.page(1))
    await store.flush()
    await store.aclose()
    store = await harness.reopen()
    if await read(store, 1) == bytes(store.page_size):
        raise NotApplicableError("nobody else can reach what it holds")
    try:
        await harness.reopen()
    except StoreError:
        pass
    else:
        raise ConformanceError("can be opened twice at once")
    await write(store, 1, harness.page(1))
    await store.aclose()
    await harness.reopen()


async def check_a_history_equals_a_dict(harness: Harness) -> None:
    store = await harness.open()
    rng = random.Random(harness.seed)
    size = store.page_size
    model: dict[int, bytes] = {}
    for step in range(STEPS):
        index, pages = rng.randrange(180), rng.randrange(1, 9)
        action = rng.random()
        if action < 0.45:
            written = {index + i: harness.page(index + i, step) for i in range(pages)}
            await write(store, index, b"".join(written.values()))
            model.update(written)
        elif action < 0.6:
            await store.discard(index, pages)
            for page in range(index, index + pages):
                model.pop(page, None)
        else:
            expected = b"".join(model.get(index + i, bytes(size)) for i in range(pages))
            await _expect(store, index, harness.expected(expected), f"at step {step}")
        if rng.random() < 0.02:
            await store.flush()


async def check_what_is_read_at_once(harness: Harness) -> None:
    """`read_now` gives what `read` would, or refuses; what it refuses, it has not promised."""
    store = await harness.open()
    rng = random.Random(harness.seed)
    model: dict[int, bytes] = {}
    for step in range(STEPS // 4):
        written = {page: harness.page(page, step) for page in rng.sample(range(32), 4)}
        await store.write([Run(page, memoryview(data)) for page, data in written.items()])
        model.update(written)
        await read(store, 0, 32)  # a store may have at hand what it has seen
        gone = rng.randrange(32)
        await store.discard(gone, 1)
        model.pop(gone, None)
        for wanted in ([gone], [*written], [rng.randrange(PAGES)]):
            buffers = {page: bytearray(b"\xaa" * store.page_size) for page in wanted}
            if store.read_now([Run(page, memoryview(data)) for page, data in buffers.items()]):
                for page, found in buffers.items():
                    expected = harness.expected(model.get(page, bytes(store.page_size)))
                    require(found == expected, f"page {page} reads otherwise at once")
    await store.aclose()
    with contextlib.suppress(StoreFailedError):
        closed = store.read_now([Run(1, memoryview(bytearray(store.page_size)))])
        require(not closed, "a closed store is read at once")


async def _expect(
    store: Store, index: int, data: bytes, why: str = "was written", alternative: bytes = b""
) -> None:
    found = await read(store, index, len(data) // store.page_size)
    if found in (data, alternative):
        return
    size = store.page_size
    pages = range(0, len(data), size)
    wrong = next(at for at in pages if found[at : at + size] != data[at : at + size])
    raise ConformanceError(f"page {index + wrong // size} {why}, and reads otherwise")


async def _old_or_new(store: Store, index: int, old: bytes, new: bytes) -> bytes:
    """Each page of two is one or the other; returns what is there."""
    found = await read(store, index, len(old) // store.page_size)
    size = store.page_size
    for at in range(0, len(old), size):
        whole = found[at : at + size] in (old[at : at + size], new[at : at + size])
        require(whole, f"page {index + at // size} is neither old nor new after a cancelled write")
    return found


async def _cancelled(operation: Coroutine[Any, Any, None], turns: int) -> None:
    task = asyncio.create_task(operation)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    error = None if task.cancelled() else task.exception()
    if error is not None:
        raise ConformanceError(f"{error!r} came out of a cancelled operation") from error


async def _asserts(operation: Coroutine[Any, Any, None], what: str) -> None:
    try:
        await operation
    except AssertionError:
        return
    raise ConformanceError(f"{what} is not refused by an assertion")


CHECKS: tuple[Check, ...] = (
    check_zeros_before_the_first_write,
    check_what_was_written_is_read,
    check_runs_equal_singles,
    check_vectored_equals_one_by_one,
    check_discarded_pages_read_as_zeros,
    check_the_first_and_the_last_page,
    check_pages_that_do_not_exist,
    check_every_page_size,
    check_concurrent_operations,
    check_buffers_after_return,
    check_buffers_after_cancellation,
    check_closed_twice_and_used_after,
    check_closed_while_it_works,
    check_a_full_store_keeps_what_it_has,
    check_what_was_flushed_survives,
    check_opened_by_one_at_a_time,
    check_a_history_equals_a_dict,
    check_what_is_read_at_once,
    check_failures_of_the_store_below,
)
