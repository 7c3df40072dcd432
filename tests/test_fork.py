"""Forks: a child has none of its parent's regions, does them no harm, and may have its own."""

from __future__ import annotations

import pytest

from children import good

SETUP = """
import faulthandler, gc, multiprocessing, os, signal, subprocess, sys, threading, time, warnings
import userswap
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a fork beside threads
faulthandler.disable()  # children die of SIGSEGV on purpose
region = userswap.Region("16MiB", resident="4MiB", name="parent's")
pattern = bytes(range(256)) * 16
for offset in range(0, region.size, 4096):
    region.memory[offset : offset + 4096] = pattern
pager = region.stats().pager_pid

def check():
    for offset in range(0, region.size, 4096):
        assert region.memory[offset : offset + 4096] == pattern, offset
    assert region.stats().pager_pid == pager and region.stats().lost_pages == 0

def fork(body):
    # Runs body in a child; its wait status.
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            body()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")
"""


def family(code: str) -> None:
    good(f"{SETUP}\n{code}\ncheck()\nregion.close()\n")


@pytest.mark.parametrize("offset", ["0", "region.size // 2", "region.size - 1"])
@pytest.mark.parametrize("touch", ["memory[{}]", "memory[{}] = 1", "bytes(memory)"])
def test_a_touch_in_a_child_is_sigsegv(touch: str, offset: str) -> None:
    family(f"""
memory = region.memory
def touch():
    {touch.format(offset)}
for _ in range(2):
    assert os.WTERMSIG(fork(touch)) == signal.SIGSEGV
""")


def test_a_fork_that_python_does_not_see_gives_no_zeros() -> None:
    family("""
import ctypes
memory = region.memory
pid = ctypes.CDLL(None).fork()
if pid == 0:
    value = memory[0]
    os._exit(50 + value)
assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV
""")


def test_methods_in_a_child_say_whose_region_it_is() -> None:
    family("""
def ask():
    for use in (region.stats, region.flush, lambda: region.discard(0, 4096),
                lambda: region.resize_resident("2MiB"), lambda: region.prefetch(0, 4096)):
        try:
            use()
        except userswap.PagerError as error:
            assert "belongs to the process that made it" in str(error), error
        else:
            raise AssertionError(use)
assert fork(ask) == 0
""")


@pytest.mark.parametrize(
    "end",
    [
        "region.close()",
        "with region: pass",
        "globals().pop('region'); gc.collect()",
        "view = memoryview(region.memory)[5:]; region.close(); globals().pop('region'); del view",
        "sys.exit(0)",
    ],
)
def test_what_a_child_ends_is_not_its_parents(end: str) -> None:
    family(f"""
def end():
    try:
        {end}
    except SystemExit:
        pass
    gc.collect()
for _ in range(3):
    assert fork(end) == 0
""")


def test_a_child_that_leaves_by_the_front_door() -> None:
    # Not os._exit: atexit handlers, threading's shutdown and every finalizer run.
    family("""
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
""")


def test_a_child_may_have_regions_of_its_own() -> None:
    family("""
def own():
    with userswap.Region("8MiB", resident="2MiB", name="child's") as mine:
        mine.memory[:] = b"child" + bytes(mine.size - 5)
        stats = mine.stats()
        assert stats.pager_pid != pager and stats.name == "child's"
        assert mine.memory[:5] == b"child"
        def grandchild():
            with userswap.Region("1MiB", resident="2MiB") as third:
                third.memory[0] = 1
        assert fork(grandchild) == 0
        assert mine.memory[:5] == b"child"
    assert not os.path.exists(f"/proc/{stats.pager_pid}")
assert fork(own) == 0
""")


def test_forks_amid_opening_closing_and_faulting() -> None:
    family("""
stop, errors = threading.Event(), []
def churn():
    try:
        while not stop.is_set():
            with userswap.Region("1MiB", resident="2MiB", store="memory:") as other:
                other.memory[:] = b"y" * other.size
                other.stats()
    except BaseException as error:
        errors.append(error)
def touch():
    offset = 0
    while not stop.is_set():
        region.memory[offset % region.size] = 0
        offset += 4096
threads = [threading.Thread(target=churn), threading.Thread(target=touch)]
for thread in threads: thread.start()
def own():
    with userswap.Region("1MiB", resident="2MiB") as mine:
        mine.memory[0] = 1
for turn in range(6):
    assert fork(own if turn % 3 == 2 else gc.collect) == 0
stop.set()
for thread in threads: thread.join()
assert not errors, errors
for offset in range(0, region.size, 4096):
    region.memory[offset] = 0
""")


def test_multiprocessing_by_fork() -> None:
    family("""
def work(number):
    with userswap.Region("1MiB", resident="2MiB") as mine:
        mine.memory[0] = number
        return mine.memory[0] * 2
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    assert pool.map(work, range(6)) == [0, 2, 4, 6, 8, 10]
process = context.Process(target=gc.collect)
process.start(); process.join()
assert process.exitcode == 0
""")


@pytest.mark.parametrize("options", ["", ", close_fds=False", ", preexec_fn=lambda: None"])
def test_subprocesses(options: str) -> None:
    family(f"""
code = "import os, sys; sys.exit(len(os.listdir('/proc/self/fd')))"
count = lambda: subprocess.run([sys.executable, "-c", code]{options}).returncode
with_region = count()
region.close()
assert with_region == count(), "a descriptor was inherited"
with userswap.Region("1MiB", resident="2MiB") as region: pass
region = userswap.Region("16MiB", resident="4MiB")
region.memory[:] = pattern * (region.size // 4096)
pager = region.stats().pager_pid
assert os.system("true") == 0
""")
