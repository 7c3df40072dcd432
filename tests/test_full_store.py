"""A store that is full: regions grow past their budget or stall, by choice; nothing is lost."""

from __future__ import annotations

import pytest

from support import run_child

# Random bytes do not compress: 4 MiB of pool hold less than 1024 pages.
SETUP = """
import random, signal, sys, threading, time, userswap
PAGE, MIB = 4096, 1 << 20
def page_of(number, version=0):
    return random.Random(number * 1000 + version).randbytes(PAGE)
def fill(region, pages):
    for number in pages:
        region.memory[number * PAGE : (number + 1) * PAGE] = page_of(number)
def check(region, pages):
    for number in pages:
        assert region.memory[number * PAGE : (number + 1) * PAGE] == page_of(number), number
"""


@pytest.mark.parametrize("store", ["ram:lz4?limit=4MiB", "memory:?limit=4MiB"])
@pytest.mark.parametrize("path", ["native", "asyncio"])
def test_grow(store: str, path: str) -> None:
    child = run_child(
        f"""{SETUP}
store, path = sys.argv[1:]
region = userswap.Region("16MiB", resident="2MiB", store=store, fault_path=path, name="growing")
fill(region, range(4096))
stats = region.stats()
assert stats.store_full and stats.over_budget_pages > 0 and stats.put_back_pages >= 0, stats
assert stats.resident_bytes > 8 * MIB and stats.lost_pages == 0, stats
check(region, range(4096))
check(region, random.Random(3).sample(range(4096), 1000))
try:
    if path == "native":
        region.resize_resident("2MiB")
        raise AssertionError("no error")
except userswap.ResidentError as error:
    assert "is full" in str(error) and store in str(error), error
# Room again: the region goes back to its budget.
region.discard(4 * MIB, 12 * MIB)
region.resize_resident("2MiB")
check(region, range(1024, 1024))
check(region, range(0, 400))
assert not any(region.memory[4 * MIB :: 4096])
assert region.stats().lost_pages == 0
region.close()
""",
        args=[store, path],
    )
    assert child.returncode == 0, child.stderr
    assert "growing" in child.stderr, "the pager has not said it"
    assert "full" in child.stderr
    assert child.stderr.count("\n") <= 2, child.stderr


@pytest.mark.parametrize("store", ["ram:lz4?limit=4MiB", "memory:?limit=4MiB"])
def test_stall(store: str) -> None:
    child = run_child(
        f"""{SETUP}
region = userswap.Region("16MiB", resident="2MiB", store=sys.argv[1], on_full="stall", name="slow")
# The thread that stalls must not hold the interpreter, or nobody here could help it.
import ctypes
libc = ctypes.CDLL(None)
address = ctypes.addressof(ctypes.c_char.from_buffer(region.memory))
reached = []
def touch():
    for number in range(1900):
        libc.memcpy(ctypes.c_void_p(address + number * PAGE), page_of(number), PAGE)
        reached.append(number)
thread = threading.Thread(target=touch, daemon=True)
thread.start()
time.sleep(8)
stalled = len(reached)
assert 1000 < stalled < 1700, stalled
stats = region.stats()
# A batch that the store refused is in staging and in place for a moment.
assert stats.resident_bytes + stats.kept_bytes <= 2 * MIB + 2 * 64 * PAGE, stats
assert stats.faults["parked"] > 0 and stats.store_full, stats
time.sleep(0.5)
assert len(reached) == stalled
region.discard(0, 3 * MIB)
thread.join(10)
assert len(reached) == 1900, (stalled, len(reached))
check(region, range(3 * MIB // PAGE, 1900))
assert region.stats().lost_pages == 0 and not region.memory[0]
print("good", flush=True)
""",
        args=[store],
        timeout=50,
    )
    assert (child.returncode, child.stdout) == (0, "good\n"), child.stderr
    lines = [line for line in child.stderr.splitlines() if "waited" in line]
    assert len(lines) == 1, child.stderr
    for word in ("slow", "full", store, "5 s"):
        assert word in lines[0], (word, lines[0])
