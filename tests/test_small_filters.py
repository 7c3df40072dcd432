"""What retry, stats, delay and faulty add to the store under them."""

from __future__ import annotations

import asyncio
import logging
import random
import time

import pytest

from media import PAGE, Medium, content, lost, open_over, read, write
from userswap.backends.filters.faulty import FaultyFilter
from userswap.backends.filters.retry import RetryFilter
from userswap.backends.filters.stats import Counts, StatsFilter, _class_of, _upper_end
from userswap.backends.grammar import GrammarError
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreFailedError,
    StoreFullError,
    TransientError,
)
from userswap.native import lib

PAGES = Geometry(100)


# --- retry ---


async def test_a_transient_error_is_tried_again() -> None:
    store = await open_stack("retry?tries=3&first=1ms::faulty?read=n1&write=n2::memory:", PAGES)
    assert isinstance(store, RetryFilter)
    data = random.Random(1).randbytes(3 * PAGE)
    await write(store, 4, data)
    await write(store, 4, data)
    assert await read(store, 4, 3) == data
    assert store.retried == 2


async def test_tries_are_bounded_and_other_errors_go_up_at_once() -> None:
    faulty = "faulty?read=n1%2B&how={}::memory:"
    for how, tries, error in (
        ("transient", 4, TransientError),
        ("lost", 1, PageLostError),
        ("full", 1, StoreFullError),
        ("failed", 1, StoreFailedError),
    ):
        store = await open_stack("retry?tries=4&first=1us::" + faulty.format(how), PAGES)
        with pytest.raises(error):
            await read(store, 0)
        under = store._inner  # type: ignore[attr-defined]
        assert under.calls["read"] == tries


async def test_delays_double_are_bounded_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(delay: float) -> None:
        slept.append(delay)

    url = "retry?tries=8&first=1ms&most=8ms&seed=5::faulty?flush=n1%2B::memory:"
    for _ in range(2):
        store = await open_stack(url, PAGES)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "sleep", sleep)
            with pytest.raises(TransientError):
                await store.flush()
    assert slept[:7] == slept[7:]
    for delay, most in zip(slept, (0.001, 0.002, 0.004, 0.008, 0.008, 0.008, 0.008), strict=False):
        assert most / 2 <= delay <= most


# --- stats ---


async def test_calls_pages_latencies_and_failures_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = await open_stack("stats::delay?read=2ms::faulty?write=n2::memory:", PAGES)
    assert isinstance(store, StatsFilter)
    await write(store, 0, bytes(3 * PAGE))
    with pytest.raises(TransientError):
        await write(store, 0, bytes(PAGE))
    for _ in range(5):
        await read(store, 7)
    task = asyncio.ensure_future(read(store, 7))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.discard(1, 9)
    counts = store.counts
    assert (counts["write"].calls, counts["write"].pages) == (2, 4)
    assert counts["write"].failed == {"TransientError": 1}
    assert counts["read"].failed == {"CancelledError": 1}
    assert (counts["discard"].pages, counts["flush"].calls) == (9, 0)
    assert 0.002 <= counts["read"].quantile(0.5) <= counts["read"].slowest / 1e9
    with caplog.at_level(logging.INFO, "userswap.stats"):
        await store.aclose()
        await store.aclose()
    assert len(caplog.messages) == 3
    assert "write: 2 calls, 4 pages, 16384 bytes" in caplog.text
    assert "1 TransientError" in caplog.text


def test_classes_of_latency_hold_what_they_say() -> None:
    before = -1
    for value in [*range(5000), *(random.Random(2).randrange(1 << 45) for _ in range(5000))]:
        number = _class_of(value)
        assert value <= _upper_end(number) <= value * 1.25 + 1
        assert number == 0 or _upper_end(number - 1) < value
        before = max(before, number)
    assert before < 200
    assert Counts().quantile(0.5) == 0


async def test_a_native_pool_stays_native() -> None:
    for stack in ("stats::", "retry::", "stats::retry::"):
        store = await open_stack(f"{stack}ram:lz4", PAGES)
        assert store.native is not None
        assert lib.us_pool_held(store.native.pool) >= 0
        await store.aclose()
        assert store.native is None
    for stack in ("delay::", "faulty::", "checksum::"):
        assert (await open_stack(f"{stack}ram:lz4", PAGES)).native is None


# --- delay ---


async def test_delays_come_before_the_operation() -> None:
    store = await open_stack("delay?read=200ms&write=10ms::memory:", PAGES)
    began = time.monotonic()
    writing = asyncio.ensure_future(write(store, 0, b"\x01" * PAGE))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait([writing])
    assert await read(store, 0) == bytes(PAGE)
    assert time.monotonic() - began >= 0.2
    await asyncio.gather(*(read(store, page) for page in range(100)))
    assert time.monotonic() - began < 15, "one waits for the other"


# --- faulty ---


async def failures(store: Store, calls: int) -> list[int]:
    failed = []
    for number in range(1, calls + 1):
        try:
            await read(store, 0)
        except TransientError:
            failed.append(number)
    return failed


async def test_which_calls_fail() -> None:
    assert await failures(await open_stack("faulty?read=n5::memory:", PAGES), 9) == [5]
    assert await failures(await open_stack("faulty?read=n7%2B::memory:", PAGES), 9) == [7, 8, 9]
    assert await failures(await open_stack("faulty?write=n1::memory:", PAGES), 9) == []
    rates = [
        await failures(await open_stack(f"faulty?read=0.1&seed={seed}::memory:", PAGES), 1000)
        for seed in (7, 7, 8)
    ]
    assert rates[0] == rates[1] != rates[2]
    assert 60 < len(rates[0]) < 150


async def test_what_failed_stays_so() -> None:
    store = await open_stack("faulty?read=n2&how=failed::memory:", PAGES)
    await read(store, 0)
    for call in (read(store, 0), read(store, 0), store.flush(), write(store, 0, bytes(PAGE))):
        with pytest.raises(StoreFailedError):
            await call


async def test_one_bit_of_what_is_read_or_written(seed: int) -> None:
    data = random.Random(seed).randbytes(2 * PAGE)
    for operation in ("read", "write"):
        store = await open_stack(f"faulty?{operation}=n1&how=flip&seed={seed}::memory:", PAGES)
        assert isinstance(store, FaultyFilter)
        assert not store.checked
        given = bytearray(data)
        await store.write([Run(3, memoryview(given))])
        assert given == data, "the caller's buffer was changed"
        found = await read(store, 3, 2)
        wrong = int.from_bytes(found, "big") ^ int.from_bytes(data, "big")
        assert wrong.bit_count() == 1
        assert (await read(store, 3, 2) == data) == (operation == "read")


async def test_a_torn_write_is_found_by_its_checksum(seed: int) -> None:
    rng = random.Random(seed)
    medium = Medium()
    torn = 0
    for number in range(1, 60):
        store = await open_over(medium, "checksum::", Geometry(50))
        old = content(rng, 8)
        await write(store, 10, old)
        await store.flush()
        faulty = await open_stack(f"faulty?write=n1&how=torn&seed={number}::memory:", Geometry(50))
        under = store._inner  # type: ignore[attr-defined]
        faulty._inner = under  # type: ignore[attr-defined]
        store._inner = faulty  # type: ignore[attr-defined]
        new = content(rng, 8)
        await write(store, 10, new)
        gone = await lost(store, range(10, 18))
        torn += bool(gone)
        for page in set(range(10, 18)) - set(gone):
            at = (page - 10) * PAGE
            assert await read(store, page) == new[at : at + PAGE]
    assert torn > 40


async def test_a_call_that_hangs_can_be_cancelled() -> None:
    store = await open_stack("faulty?read=n1&how=hang::memory:", PAGES)
    buffer = bytearray(PAGE)
    reading = asyncio.create_task(store.read([Run(0, memoryview(buffer))]))
    await asyncio.sleep(0.05)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    del reading
    buffer.clear()  # refused while anybody exports it
    assert await read(store, 0) == bytes(PAGE)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("faulty?read=sometimes::memory:", "says no calls"),
        ("faulty?read=1.5::memory:", "says no calls"),
        ("faulty?how=badly::memory:", "unknown value 'badly'"),
        ("faulty?writ=n1::memory:", "did you mean 'write'"),
        ("retry?tries=0::memory:", "not an integer from 1"),
        ("retry?first=2s&most=1s::memory:", "longer than the longest"),
        ("delay?read=1::memory:", "lacks a unit"),
        ("stats?x=1::memory:", "unknown option 'x'"),
        ("checksum?x=1::memory:", "unknown option 'x'"),
    ],
)
async def test_options_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        await open_stack(url, PAGES)
