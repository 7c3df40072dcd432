"""A pager that gets no more threads: no fault waits for one, and what was held is freed."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import MIB, Daemon, programs, wait_for

HAND_OVER = """
import sys, userswap
first = userswap.Region("8MiB", resident="2MiB", store="memory:")
for page in range(2048):
    first.memory[page * 4096] = page & 255
print(first.stats().pager_pid, flush=True)
sys.stdin.readline()
try:
    userswap.Region("8MiB", resident="2MiB", store="ram:lz4")
except userswap.UserswapError as error:
    print(error, flush=True)
sys.stdin.readline()
assert all(first.memory[page * 4096] == page & 255 for page in range(2048))
print("good", flush=True)
sys.stdin.readline()
with userswap.Region("8MiB", resident="2MiB", store="ram:lz4") as second:
    second.memory[0] = 1
    assert all(first.memory[page * 4096] == page & 255 for page in range(2048))
print(first.stats().fault_path, flush=True)
"""


class ThreadGroup:
    """A group of processes whose threads are counted; skips where there can be none."""

    def __init__(self, name: str) -> None:
        root = Path("/sys/fs/cgroup")
        if (root / "cgroup.controllers").exists():
            with contextlib.suppress(OSError):
                (root / "cgroup.subtree_control").write_text("+pids")
        else:
            root /= "pids"
        self.folder = root / name
        try:
            self.folder.mkdir()
            self.limit("max")
        except OSError as error:
            self.remove()
            pytest.skip(f"privileged: no group of processes can be made here ({error})")

    def take(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def limit(self, threads: str) -> None:
        (self.folder / "pids.max").write_text(threads)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            wait_for(lambda: not (self.folder / "cgroup.procs").read_text(), 20)
            self.folder.rmdir()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[ThreadGroup]:
    made = ThreadGroup(f"userswap-{os.getpid()}-{tmp_path.name}")
    yield made
    made.remove()


def test_the_loop_serves_on_where_the_server_gets_no_thread(group: ThreadGroup) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HAND_OVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            group.take(int(program.stdout.readline()))
            group.limit("0")
            program.stdin.write("\n")
            program.stdin.flush()
            assert "temporarily unavailable" in program.stdout.readline()
            program.stdin.write("\n")
            program.stdin.flush()
            ready, _, _ = select.select([program.stdout], [], [], 60)  # a fault may hang
            assert ready
            assert program.stdout.readline() == "good\n"
            group.limit("max")
            assert program.communicate("\n", timeout=30)[0] == "native\n"
            assert program.returncode == 0
        finally:
            program.kill()


def test_a_client_that_ends_while_no_thread_is_to_be_had(
    tmp_path: Path, group: ThreadGroup
) -> None:
    with (
        Daemon(tmp_path / "s", "64MiB") as daemon,
        programs(1, "page", daemon.path, "mem", 8 * MIB, 4 * MIB) as (staying,),
    ):
        assert staying.line() == "filled"
        before, threads = daemon.descriptors(), daemon.status("Threads")
        with programs(1, "page", daemon.path, "mem", 8 * MIB, 4 * MIB) as (killed,):
            assert killed.line() == "filled"
            group.take(daemon.process.pid)
            group.limit("0")
            killed.kill()
            assert staying.ask("verify") == "good"
            group.limit("max")
        assert daemon.settled(before) <= before
        assert wait_for(lambda: daemon.status("Threads") <= threads + 2, 20)  # those of a pool
        assert len(daemon.clients()) == 1
        assert daemon.end() == 0
        assert staying.ask("verify") == "good"
