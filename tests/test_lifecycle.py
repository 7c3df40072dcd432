"""How regions begin and end: closing, buffers that outlive it, every way a process can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from children import gone, good
from support import run_child


def test_close_and_use_after_close() -> None:
    good("""
import warnings, userswap
warnings.simplefilter("error")
region = userswap.Region("4MiB", resident="2MiB", name="it")
memory = region.memory
memory[0] = 1
region.close()
region.close()
for use in (
    region.__enter__,
    lambda: region.memory, region.stats, lambda: region.resize_resident("2MiB"), region.flush,
    lambda: region.prefetch(0, 4096), lambda: region.discard(0, 4096),
):
    try:
        use()
    except ValueError as error:
        assert "region 'it' is closed" in str(error), error
    else:
        raise AssertionError(use)
try:
    memory[0]
except ValueError as error:
    assert "released" in str(error)
else:
    raise AssertionError("memory")
assert region.name == "it" and region.size == 4 << 20 and "it" in repr(region)
""")


@pytest.mark.parametrize("buffer", ["numpy", "slice", "ctypes", "bytes view"])
def test_buffers_keep_the_region_in_service(buffer: str) -> None:
    child = run_child(
        """
import ctypes, gc, os, sys, time, warnings
import numpy, userswap
make = {
    "numpy": lambda memory: numpy.frombuffer(memory, dtype=numpy.uint8),
    "slice": lambda memory: memory[4096 : 4 << 20],
    "ctypes": lambda memory: (ctypes.c_ubyte * (4 << 20)).from_buffer(memory),
    "bytes view": lambda memory: memoryview(memory).cast("B"),
}[sys.argv[1]]
region = userswap.Region("4MiB", resident="2MiB", name="kept")
region.memory[:] = bytes(range(256)) * (region.size // 256)
view = make(region.memory)
pager = region.stats().pager_pid
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    region.close()
assert [warning.category for warning in caught] == [ResourceWarning], caught
assert "'kept'" in str(caught[0].message) and caught[0].filename == "<string>"
try:
    region.memory
except ValueError:
    pass
region.close()
del region
gc.collect()
assert all(view[i] == i % 256 for i in range(0, len(view), 4001))
assert os.path.exists(f"/proc/{pager}")
view[5] = 77
other = userswap.Region("1MiB", resident="2MiB")
assert other.stats().pager_pid == pager
assert all(view[i] == i % 256 for i in range(100, len(view), 4001)) and view[5] == 77
other.close()
assert os.path.exists(f"/proc/{pager}")
maps = open("/proc/self/maps").read().count("\\n")
del view
deadline = time.monotonic() + 10
while os.path.exists(f"/proc/{pager}") and time.monotonic() < deadline:
    time.sleep(0.01)
assert not os.path.exists(f"/proc/{pager}"), "the last reference went, the region did not"
with userswap.Region("1MiB", resident="2MiB") as region:
    region.memory[0] = 1
""",
        args=[buffer],
    )
    assert (child.returncode, child.stderr) == (0, "")


def test_a_region_that_is_dropped_goes() -> None:
    good("""
import gc, os, time, userswap
gc.disable()
region = userswap.Region("4MiB", resident="2MiB")
pager = region.stats().pager_pid
region.memory[:] = b"x" * region.size
view = region.memory
del region
assert bytes(view[-3:]) == b"xxx"
del view  # no cycle, so no collection is needed
deadline = time.monotonic() + 10
while os.path.exists(f"/proc/{pager}") and time.monotonic() < deadline:
    time.sleep(0.01)
assert not os.path.exists(f"/proc/{pager}")
""")


def test_collections_end_regions_wherever_they_happen() -> None:
    # Regions in cycles are finalized by whichever allocation starts a collection: also one made
    # in the middle of a request, by a thread that opens or closes.
    good("""
import gc, random, sys, threading, userswap
gc.set_threshold(20, 2, 2)
class Holder: pass
def churn(seed):
    random_ = random.Random(seed)
    for _ in range(25):
        holder = Holder()
        holder.me = holder
        store = random_.choice(["ram:lz4", "memory:"])
        holder.region = userswap.Region("256KiB", resident="4MiB", store=store)
        holder.region.memory[:8] = b"abcdefgh"
        holder.region.stats()
        if random_.random() < 0.3:
            holder.region.close()
keep = userswap.Region("1MiB", resident="4MiB")
threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
keep.close()
""")


def test_the_end_does_not_mind_a_region_that_has_just_gone() -> None:
    good("""
import userswap
from userswap.engine import client
region = userswap.Region("1MiB", resident="2MiB")
client._clients[0].regions[999] = (0, 0)  # closed by the time that the pager is asked
""")


def test_opening_closing_and_asking_at_once() -> None:
    good("""
import os, random, threading, time, userswap
errors = []
shared = userswap.Region("8MiB", resident="4MiB", store="memory:")
stop = threading.Event()
def guarded(function):
    def run(seed):
        try:
            function(random.Random(seed))
        except BaseException as error:
            errors.append(error)
            raise
    return run
@guarded
def churn(random_):
    for turn in range(15):
        store = random_.choice(["ram:lz4", "ram:zstd", "memory:"])
        with userswap.Region("2MiB", resident="4MiB", store=store) as region:
            data = random_.randbytes(4096)
            region.memory[turn * 4096 : (turn + 1) * 4096] = data
            assert region.memory[turn * 4096 : (turn + 1) * 4096] == data
            if turn % 3 == 0:
                region.resize_resident("3MiB")
@guarded
def ask(random_):
    while not stop.is_set():
        stats = shared.stats()
        assert sum(stats.pages.values()) == 2048
@guarded
def touch(random_):
    while not stop.is_set():
        offset = random_.randrange(2048) * 4096
        shared.memory[offset] = 1
        if random_.random() < 0.1:
            shared.discard(offset, 4096)
workers = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
others = [threading.Thread(target=ask, args=(7,)), threading.Thread(target=touch, args=(8,))]
for thread in workers + others: thread.start()
for thread in workers: thread.join()
stop.set()
for thread in others: thread.join()
closers = [threading.Thread(target=shared.close) for _ in range(4)]
for thread in closers: thread.start()
for thread in closers: thread.join()
assert not errors, errors
""")


ENDS = {
    "exit": "pass",
    "exception": "raise SystemExit(3)",
    "sys.exit in a thread": "import threading; t = threading.Thread(target=sys.exit); t.start()",
    "os._exit": "os._exit(4)",
    "SIGKILL": "os.kill(os.getpid(), 9)",
    "SIGTERM": "os.kill(os.getpid(), 15)",
    "exec": "os.execv('/bin/sleep', ['sleep', '1'])",
    "abort": "os.abort()",
    "daemon thread touching": """
import threading
def touch():
    i = 0
    while True:
        region.memory[i % region.size] = 1; i += 4096
threading.Thread(target=touch, daemon=True).start()
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_pager_ends_with_its_client(end: str) -> None:
    child = run_child(
        f"""
import os, sys, userswap
region = userswap.Region("16MiB", resident="4MiB")
region.memory[:] = b"0123456789abcdef" * (region.size // 16)
print(region.stats().pager_pid, flush=True)
{ENDS[end]}
""",
        timeout=20,
    )
    assert gone(int(child.stdout)), "the pager is left over"
    if end == "exit":
        assert (child.returncode, child.stderr) == (0, "")


FORKED = """
import os, signal, sys, time, userswap
region = userswap.Region("16MiB", resident="4MiB")
region.memory[:] = b"0123456789abcdef" * (region.size // 16)
print(region.stats().pager_pid, flush=True)
pid = {fork}
if pid == 0:
    signal.pause()
print(pid, flush=True)
{end}
"""
# A fork that Python does not see: the child keeps every descriptor of its parent.
RAW_FORK = "__import__('ctypes').CDLL(None).fork()"


@pytest.mark.parametrize("fork", ["os.fork()", RAW_FORK], ids=["fork", "C fork"])
@pytest.mark.parametrize("end", ["SIGKILL", "exit"])
def test_a_forked_child_does_not_hold_the_pager(end: str, fork: str) -> None:
    child = run_child(FORKED.format(fork=fork, end=ENDS[end]), timeout=20)
    pager, forked = map(int, child.stdout.split())
    try:
        assert gone(pager), f"the pager lives as long as a forked child: {child.stderr}"
    finally:
        os.kill(forked, signal.SIGKILL)


DEATH = """
import os, signal, sys, time, userswap
mode, buffers = sys.argv[1:]
region = userswap.Region("8MiB", resident="2MiB", name="orphan", on_pager_death=mode)
region.memory[:] = b"q" * region.size
view = region.memory[:100] if buffers == "buffers" else None
os.kill(region.stats().pager_pid, signal.SIGKILL)
try:
    while True:
        region.stats()
except userswap.PagerError as error:
    assert "gone" in str(error), error
region.close()
del region
view = None
with userswap.Region("8MiB", resident="2MiB") as region:
    region.memory[:] = b"r" * region.size
    assert bytes(region.memory) == b"r" * region.size
print(len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize("buffers", ["none", "buffers"])
def test_a_region_whose_pager_died_can_be_closed(buffers: str) -> None:
    child = run_child(DEATH, args=["block", buffers], timeout=30)
    assert child.returncode == 0, child.stderr
    assert child.stderr.startswith("userswap: the pager died")
    assert child.stderr.count("\n") == 1, child.stderr
    assert int(child.stdout) <= 6


def test_the_pagers_death_ends_a_process_that_is_asking() -> None:
    child = run_child(DEATH, args=["abort", "none"], timeout=30)
    assert child.returncode == -signal.SIGABRT, child.stderr
    assert child.stderr.startswith("userswap: the pager died")
    assert child.stdout == ""


def interrupt(code: str, *, after: float, timeout: float = 30) -> tuple[int, str, str]:
    """Run code that prints a line, send it SIGINT a moment later; status, output, errors."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(after)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=timeout)
    finally:
        child.kill()
    return child.returncode, out, err


BEFORE_INTERRUPT = """
import time, userswap
region = userswap.Region("96MiB", resident="72MiB", store="memory:")
block = bytes(range(256)) * 16
for offset in range(0, region.size, 1 << 20):
    region.memory[offset : offset + (1 << 20)] = block * 256
interrupted = False
print("ready", flush=True)
try:
    while True:
"""
AFTER_INTERRUPT = """
except KeyboardInterrupt:
    interrupted = True
assert interrupted
stats = region.stats()
region.resize_resident("24MiB")
assert region.stats().resident_bytes <= 24 << 20
assert region.memory[-4096:] == block
region.memory[4096 : 8192] = block
region.discard(0, 4096)
assert region.memory[0] == 0 and region.memory[4096 : 8192] == block
region.close()
with userswap.Region("1MiB", resident="2MiB") as other:
    other.memory[0] = 1
    pager = other.stats().pager_pid
assert pager != stats.pager_pid
print("good")
"""
LONG = {
    "resize_resident": "region.resize_resident('8MiB'); region.resize_resident('72MiB'); "
    "region.prefetch(0, region.size)",
    "discard": "region.discard(0, 1 << 26); region.memory[: 1 << 26] = block * (1 << 14)",
    "stats": "region.stats()",
}


@pytest.mark.parametrize("operation", LONG)
def test_an_interrupt_leaves_everything_usable(operation: str) -> None:
    code = f"{BEFORE_INTERRUPT}        {LONG[operation]}\n{AFTER_INTERRUPT}"
    for after in (0.003, 0.1):
        assert interrupt(code, after=after) == (0, "good\n", "")


def test_an_interrupt_leaves_no_half_open_region(seed: int) -> None:
    code = """
import os, userswap
userswap.Region  # an interrupted import is the interpreter's own affair
print("ready", flush=True)
pagers, region = set(), None
try:
    while True:
        region = userswap.Region("1MiB", resident="2MiB")
        region.memory[0] = 1
        pagers.add(region.stats().pager_pid)
        region.close()
except KeyboardInterrupt:
    pass
del region
with userswap.Region("1MiB", resident="2MiB") as region:
    region.memory[0] = 1
    pagers.add(region.stats().pager_pid)
    region.resize_resident("3MiB")
    from userswap.engine import client
    # What the interrupt left of its region may be on its way out still.
    client.keeper.run(lambda: None)
    assert len(client._clients[0].regions) == 1, client._clients[0].regions
for pager in pagers:
    assert not os.path.exists(f"/proc/{pager}"), pager
print("good")
"""
    for turn in range(4):
        assert interrupt(code, after=0.02 + 0.09 * turn) == (0, "good\n", "")


def test_an_exec_beside_a_forked_child_is_noticed() -> None:
    # The pidfd is the new program's and the child holds the socket: only the memory is gone.
    child = run_child(
        """
import ctypes, os, signal, userswap
region = userswap.Region("16MiB", resident="4MiB")
region.memory[:] = b"0123456789abcdef" * (region.size // 16)
pager = region.stats().pager_pid
pid = ctypes.CDLL(None).fork()
if pid == 0:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)
    signal.pause()
print(pid, flush=True)
look = f"sleep 3; grep State /proc/{pager}/status"
os.execv("/bin/sh", ["sh", "-c", look])
"""
    )
    forked, *state = child.stdout.split()
    os.kill(int(forked), signal.SIGKILL)
    assert state in ([], ["State:", "Z", "(zombie)"]), child.stdout
