"""`userswap stat` and `userswap set`: what they show is so, what they set is granted."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from daemons import MIB, Daemon, Program, wait_for
from userswap.engine import listening
from userswap.engine.errors import ConfigError, PagerError, UserswapError
from userswap.engine.visitor import ask, look

CLIENT_KEYS = {"client", "region", "pid", "uid", "name", "regions"}
REGION_KEYS = {
    "client", "region", "name", "store", "size", "limit", "resident", "resident_bytes",
    "kept_bytes", "staging_bytes", "stored_bytes", "pool_bytes", "table_bytes", "faults",
    "faults_awaited", "p50_us", "p99_us", "awaited_p50_us", "awaited_p99_us",
    "over_budget_pages", "lost_pages", "store_full", "agent_late",
}  # fmt: skip

EMBEDDED = """
import os, sys, userswap
region = userswap.Region("8MiB", resident="4MiB", name="heap/one")
second = userswap.Region("1MiB", resident="2MiB", name="second")
region.memory[:] = os.urandom(region.size)
print(region.stats().pager_pid, flush=True)
for line in sys.stdin:
    print(region.stats().resident_limit, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own where pagers are found."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "userswap"


class Owner:
    """A program with a pager of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", EMBEDDED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pager = int(self.line())
        self.pid = self.process.pid

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def limit(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write("limit\n")
        self.process.stdin.flush()
        return int(self.line())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "userswap", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def shown(*words: str) -> list[dict[str, Any]]:
    done = run("stat", "--json", *words)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["schema"] == "userswap.stat/1"
    pagers: list[dict[str, Any]] = document["pagers"]
    return pagers


def test_a_programs_own_pager_shows_itself(folder: Path) -> None:
    assert shown() == []
    assert "no pager of this user" in run("stat").stdout
    owner = Owner()
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (pager,) = shown()
        assert (pager["kind"], pager["pid"]) == ("embedded", owner.pager)
        (client,) = pager["clients"]
        assert client.keys() == CLIENT_KEYS
        assert (client["pid"], client["uid"]) == (owner.pid, os.getuid())
        heap, second = client["regions"]
        assert heap.keys() == REGION_KEYS
        assert (heap["name"], heap["store"], heap["size"]) == ("heap/one", "ram:lz4", 8 * MIB)
        assert heap["limit"] == heap["resident"] == 4 * MIB
        assert 0 < heap["resident_bytes"] <= 4 * MIB
        assert heap["stored_bytes"] >= 4 * MIB
        assert second["stored_bytes"] == 0
        assert shown("--pid", str(owner.pid)) == shown()
        table = run("stat").stdout
        assert "embedded" in table
        assert "heap/one" in table
        assert "4MiB" in table
        nobody = run("stat", "--pid", str(os.getpid()))
        assert nobody.returncode == 1
        assert "serves process" in nobody.stderr
    finally:
        owner.kill()
    assert wait_for(lambda: not list(folder.iterdir()))


def test_its_budget_can_be_set(folder: Path) -> None:
    owner = Owner()
    try:
        for what in (f"{owner.pid}/heap/one", f"{owner.pid}/1"):
            for size in (2, 3):
                done = run("set", what, f"resident={size}MiB")
                assert (done.returncode, done.stderr) == (0, "")
                assert f"resident={size}MiB" in done.stdout
                assert owner.limit() == size * MIB
        assert json.loads(run("set", "--json", what, "resident=50%").stdout)["resident"] == 4 * MIB
        for words, code, message in (
            ((f"{owner.pid}/none", "resident=2MiB"), 2, "use one of heap/one (1), second (2)"),
            ((f"{owner.pid}/second", "resident=4KiB"), 2, "1MiB or more"),
            ((f"{owner.pid}/second", "weight=2"), 2, "alone"),
            ((str(owner.pid), "resident=2MiB"), 2, "alone"),
            (("1/second", "resident=2MiB"), 2, "no pager of this user serves process 1"),
            (("me/second", "resident=2MiB"), 2, "use CLIENT"),
            ((f"{owner.pid}/second", "resident"), 2, "resident=VALUE"),
            ((f"{owner.pid}/second", "colour=red"), 2, "resident=VALUE"),
            ((f"{owner.pid}/second", "resident=lots"), 2, "lots"),
        ):
            done = run("set", *words)
            assert (done.returncode, done.stdout) == (code, ""), words
            assert message in done.stderr, words
            assert len(done.stderr.splitlines()) == 1
        assert owner.limit() == 4 * MIB
    finally:
        owner.kill()


def test_what_killed_pagers_left_is_removed(folder: Path) -> None:
    owner = Owner()
    os.kill(owner.pager, signal.SIGKILL)
    owner.process.wait()
    owner.kill()
    assert [path.name for path in folder.iterdir()] == [f"{owner.pid}.sock"]
    (folder / "7.sock").symlink_to("/nowhere")
    assert shown() == []
    assert list(folder.iterdir()) == []


def test_a_folder_that_others_can_write_is_not_used(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(OSError, match="alone"):
        listening.make_run_folder(os.geteuid())
    owner = Owner()  # the program is served all the same
    assert owner.limit() == 4 * MIB
    owner.kill()
    assert list(folder.iterdir()) == []


def test_a_daemon_is_found_and_shows_its_clients(folder: Path) -> None:
    with Daemon(folder.parent / "s", "64MiB", "--client-min", "8MiB") as daemon:
        program = Program("page", daemon.path, "fast", 8 * MIB, 4 * MIB, 3)
        assert program.line() == "filled"
        (pager,) = shown()
        assert pager == shown("--socket", daemon.path)[0]
        assert (pager["kind"], pager["pid"]) == ("daemon", daemon.process.pid)
        assert (pager["resident"], pager["stores"]) == (64 * MIB, ["fast", "mem"])
        assert not pager["ending"]
        (client,) = pager["clients"]
        assert client.keys() == CLIENT_KEYS | {"min", "weight"}
        assert (client["pid"], client["min"], client["weight"]) == (program.process.pid, 8 * MIB, 1)
        (region,) = client["regions"]
        assert region.keys() == REGION_KEYS | {"min", "weight"}
        assert (region["store"], region["resident"]) == ("fast", 4 * MIB)

        pid = str(program.process.pid)
        assert run("set", pid, "weight=3", "min=6MiB").stdout == f"{pid}: weight=3, min=6MiB\n"
        assert run("set", f"{pid}/r3", "resident=6MiB", "weight=2").returncode == 0
        assert wait_for(lambda: daemon.regions()[0]["limit"] == 6 * MIB)
        (client,) = daemon.clients()
        assert (client["weight"], client["min"]) == (3, 6 * MIB)
        for what, change, message in (
            (pid, "min=1GiB", "more than all"),
            (pid, "weight=0", "use 0.01 to 100"),
            (pid, "weight=nan", "use 0.01 to 100"),
            (pid, "weight=much", "use a number"),
            (f"{pid}/r3", "resident=1", "resident=1: use 1MiB or more"),
            (f"{pid}/r3", "resident=0%", "1MiB or more"),
        ):
            done = run("set", what, change)
            assert done.returncode in (1, 2)
            assert message in done.stderr
        assert run("set", f"{pid}/r3", "resident=2MiB").returncode == 0
        assert json.loads(program.ask("stats"))["resident_limit"] == 2 * MIB
        assert program.ask("verify") == "good"
        program.tell("close")
        program.end()
        assert daemon.end() == 0
    assert shown() == []
    assert run("stat", "--socket", daemon.path).returncode == 1


def test_many_regions_come_in_parts(folder: Path) -> None:
    regions = 150
    code = """
import sys, userswap
made = [userswap.Region("1MiB", resident="2MiB", name=f"{n}-" + "x" * 100) for n in range(150)]
print("ready", flush=True)
sys.stdin.readline()
"""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        path = str(folder / f"{child.pid}.sock")
        assert ask(path, "stat")["more"]
        (client,) = look(path)["clients"]
        assert [region["region"] for region in client["regions"]] == [*range(1, regions + 1)]
    finally:
        child.kill()
        child.communicate()


def test_watching_ends_with_the_reader(folder: Path) -> None:
    owner = Owner()
    try:
        watching = subprocess.Popen(
            [sys.executable, "-P", "-m", "userswap", "stat", "--watch", "0.1", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout is not None
        for _ in range(3):
            assert len(json.loads(watching.stdout.readline())["pagers"]) == 1
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130
        watching.stdout.close()
    finally:
        owner.kill()


def test_a_pager_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userswap.engine.visitor.TIMEOUT_S", 0.2)
    owner = Owner()
    try:
        os.kill(owner.pager, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PagerError, match="has not answered"):
            look(str(folder / f"{owner.pid}.sock"))
        assert time.monotonic() - began < 20
    finally:
        os.kill(owner.pager, signal.SIGCONT)
        owner.kill()


def test_the_desk_serves_visitors_alone(folder: Path) -> None:
    owner = Owner()
    try:
        path = str(folder / f"{owner.pid}.sock")
        for operation in ("open", "agent", "close", "stats", "quiet", "nonsense"):
            with pytest.raises(UserswapError, match="hello comes first"):
                ask(path, operation)
        for after in ("x", None, [None, None], [[], 1], 7):
            with pytest.raises(ConfigError, match="bad request"):
                ask(path, "stat", after=after)
    finally:
        owner.kill()


def test_regions_may_end_while_somebody_looks(tmp_path: Path) -> None:
    """Programs are killed: what the daemon frees then is still looked at."""
    code = """
import sys, userswap
region = userswap.Region(
    "16MiB", resident="2MiB", store="fast", pager=sys.argv[1], mover="protect"
)
print("pages", flush=True)
while True:
    for at in range(0, region.size, 4096):
        region.memory[at] = at >> 12 & 255
"""
    failures: list[BaseException] = []
    with Daemon(tmp_path / "s", "64MiB") as daemon:
        over = threading.Event()

        def keep_looking() -> None:
            try:
                while not over.is_set():
                    daemon.clients()
            except BaseException as error:
                failures.append(error)

        lookers = [threading.Thread(target=keep_looking) for _ in range(2)]
        for looker in lookers:
            looker.start()
        for _ in range(12):
            program = subprocess.Popen(
                [sys.executable, "-P", "-c", code, daemon.path], stdout=subprocess.PIPE
            )
            assert program.stdout is not None
            assert program.stdout.readline() == b"pages\n"
            time.sleep(0.2)
            program.kill()
            program.communicate()
        over.set()
        for looker in lookers:
            looker.join()
        assert not failures, failures
        assert wait_for(lambda: not daemon.clients())
        assert daemon.end() == 0
