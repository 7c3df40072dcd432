"""How a daemon begins and ends: its socket, systemd, and the regions that go back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import MIB, PAGE, Daemon, Program, programs, wait_for
from userswap import Region
from userswap.engine import listening
from userswap.engine.errors import ConfigError, UserswapError


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "s", "64MiB", "--user-clients", "16", "--user-regions", "32") as made:
        yield made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_regions_go_back_to_their_programs(daemon: Daemon, number: int) -> None:
    with programs(4, "page", daemon.path, "fast", 12 * MIB, 3 * MIB) as many:
        for program in many:
            assert program.line() == "filled"
        assert daemon.end(number) == 0
        assert not Path(daemon.path).exists()
        for program in many:
            assert program.ask("verify") == "good"
            assert json.loads(program.ask("stats"))["released"] is True
            assert program.ask("discard") == "good"
            program.tell("close")
            program.end()


@pytest.mark.parametrize("store", ["fast", "mem"])
def test_the_end_under_load(daemon: Daemon, store: str) -> None:
    with programs(4, "touch", daemon.path, store, 12 * MIB, 3 * MIB) as many:
        for program in many:
            assert program.line() == "filled"
        assert daemon.end() == 0
        for program in many:
            assert program.ask("stop")
            program.tell("end")
            program.end()


@pytest.mark.parametrize("how", ["close", "kill"])
def test_a_region_that_ends_while_it_waits_for_its_turn(tmp_path: Path, how: str) -> None:
    """Regions are brought in one at a time; the last in the row may be gone when its turn comes."""
    slow = ("--store", "slow=delay?read=200ms::memory:")
    with (
        Daemon(tmp_path / "s", "64MiB", *slow) as daemon,
        programs(1, "page", daemon.path, "slow", 8 * MIB, 4 * MIB) as (first,),
        programs(1, "page", daemon.path, "fast", 16 * MIB, 4 * MIB) as (second,),
    ):
        assert first.line() == second.line() == "filled"
        daemon.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: json.loads(first.ask("stats"))["readahead_pages"] > 0)
        if how == "kill":
            second.kill()
        else:
            second.tell("close")
            second.end()
        assert daemon.process.wait(60) == 0
        assert first.ask("verify") == "good"
        first.tell("close")
        first.end()


def test_what_does_not_fit_is_served_on(tmp_path: Path) -> None:
    with (
        memory_group(tmp_path) as group,
        Daemon(tmp_path / "s", "64MiB") as daemon,
        programs(2, "page", daemon.path, "fast", 32 * MIB, 4 * MIB) as (bound, free),
    ):
        group.take(bound.process.pid)
        assert bound.line() == free.line() == "filled"
        group.leave_room(8 * MIB)
        daemon.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: "let go of" in daemon.log.read_text())
        assert wait_for(lambda: "memory has room for" in daemon.log.read_text())
        assert json.loads(free.ask("stats"))["released"] is True
        assert json.loads(bound.ask("stats"))["released"] is False
        assert bound.ask("verify") == free.ask("verify") == "good"
        text = daemon.log.read_text()
        assert f"[{bound.process.pid}]/r0 with" in text
        daemon.process.send_signal(signal.SIGTERM)  # again: it only says so again
        assert wait_for(lambda: daemon.log.read_text().count("ending, once") >= 2)
        with pytest.raises(UserswapError, match="takes no new clients"):
            Region(MIB, resident=2 * MIB, pager=daemon.path, store="fast")
        assert bound.ask("verify") == "good"
        bound.tell("close")
        bound.end()
        assert daemon.process.wait(20) == 0
        free.tell("close")
        free.end()


class MemoryGroup:
    """A memory group of its own; skips where there can be none."""

    def __init__(self, name: str) -> None:
        root = Path("/sys/fs/cgroup")
        controllers = root / "cgroup.controllers"
        self._files = ("memory.usage_in_bytes", "memory.limit_in_bytes")
        if controllers.exists():
            self._files = ("memory.current", "memory.max")
            with contextlib.suppress(OSError):
                (root / "cgroup.subtree_control").write_text("+memory")
        self.folder = (root if controllers.exists() else root / "memory") / name
        try:
            self.folder.mkdir()
            self.leave_room(1 << 40)
        except OSError as error:
            self.remove()
            pytest.skip(f"privileged: no memory group can be made here ({error})")

    def take(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def leave_room(self, size: int) -> None:
        used, limit = (self.folder / name for name in self._files)
        limit.write_text(str((int(used.read_text()) + size) // PAGE * PAGE))

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            wait_for(lambda: not (self.folder / "cgroup.procs").read_text())
            self.folder.rmdir()


@contextlib.contextmanager
def memory_group(tmp_path: Path) -> Iterator[MemoryGroup]:
    group = MemoryGroup(f"userswap-{os.getpid()}-{tmp_path.name}")
    try:
        yield group
    finally:
        group.remove()


def test_a_daemon_that_is_killed(daemon: Daemon) -> None:
    with programs(2, "page", daemon.path, "fast", 8 * MIB, 3 * MIB) as many:
        for program in many:
            assert program.line() == "filled"
        daemon.process.kill()
        daemon.process.wait()
        for program in many:
            assert program.process.wait(20) == -signal.SIGABRT
            assert "the pager died" in program.process.communicate()[1]
    with Daemon(daemon.path, "64MiB") as next_one:  # what is left is no obstacle
        assert next_one.end() == 0


# --- the socket ---


def test_the_socket_is_its_owners(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Daemon(tmp_path / "s", "64MiB") as daemon:
            assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o600
            assert stat.S_IMODE(os.stat(f"{daemon.path}.lock").st_mode) == 0o600
            with pytest.raises(ConfigError, match="a pager serves it already"):
                listening.listen(daemon.path)
            assert daemon.end() == 0
    finally:
        os.umask(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.log", "userswap"]


def test_what_is_in_the_way(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="something else"):
        listening.listen(path)
    assert Path(path).read_text() == "precious"
    os.unlink(path)
    foreign = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    foreign.bind(path)
    foreign.listen()
    with pytest.raises(ConfigError, match="somebody else listens"):
        listening.listen(path)
    foreign.close()
    listener = listening.listen(path)  # nobody listens any more: replaced
    listener.close()
    assert list(tmp_path.iterdir()) == []
    for wrong in (str(tmp_path / ("x" * 120)), str(tmp_path / "no" / "where")):
        with pytest.raises(ConfigError):
            listening.listen(wrong)


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    inbox.bind(str(tmp_path / "notify"))
    inbox.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    with Daemon(tmp_path / "s", "64MiB") as daemon:
        told = [inbox.recv(4096).decode() for _ in range(4)]
        assert told[0] == "READY=1\nSTATUS=serving"
        assert set(told[1:]) == {"WATCHDOG=1"}
        assert daemon.end() == 0
        inbox.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(inbox.recv(4096).decode())
        assert "STOPPING=1" in told
    inbox.close()


def test_systemds_socket_is_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    serve = ["-P", "-m", "userswap", "serve", "--resident", "32MiB", "--store", "fast=ram:lz4"]
    start = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", start, str(listener.fileno()), *serve],
        env={**os.environ, "LISTEN_FDS": "1", "XDG_RUNTIME_DIR": str(tmp_path)},
        pass_fds=[listener.fileno()],
        stderr=subprocess.PIPE,
    )
    try:
        program = Program("page", path, "fast", 4 * MIB, 2 * MIB, 1)
        assert program.line() == "filled"
        program.tell("close")
        program.end()
        child.terminate()
        assert child.wait(20) == 0
        assert Path(path).exists()  # it is systemd's
    finally:
        child.kill()
        child.communicate()
        listener.close()


def test_the_unit_is_printed() -> None:
    command = [sys.executable, "-P", "-m", "userswap", "serve", "--print-unit"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Type=notify" in done.stdout
    assert "SendSIGKILL=no" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--resident SIZE"),
        (["--resident", "64MiB"], "--store NAME=URL"),
        (["--resident", "64MiB", "--store", "fast"], "NAME=URL"),
        (["--resident", "64MiB", "--store", "a=ram:lz4", "--store", "a=ram:"], "already"),
        (["--resident", "64MiB", "--store", "a=nope:"], "unknown store"),
        (["--resident", "1MiB", "--store", "a=ram:"], "use at least"),
        (["--resident", "64MiB", "--store", "a=ram:", "--mode", "0077"], "--mode"),
        (["--resident", "64MiB", "--store", "a=ram:", "--user-clients", "0"], "1 or more"),
    ],
)
def test_what_cannot_be_served(options: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "userswap", "serve", "--socket", str(tmp_path / "s")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
