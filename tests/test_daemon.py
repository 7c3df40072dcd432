"""One pager for many programs: what each is promised holds, whatever the others do."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from children import good
from daemons import MIB, NOBODY, PAGE, Daemon, Program, programs, wait_for
from enemies import HOSTILE, Enemy
from userswap import Region
from userswap.engine.errors import ConfigError, PagerError, UnsupportedError


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "s", "64MiB", "--user-clients", "16", "--user-regions", "32") as made:
        yield made


def test_a_region_is_paged_by_a_daemon(daemon: Daemon) -> None:
    for store in ("fast", "mem"):
        program = Program("page", daemon.path, store, 16 * MIB, 4 * MIB, 7)
        assert program.line() == "filled"
        assert program.ask("verify") == "good"
        assert program.ask("discard") == "good"
        stats = json.loads(program.ask("stats"))
        assert stats["store"] == store
        assert stats["pager_pid"] == daemon.process.pid
        assert stats["resident_limit"] == 4 * MIB
        assert stats["evicted_pages"] + stats["dropped_pages"] > 3000
        assert stats["lost_pages"] == 0
        program.tell("close")
        program.end()
    assert daemon.end() == 0
    assert not Path(daemon.path).exists()
    assert not Path(f"{daemon.path}.lock").exists()


def test_several_pagers_in_one_process(daemon: Daemon, tmp_path: Path) -> None:
    with Daemon(tmp_path / "other", "32MiB") as other:
        good(
            """
import sys, userswap
sizes = dict(size="4MiB", resident="2MiB")
regions = [
    userswap.Region(**sizes),
    userswap.Region(**sizes, pager=sys.argv[1], store="fast"),
    userswap.Region(**sizes, pager=sys.argv[2], store="mem"),
    userswap.Region(**sizes, pager=sys.argv[1], store="mem"),
]
for number, region in enumerate(regions):
    for page in range(1024):
        region.memory[page * 4096 : page * 4096 + 2] = bytes([number, page % 256])
for number, region in enumerate(regions):
    for page in range(1024):
        assert bytes(region.memory[page * 4096 : page * 4096 + 2]) == bytes([number, page % 256])
assert len({region.stats().pager_pid for region in regions}) == 3
for region in reversed(regions):
    region.close()
""",
            daemon.path,
            other.path,
        )


def test_what_a_program_cannot_have(daemon: Daemon) -> None:
    def region(**different: object) -> Region:
        usual = {"resident": "4MiB", "pager": daemon.path, "store": "fast"}
        return Region(8 * MIB, **{**usual, **different})  # type: ignore[arg-type]

    for store in ("ram:lz4", "file:/etc/passwd", "/etc/passwd", "FAST", "object:x"):
        with pytest.raises(ConfigError, match="unknown store of this pager"):
            region(store=store)
    with pytest.raises(ConfigError, match="serves faults natively"):
        region(fault_path="asyncio")
    with pytest.raises(ConfigError, match="name of a store of the pager"):
        region(store=dict)
    with pytest.raises(PagerError, match="no pager answers at"):
        region(pager=daemon.path + "x")
    with pytest.raises(ConfigError, match="path of a daemon's socket"):
        region(pager="")
    assert wait_for(lambda: not daemon.clients())


@pytest.mark.parametrize("harm", [each.__name__ for each in HOSTILE])
def test_who_means_harm_harms_himself(daemon: Daemon, harm: str) -> None:
    with programs(2, "touch", daemon.path, "fast", 8 * MIB, 3 * MIB) as victims:
        for victim in victims:
            assert victim.line() == "filled"
        before = daemon.descriptors()
        Program(f"enemies.{harm}", daemon.path).end()
        assert daemon.settled(before) == before
        for victim in victims:
            per_second, worst = map(float, victim.ask("stop").split())
            assert per_second > 50
            assert worst < 5
            victim.tell("end")
            victim.end()
    assert daemon.process.poll() is None
    assert daemon.end() == 0


def test_a_stopped_client_holds_nobody_up(daemon: Daemon) -> None:
    with programs(2, "touch", daemon.path, "fast", 8 * MIB, 3 * MIB) as (stopped, other):
        assert stopped.line() == other.line() == "filled"
        stopped.process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        assert float(other.ask("stop").split()[0]) > 50
        assert len(daemon.clients()) == 2
        other.tell("end")
        other.end()
        stopped.process.send_signal(signal.SIGCONT)
        assert stopped.ask("stop")
        stopped.tell("end")
        stopped.end()


def test_thirty_two_programs(tmp_path: Path) -> None:
    total = 160 * MIB
    with (
        Daemon(tmp_path / "s", str(total), "--client-min", "4MiB") as daemon,
        programs(32, "page", daemon.path, "fast", 8 * MIB, 8 * MIB) as many,
    ):
        for program in many:
            assert program.line() == "filled"
        for program in many:
            program.tell("verify")
        for program in many:
            assert program.line() == "good"
        regions = daemon.regions()
        assert len(regions) == 32
        assert sum(region["limit"] for region in regions) <= total
        assert min(region["limit"] for region in regions) >= 4 * MIB
        kept = sum(region["resident_bytes"] + region["kept_bytes"] for region in regions)
        assert kept <= total
        assert sum(region["lost_pages"] for region in regions) == 0
        for program in many:
            program.tell("close")
        for program in many:
            program.end()
        assert daemon.end() == 0


def test_programs_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    rnd = random.Random(seed)
    with (
        Daemon(tmp_path / "s", "64MiB", "--client-min", "4MiB") as daemon,
        programs(1, "page", daemon.path, "mem", 8 * MIB, 4 * MIB) as (bystander,),
    ):
        assert bystander.line() == "filled"
        before = daemon.descriptors()
        for turn in range(6):
            with programs(4, "open_many", daemon.path, ("fast", "mem")[turn % 2], MIB, MIB) as many:
                time.sleep(rnd.uniform(0.05, 0.7))
                for program in many:
                    program.kill()
        assert daemon.settled(before) == before
        assert len(daemon.clients()) == 1
        assert bystander.ask("verify") == "good"
        bystander.tell("close")
        bystander.end()


CYCLES = """
import sys, time, userswap

def open_region():
    for _ in range(200):
        try:
            return userswap.Region("4MiB", resident="2MiB", pager=sys.argv[1], store="fast")
        except userswap.UserswapError as error:
            assert "the most that one may have" in str(error)  # the last ones are still ending
            time.sleep(0.05)

for number in range(int(sys.argv[2])):
    with open_region() as region:
        for page in range(0, 1024, 2):
            region.memory[page * 4096] = 1
        assert region.memory[0] == 1
"""


def test_two_hundred_clients_leave_nothing(daemon: Daemon) -> None:
    idle = daemon.descriptors()
    good(CYCLES, daemon.path, "100", timeout=100)  # as many at once as there may be, on any machine
    assert daemon.settled(idle) == idle
    before = {name: daemon.status(name) for name in ("RssAnon", "VmSize", "Threads")}
    good(CYCLES, daemon.path, "200", timeout=100)
    assert daemon.settled(idle) == idle
    assert daemon.status("RssAnon") < before["RssAnon"] + 6144  # KiB: it comes and goes
    assert daemon.status("VmSize") < before["VmSize"] + (1 << 20)
    assert daemon.status("Threads") <= before["Threads"] + 4


def test_memory_goes_to_who_needs_it_and_minimums_hold(tmp_path: Path) -> None:
    with (
        Daemon(tmp_path / "s", "64MiB", "--client-min", "16MiB") as daemon,
        programs(3, "touch", daemon.path, "fast", 48 * MIB, 48 * MIB) as (one, two, three),
    ):
        for program in (one, two, three):
            assert program.line() == "filled"

        def shared() -> bool:
            limits = [region["limit"] for region in daemon.regions()]
            return len(limits) == 3 and min(limits) >= 16 * MIB and max(limits) <= 28 * MIB

        assert wait_for(shared), daemon.regions()
        command = [sys.executable, "-P", "-m", "userswap", "set", "--socket", daemon.path]
        change = [f"{two.process.pid}", "weight=4"]
        subprocess.run([*command, *change], check=True, capture_output=True)

        def weighed() -> bool:
            limits = {client["pid"]: client["regions"][0]["limit"] for client in daemon.clients()}
            return bool(
                limits[two.process.pid] > 28 * MIB and min(limits.values()) >= 16 * MIB - PAGE
            )

        assert wait_for(weighed), daemon.regions()
        refused = Program("page", daemon.path, "fast", 64 * MIB, 64 * MIB, 9)
        fourth = Program("page", daemon.path, "fast", 64 * MIB, 64 * MIB, 10)
        failures = []
        for program in (refused, fourth):
            with contextlib.suppress(AssertionError):
                program.line()
            if program.process.poll() is not None:
                failures.append(program)
        assert len(failures) == 1  # four minimums fill the budget, a fifth would break them
        for program in (one, two, three):
            assert program.ask("stop")
            program.tell("end")
            program.end()
        for program in (refused, fourth):
            program.kill()


def test_lent_memory_comes_back(daemon: Daemon) -> None:
    with programs(1, "touch", daemon.path, "fast", 60 * MIB, 60 * MIB) as (first,):
        assert first.line() == "filled"
        assert wait_for(lambda: daemon.regions()[0]["limit"] >= 56 * MIB)
        with programs(1, "touch", daemon.path, "fast", 60 * MIB, 60 * MIB) as (second,):
            assert second.line() == "filled"
            assert wait_for(lambda: min(each["limit"] for each in daemon.regions()) >= 28 * MIB)
            second.ask("stop")
            second.tell("end")
            second.end()
        assert wait_for(lambda: daemon.regions()[0]["limit"] >= 56 * MIB)
        first.ask("stop")
        first.tell("end")
        first.end()


@pytest.mark.privileged
def test_two_users() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with Daemon(f"{folder}/s", "64MiB", "--mode", "0666", "--user-clients", "2") as daemon:
            mine = Program("page", daemon.path, "fast", 8 * MIB, 3 * MIB, 1)
            theirs = Program("page_as_user", daemon.path, "fast", 8 * MIB, 3 * MIB, 2)
            assert mine.line() == theirs.line() == "filled"
            assert {client["uid"] for client in daemon.clients()} == {0, NOBODY}
            visitor = Program("visit_as_user", daemon.path, theirs.process.pid)
            assert [client["uid"] for client in json.loads(visitor.line())] == [NOBODY]
            assert "only the pager's own user" in visitor.line()
            visitor.end()
            for program in (mine, theirs):
                assert program.ask("verify") == "good"
                assert program.ask("verify") == "good"
            stats = json.loads(theirs.ask("stats"))
            assert stats["evicted_pages"] + stats["dropped_pages"] > 1000
            assert daemon.end() == 0
            for program in (mine, theirs):
                assert program.ask("verify") == "good"
                program.tell("close")
                program.end()


@pytest.mark.privileged
def test_a_pager_of_a_third_user_is_not_trusted() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = f"{folder}/s"
        false = Program("false_pager", path)
        try:
            assert false.line() == "ready"
            with pytest.raises(UnsupportedError, match=f"runs as user {NOBODY}"):
                Region(MIB, resident=2 * MIB, pager=path, store="fast")
        finally:
            false.kill()


def test_an_enemy_can_be_a_client_too(daemon: Daemon) -> None:
    enemy = Enemy(daemon.path)
    assert len(enemy.serve()) == 3  # the channel and two pipes, no table and no pool
    enemy.socket.close()
    os.close(enemy.uffd)
