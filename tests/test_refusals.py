"""What cannot be is refused, by the right error, in words that name the cause and the remedy."""

from __future__ import annotations

import pytest

from children import good
from support import run_child

REFUSE = """
import ctypes, mmap, os, resource, sys, userswap
from userswap.engine import client, probe, region

def refuse(kind, *words, size="4MiB", **options):
    options = {"resident": "4MiB", **options}
    try:
        made = userswap.Region(size, **options)
    except userswap.UserswapError as error:
        assert type(error) is kind, (type(error), error)
        text = str(error)
        assert "\\n" not in text and len(text) < 400, text
        for word in words:
            assert word in text, f"{word!r} is not in: {text}"
    else:
        raise AssertionError(f"{size} {options} was accepted: {made}")

def works(**how):
    with userswap.Region("4MiB", resident="2MiB", **how) as made:
        made.memory[:] = b"w" * made.size
        assert bytes(made.memory) == b"w" * made.size

Config, Unsupported = userswap.ConfigError, userswap.UnsupportedError
"""
# A user without privileges who can still read the interpreter, wherever it is installed: the
# search right is kept, through exec too, and no other.
NOBODY = """
def become_nobody(dumpable):
    libc = ctypes.CDLL(None, use_errno=True)
    READ_SEARCH = 1 << 2
    os.setgroups([]); os.setgid(65534)
    assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    os.setuid(65534)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(READ_SEARCH, READ_SEARCH, READ_SEARCH)
    assert libc.capset(header, data) == 0
    assert libc.prctl(47, 2, 2, 0, 0) == 0  # PR_CAP_AMBIENT, RAISE, CAP_DAC_READ_SEARCH
    assert libc.prctl(4, dumpable, 0, 0, 0) == 0  # PR_SET_DUMPABLE
"""


def refused(code: str, *, timeout: float = 40) -> None:
    good(f"{REFUSE}\n{code}\n", timeout=timeout)


def test_arguments_that_cannot_be_meant() -> None:
    refused("""
refuse(Config, "size", "'12MB'", "MiB", size="12MB")
refuse(Config, "size", size="lots")
refuse(Config, "size", size=-5)
refuse(Config, "size", "16TiB", size=0)
refuse(Config, "size", "16TiB", size="17TiB")
refuse(Config, "resident", resident="12 parsecs")
refuse(Config, "resident", "minimum", "1MiB", "32KiB", "1 threads", resident="1MiB")
refuse(Config, "resident", "minimum", resident="10%")
refuse(Config, "store", "'rma:lz4'", "ram", store="rma:lz4")
refuse(Config, "store", "memory", "ram", store="nothing:like/it")
refuse(Config, "store", "'lz5'", store="ram:lz5")
refuse(Config, "store", store="ram:lz4?limit=12MB")
refuse(Config, "store", store="ram:lz4?colour=red")
refuse(Config, "store", store="memory:target")
refuse(Config, "store=None", "'ram:lz4'", store=None)
refuse(Config, "store=b'ram:lz4'", "'ram:lz4'", store=b"ram:lz4")
refuse(Config, "did you mean 'ram:lz4' or 'ram:zstd'?", store="ram")
refuse(Config, "did you mean 'ram:zstd'?", store="zstd")
refuse(Config, "did you mean 'memory:'?", store="memory")
refuse(Config, "fault_path", "native", "asyncio", fault_path="quick")
refuse(Config, "on_full", "grow", "stall", on_full="panic")
refuse(Config, "on_pager_death", "abort", "block", on_pager_death="pray")
refuse(Config, "placement", "auto", "same", "other", "none", placement="moon")
refuse(Config, "mover", "auto", "move", "protect", mover="moon")
refuse(Config, "prefetch", "'stream'", "streams", prefetch="stream")
refuse(Config, "user_mode_only", user_mode_only="perhaps")
assert issubclass(Config, ValueError)
import threading
assert not [thread for thread in threading.enumerate() if thread.name == "userswap-answers"]
works()
""")


def test_a_budget_counts_threads() -> None:
    refused("""
import threading
stop = threading.Event()
for _ in range(63):
    threading.Thread(target=stop.wait, daemon=True).start()
refuse(Config, "resident", "minimum of 3MiB", "64 threads", resident="2MiB")
with userswap.Region("4MiB", resident="3MiB") as made:
    # The engine's own threads do not count.
    refuse(Config, "minimum of 3MiB", "64 threads", resident="2MiB")
    try:
        made.resize_resident("1MiB")
    except Config as error:
        assert "minimum" in str(error)
    else:
        raise AssertionError("resize")
    assert made.resident == made.stats().resident_limit == 3 << 20
stop.set()
""")


def test_regions_of_one_process_agree() -> None:
    refused("""
first = userswap.Region("4MiB", resident="2MiB", on_pager_death="block")
for other in ({"fault_path": "asyncio"}, {}, {"user_mode_only": True}, {"placement": "other"}):
    name = next(iter(other), "on_pager_death")
    refuse(Config, f"{name}=", "share a pager", "close them first",
           **{"on_pager_death": "block" if other else "abort", **other})
same = userswap.Region("4MiB", resident="2MiB", on_pager_death="block")
first.close(); same.close()
works()
userswap.Region("4MiB", resident="2MiB", fault_path="asyncio").close()
""")


def test_address_space() -> None:
    refused("""
# No memory at all of that kind: the first region of a process asks for the least.
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, hard))
refuse(Unsupported, "3GiB", "RLIMIT_AS is 2GiB", "ulimit -v", size="3GiB")
works()  # the pager raises the limit for itself
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 8 << 30))
refuse(Unsupported, "RLIMIT_AS", "8GiB", "ulimit -Hv")
""")


def test_strict_overcommit() -> None:
    refused("""
real = probe.read_number
probe.read_number = lambda path: 2 if "overcommit_memory" in str(path) else real(path)
class Fails(region._Mapping):
    def __new__(cls, *arguments, **options):
        raise OSError(12, "Cannot allocate memory")
ordinary, region._Mapping = region._Mapping, Fails
refuse(Unsupported, "4MiB", "Cannot allocate memory", "vm.overcommit_memory is 2", "sysctl")
region._Mapping = ordinary
works()
""")


def test_mergeable_memory() -> None:
    refused("""
libc = ctypes.CDLL(None, use_errno=True)
made = userswap.Region("4MiB", resident="2MiB")
if libc.prctl(67, 1, 0, 0, 0) == 0:  # PR_SET_MEMORY_MERGE
    refuse(Unsupported, "KSM", "PR_SET_MEMORY_MERGE")
    made.close()
    refuse(Unsupported, "KSM", "PR_SET_MEMORY_MERGE")
    assert libc.prctl(67, 0, 0, 0, 0) == 0
    works()
else:  # a kernel without KSM
    client.lib = region.lib = type("Merging", (), {
        "us_probe_merging": staticmethod(lambda: 1),
        "__getattr__": lambda self, name: getattr(probe.lib, name),
    })()
    refuse(Unsupported, "KSM", "PR_SET_MEMORY_MERGE")
""")


@pytest.mark.privileged
def test_locked_and_huge_memory() -> None:
    refused("""
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mlockall(2) == 0  # MCL_FUTURE
refuse(Unsupported, "locks the memory", "MCL_FUTURE")
assert libc.munlockall() == 0
works()
ordinary = region.NORESERVE
region.NORESERVE |= 0x40000  # MAP_HUGETLB
refuse(Unsupported, "hugetlb")
region.NORESERVE = ordinary
works()
""")


def test_kernels_and_machines() -> None:
    refused("""
import dataclasses, errno
facts = probe.gather()
def pretend(**changes):
    probe.gather = lambda: dataclasses.replace(facts, **changes)
pretend(page_size=65536)
refuse(Unsupported, "65536", "4096")
pretend(features=facts.features & ~probe.FEATURE_MOVE, kernel="6.1.0-test", move=errno.ENOTTY)
refuse(Unsupported, "6.1.0-test", "Linux 6.8", 'Region(mover="protect")')
sys.stderr = None  # where its limit would be told
works(mover="protect")
sys.stderr = sys.__stderr__
pretend(device=errno.ENOENT, syscall=errno.ENOSYS, user_mode=errno.ENOSYS, seccomp=0,
        unprivileged_userfaultfd=None)
refuse(Unsupported, "CONFIG_USERFAULTFD")
pretend(device=errno.EACCES, syscall=errno.EPERM, capabilities=0, user=1000, container=False)
refuse(Unsupported, "setfacl -m u:1000:rw", "vm.unprivileged_userfaultfd=1",
       "user_mode_only=True")
probe.gather = lambda: facts
works()
""")


def test_no_descriptor_left() -> None:
    refused("""
taken = []
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
for spare in range(0, 24, 2):
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(spare):
        os.close(taken.pop())
    try:
        userswap.Region("4MiB", resident="2MiB").close()
        break
    except (userswap.UserswapError, OSError) as error:
        assert "ulimit -n" in str(error) or "open files" in str(error), (spare, repr(error))
else:
    raise AssertionError("24 descriptors are not enough")
for descriptor in taken: os.close(descriptor)
before = len(os.listdir("/proc/self/fd"))
works()
assert len(os.listdir("/proc/self/fd")) == before <= 8, os.listdir("/proc/self/fd")
""")


def test_a_pager_that_cannot_start_is_named() -> None:
    child = run_child(f"""{REFUSE}
before = len(os.listdir("/proc/self/fd"))
client.PLACEMENTS = (None,) * 9 + client.PLACEMENTS  # what the pager cannot understand
path = sys.path[:]
sys.path[:] = ["/nothing/here"]
os.environ["PYTHONHOME"] = "/nothing/here"
refuse(userswap.PagerError, "ended as it started", "status 1", sys.executable, "standard error")
sys.executable = "/does/not/exist"
refuse(userswap.PagerError, "cannot be started", "/does/not/exist")
assert len(os.listdir("/proc/self/fd")) == before
""")
    assert child.returncode == 0, child.stderr


@pytest.mark.privileged
def test_an_ordinary_user_is_told_what_would_help() -> None:
    refused(f"""{NOBODY}
assert not probe.read_number("/proc/sys/vm/unprivileged_userfaultfd")
become_nobody(1)
refuse(Unsupported, "/dev/userfaultfd: EACCES", "setfacl", "user_mode_only=True")
""")


@pytest.mark.privileged
@pytest.mark.parametrize("dumpable", [0, 1])
@pytest.mark.parametrize("store", ["ram:lz4", "memory:"])
def test_user_mode_only(store: str, dumpable: int) -> None:
    # A process that has given up root is not dumpable, and then no pager may read its memory.
    refused(f"""{NOBODY}
become_nobody({dumpable})
PAGE = 4096
with userswap.Region("16MiB", resident="2MiB", store={store!r}, user_mode_only=True) as made:
    for page in range(made.size // PAGE):
        made.memory[page * PAGE] = page % 251 + 1
        made.memory[page * PAGE + 100] = page % 13
    for page in range(made.size // PAGE):
        assert made.memory[page * PAGE] == page % 251 + 1, page
        assert made.memory[page * PAGE + 100] == page % 13, page
    stats = made.stats()
    assert stats.evicted_pages + stats.dropped_pages >= 3000 and stats.lost_pages == 0, stats
    assert stats.resident_bytes <= 2 << 20
    made.flush()
    reading, writing = os.pipe()
    assert made.stats().pages["STORED"] > 1000
    try:
        os.write(writing, made.memory[: 10 * PAGE])  # a system call on memory that is out
    except OSError as error:
        assert error.errno == 14, error  # EFAULT
    else:
        raise AssertionError("a system call reached memory that was paged out")
    made.memory[0] = made.memory[0]
    assert os.write(writing, made.memory[:100]) == 100  # and on memory that is in
""")
