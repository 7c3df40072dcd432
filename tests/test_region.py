"""The Region API: its numbers, its budget, its ranges, its names, and many at once."""

from __future__ import annotations

import pytest

from children import good
from support import run_child

STORES = ["ram:lz4", "ram:zstd?level=1", "memory:"]
PATHS = ["native", "asyncio"]
BOTH_WAYS = pytest.mark.parametrize(
    ("store", "path"), [("ram:lz4", "native"), ("ram:lz4", "asyncio"), ("memory:", "native")]
)


def test_the_example_of_the_readme() -> None:
    child = run_child("""
import numpy, userswap, warnings
warnings.simplefilter("ignore", ResourceWarning)
with userswap.Region("1GiB", resident="256MiB", store="ram:lz4", name="table") as region:
    array = numpy.frombuffer(region.memory, dtype=numpy.float64)
    array[: 1 << 22] = numpy.arange(1 << 22)
    assert isinstance(region.memory, memoryview) and not region.memory.readonly
    assert len(region.memory) == region.size == 1 << 30
    assert region.name == "table" and region.resident == 256 << 20
    stats = region.stats()
    assert stats.resident_limit == 256 << 20 and stats.name == "table"
    region.resize_resident("128MiB")
    assert region.resident == region.stats().resident_limit == 128 << 20
    region.prefetch(0, 1 << 20); region.discard(0, 1 << 20); region.flush()
    assert not array[: 1 << 17].any()
    assert array[1 << 17] == 1 << 17
# The array is still alive: the region serves it on.
assert array[(1 << 22) - 1] == (1 << 22) - 1
array[5] = 7.0
assert array.sum() > 7
print("end")
""")
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("path", PATHS)
def test_statistics_add_up(store: str, path: str) -> None:
    good(
        """
import dataclasses, json, random, sys, userswap
store, path = sys.argv[1:]
PAGE, PAGES, TOUCHED = 4096, 4096, 3000
with userswap.Region(PAGES * PAGE, resident="4MiB", store=store, fault_path=path) as region:
    randbytes = random.Random(1).randbytes
    for i in range(TOUCHED):
        region.memory[i * PAGE : i * PAGE + 2048] = randbytes(2048)
    untouched = region.memory[3500 * PAGE]
    assert untouched == 0
    for i in range(0, TOUCHED, 7):
        assert region.memory[i * PAGE + 2048] == 0
    region.flush()
    stats = region.stats()
    assert stats == dataclasses.replace(stats) and dataclasses.is_dataclass(stats)
    assert sum(stats.pages.values()) == PAGES
    # Readahead may have brought a few of those that nobody touched.
    assert TOUCHED <= PAGES - stats.pages["ZERO"] <= TOUCHED + 200, stats.pages
    assert 0 < stats.resident_bytes + stats.kept_bytes <= 4 << 20, stats
    assert stats.over_budget_pages == stats.lost_pages == stats.vanished_pages == 0, stats
    assert stats.evicted_pages + stats.dropped_pages >= TOUCHED - 1024
    assert stats.faults["zero"] >= 1 and stats.faults_native + stats.faults_awaited > 100
    awaited = store == "memory:"
    assert bool(stats.faults_awaited) == awaited == bool(stats.awaited_latency.count), stats
    assert bool(stats.faults["load"]) == (not awaited) == bool(stats.pool_bytes), stats
    for latency in (stats.native_latency, stats.awaited_latency):
        assert (
            latency.p50_us <= latency.p90_us <= latency.p99_us <= latency.p999_us <= latency.max_us
        )
        assert bool(latency.count) == (latency.max_us > 0)
    assert stats.native_latency.max_us < 5e6
    assert stats.fault_path == path and stats.store == store
    assert stats.ratio is None if awaited else 1.5 < stats.ratio < 2.2, stats.ratio
    assert 0 < stats.table_bytes <= 1 << 20
    assert stats.pager_cpu_seconds > 0 and 1 << 20 < stats.pager_rss_bytes < 200 << 20
    assert json.loads(json.dumps(stats.as_dict()))["ratio"] == stats.ratio
    assert not stats.store_full and not stats.agent_late
""",
        store,
        path,
    )


def test_the_loop_serves_until_a_store_is_a_pool() -> None:
    good(
        """
import userswap
block = bytes(range(256)) * 16
def fill(region):
    for offset in range(0, region.size, 4096):
        region.memory[offset : offset + 4096] = offset.to_bytes(8, "little") + block[8:]
def check(region):
    for offset in range(0, region.size, 4096):
        assert region.memory[offset : offset + 8] == offset.to_bytes(8, "little"), offset
with userswap.Region("8MiB", resident="2MiB", store="memory:") as awaited:
    fill(awaited)
    assert awaited.stats().fault_path == "asyncio"
    with userswap.Region("8MiB", resident="2MiB", store="ram:lz4") as pooled:
        fill(pooled)
        check(awaited)
        check(pooled)
        assert awaited.stats().fault_path == pooled.stats().fault_path == "native"
    check(awaited)
    assert awaited.stats().faults["awaited"] > 50
"""
    )


@BOTH_WAYS
def test_the_budget_changes_at_speed(store: str, path: str) -> None:
    out = good(
        """
import sys, time, userswap
store, path = sys.argv[1:]
MIB = 1 << 20
block = bytes(range(256)) * 16
with userswap.Region("96MiB", resident="80MiB", store=store, fault_path=path) as region:
    for offset in range(0, 80 * MIB, MIB):
        region.memory[offset : offset + MIB] = block * 256
    best = 0.0
    for _ in range(4):  # processor time, which a busy machine stretches less than time
        start = time.process_time() + region.stats().pager_cpu_seconds
        region.resize_resident("16MiB")
        spent = time.process_time() + region.stats().pager_cpu_seconds - start
        best = max(best, 64 / spent)
        stats = region.stats()
        assert stats.resident_bytes + stats.kept_bytes <= 16 * MIB
        region.resize_resident("80MiB")
        assert region.stats().resident_limit == 80 * MIB
        for offset in range(0, 80 * MIB, 4096):
            assert region.memory[offset : offset + 4096] == block
            region.memory[offset] = 0  # dirty again
        assert region.stats().resident_bytes > 70 * MIB
        if best >= 150:
            break
    print(best)
""",
        store,
        path,
    )
    print(f"{store} {path}: {float(out):.0f} MiB/s")
    assert float(out) >= 150


def test_a_budget_that_cannot_be_reached_says_why() -> None:
    good("""
import ctypes, time, userswap
MIB = 1 << 20
region = userswap.Region("8MiB", resident="16MiB", name="locked")
region.memory[:] = b"x" * region.size
libc = ctypes.CDLL(None, use_errno=True)
address = ctypes.addressof(ctypes.c_char.from_buffer(region.memory))
assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(region.size)) == 0
start = time.monotonic()
try:
    region.resize_resident("2MiB")
except userswap.ResidentError as error:
    took = time.monotonic() - start
    assert "'locked' is still 6" in str(error) and "mlocked" in str(error), error
    assert 4 < took < 40, took
else:
    raise AssertionError("no error")
assert region.resident == 2 * MIB and region.stats().resident_bytes == 8 * MIB
assert libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(region.size)) == 0
region.resize_resident("4MiB")
assert region.stats().resident_bytes <= 4 * MIB
assert bytes(region.memory) == b"x" * region.size
region.close()
""")


@BOTH_WAYS
def test_ranges(store: str, path: str) -> None:
    good(
        """
import sys, time, userswap
store, path = sys.argv[1:]
PAGE, MIB = 4096, 1 << 20
with userswap.Region("16MiB", resident="4MiB", store=store, fault_path=path) as region:
    memory = region.memory
    for page in range(region.size // PAGE):
        memory[page * PAGE] = page % 251 + 1
    region.flush()
    assert region.stats().pages["LEAVING"] == 0
    region.prefetch(0, MIB)
    messages = region.stats().native_latency.count
    assert sum(memory[offset] for offset in range(0, MIB, PAGE)) > 0
    messages = region.stats().native_latency.count - messages
    assert messages < 128, messages  # of 256 without
    region.prefetch(0, region.size)  # more than the budget holds: no more than that
    assert region.stats().resident_bytes <= 4 * MIB
    region.discard(MIB, 2 * MIB)
    region.discard(0, 0)
    for page in range(region.size // PAGE):
        expected = 0 if MIB <= page * PAGE < 3 * MIB else page % 251 + 1
        assert memory[page * PAGE] == expected, page
    region.discard(0, region.size)
    stats = region.stats()
    assert stats.pages["ZERO"] == region.size // PAGE and stats.resident_bytes == 0, stats
    assert stats.pool_bytes <= MIB and stats.pool_payload_bytes == 0, stats
    memory[5] = 1
    assert memory[5] == 1 and memory[PAGE] == 0
    for call, offset, length in (
        (region.discard, 1, PAGE), (region.discard, 0, 100), (region.discard, 0, 17 * MIB),
        (region.discard, -PAGE, PAGE), (region.prefetch, 0, 17 * MIB), (region.prefetch, 0, -1),
    ):
        try:
            call(offset, length)
        except userswap.ConfigError:
            continue
        raise AssertionError((call, offset, length))
    region.prefetch(100, 5000)
""",
        store,
        path,
    )


def test_names() -> None:
    good("""
import userswap
make = lambda name=None: userswap.Region("1MiB", resident="2MiB", name=name)
with make() as a, make() as b, make("table") as c, make("table") as d:
    assert a.name != b.name and a.name.startswith("region-"), (a.name, b.name)
    assert c.name == d.name == c.stats().name == "table"
    assert repr(c) == "<userswap.Region 'table' of 1MiB>", repr(c)
assert repr(c) == "<userswap.Region 'table' of 1MiB, closed>", repr(c)
for name in ("", "two\\nlines", "x" * 129, 5):
    try:
        make(name)
    except userswap.ConfigError as error:
        assert "name=" in str(error)
    else:
        raise AssertionError(name)
""")


def test_a_region_is_not_copied() -> None:
    good("""
import copy, pickle, userswap
with userswap.Region("1MiB", resident="2MiB") as region:
    for again in (copy.copy, copy.deepcopy, pickle.dumps, lambda region: copy.deepcopy([region])):
        try:
            again(region)
        except TypeError as error:
            assert "copy the bytes" in str(error), error
        else:
            raise AssertionError(again)
    region.memory[0] = 1
""")


def test_a_closed_region_is_not_entered() -> None:
    good("""
import userswap
region = userswap.Region("1MiB", resident="2MiB", name="done")
region.close()
try:
    with region:
        raise AssertionError("entered")
except ValueError as error:
    assert "'done' is closed" in str(error), error
""")


def test_a_budget_over_the_size_is_the_size() -> None:
    good("""
import userswap
MIB = 1 << 20
for resident in ("1GiB", 5 * MIB, "100%"):
    with userswap.Region("4MiB", resident=resident) as region:
        assert region.resident == region.stats().resident_limit == 4 * MIB
        region.memory[:] = b"x" * region.size
        region.resize_resident("2MiB")
        region.resize_resident("8MiB")
        assert region.resident == region.stats().resident_limit == 4 * MIB
        assert bytes(region.memory) == b"x" * region.size
with userswap.Region("64KiB", resident="1GiB") as region:
    assert MIB < region.resident == region.stats().resident_limit < 2 * MIB  # the minimum
    region.memory[:] = b"y" * region.size
    assert region.stats().resident_bytes == region.size
""")


def test_many_regions_have_one_pager() -> None:
    good("""
import os, userswap
regions = [
    userswap.Region("2MiB", resident="2MiB", store=store)
    for store in ("ram:lz4", "memory:", "ram:lz4", "ram:zstd")
]
assert len({region.stats().pager_pid for region in regions}) == 1
for i, region in enumerate(regions):
    region.memory[:] = bytes([i + 1]) * region.size
for i, region in enumerate(regions):
    assert region.memory[-1] == i + 1
pager = regions[0].stats().pager_pid
regions[0].close()
assert regions[2].stats().pager_pid == pager and regions[2].memory[7] == 3
for region in regions:
    region.close()
assert not os.path.exists(f"/proc/{pager}"), "the pager outlived the last region"
with userswap.Region("1MiB", resident="2MiB") as region:
    assert region.stats().pager_pid != pager
""")


@pytest.mark.parametrize("store", ["ram:lz4", "memory:"])
def test_a_thousand_regions_with_few_descriptors(store: str) -> None:
    good(
        """
import os, resource, sys, time, userswap
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
start = time.monotonic()
regions = [
    userswap.Region("64KiB", resident="2MiB", store=sys.argv[1]) for _ in range(1000)
]
opened = time.monotonic() - start
for i, region in enumerate(regions):
    region.memory[:2] = i.to_bytes(2, "big")
for i, region in enumerate(regions):
    assert region.memory[:2] == i.to_bytes(2, "big")
pager = regions[0].stats().pager_pid
for pid in (os.getpid(), pager):
    held = len(os.listdir(f"/proc/{pid}/fd"))
    assert held < 60, (pid, held)
start = time.monotonic()
for region in regions:
    region.close()
print(f"opened in {opened:.2f} s, closed in {time.monotonic() - start:.2f} s")
assert not os.path.exists(f"/proc/{pager}")
""",
        store,
    )


def test_a_tebibyte_with_scattered_touches() -> None:
    out = good("""
import random, time, userswap
TIB, PAGE, TOUCHES = 1 << 40, 4096, 3000
with userswap.Region("1TiB", resident="4MiB") as region:
    assert region.size == TIB
    pages = random.Random(7).sample(range(TIB // PAGE), TOUCHES)
    for number, page in enumerate(pages, 1):
        region.memory[page * PAGE : page * PAGE + 4] = number.to_bytes(4, "big")
    for number, page in enumerate(pages, 1):
        assert region.memory[page * PAGE : page * PAGE + 4] == number.to_bytes(4, "big")
    start = region.stats().pager_cpu_seconds
    stats = region.stats()
    assert stats.pager_cpu_seconds - start < 1, stats
    # A touched page costs a leaf and a branch, 512 bytes each, and a little that is ready.
    assert 1024 * TOUCHES * 0.9 < stats.table_bytes < 1400 * TOUCHES + (1 << 18), stats.table_bytes
    assert sum(stats.pages.values()) == TIB // PAGE
    assert TIB // PAGE - stats.pages["ZERO"] == TOUCHES
    assert region.prefetch(0, TIB) is None
    region.flush()
    region.discard(0, TIB)
    spent = region.stats().pager_cpu_seconds - stats.pager_cpu_seconds
    assert spent < 2, spent
    assert region.memory[pages[0] * PAGE] == 0
    assert region.stats().pages["ZERO"] == TIB // PAGE - 1
    print(stats.table_bytes / TOUCHES)
""")
    print(f"{float(out):.0f} bytes of table a touched page")


def test_an_idle_pager_costs_nothing() -> None:
    out = good("""
import time, userswap
with userswap.Region("64MiB", resident="16MiB", store="ram:lz4") as region:
    region.memory[:] = bytes(range(256)) * (region.size // 256)
    region.flush()
    time.sleep(0.5)
    before = region.stats()
    time.sleep(3)
    after = region.stats()
    share = (after.pager_cpu_seconds - before.pager_cpu_seconds) / 3
    print(share * 100, after.pager_rss_bytes / (1 << 20))
    assert share < 0.005, share
    assert after.pager_rss_bytes < 50 << 20, after.pager_rss_bytes
""")
    print(f"idle: CPU %, MiB: {out}")


def test_a_region_that_the_program_split() -> None:
    # mlock and mprotect split the mapping, and no copy or move crosses a seam.
    good("""
import ctypes, userswap
MIB, PAGE = 1 << 20, 4096
libc = ctypes.CDLL(None, use_errno=True)
with userswap.Region("32MiB", resident="16MiB") as region:
    for offset in range(0, region.size, PAGE):
        region.memory[offset : offset + PAGE] = (offset // PAGE).to_bytes(4, "big") * 1024
    address = ctypes.addressof(ctypes.c_char.from_buffer(region.memory))
    lock = lambda call, first, pages: call(
        ctypes.c_void_p(address + first * PAGE), ctypes.c_size_t(pages * PAGE)
    )
    for first in range(3, 2000, 97):
        assert lock(libc.mlock, first, 5) == 0
    for offset in range(0, region.size, PAGE):
        assert region.memory[offset : offset + 4] == (offset // PAGE).to_bytes(4, "big")
    region.resize_resident("4MiB")
    for first in range(3, 2000, 97):
        assert lock(libc.munlock, first, 5) == 0
    region.resize_resident("2MiB")
    for offset in range(0, region.size, PAGE):
        assert region.memory[offset : offset + 4] == (offset // PAGE).to_bytes(4, "big")
""")
