"""Processes that stop and die: the pager, its client, the agent. No zeros, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import life_scenarios
from proof import STUCK, Child, call, check, soon
from rawcalls import continue_thread, stop_thread
from userswap.bench import control_group

pytestmark = pytest.mark.privileged  # the kernel itself faults on these pages
MIB = 1 << 20
DIED = "userswap: the pager died"
BOTH_STORES = pytest.mark.parametrize("store", ["ram:lz4", "memory:"])


def ready(child: Child) -> tuple[int, int]:
    """The pager and the agent of a scenario that has begun."""
    pager, agent = map(int, child.said("ready").split())
    return pager, agent


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_pager_is_killed_and_its_client_aborts(seed: int) -> None:
    for number in range(6):
        source = call(
            life_scenarios.read_for_ever,
            seed=seed,
            store=("ram:lz4", "memory:")[number % 2],
            path=("native", "asyncio")[number // 2 % 2],
            sleeps=number == 4,
        )
        with Child(source) as child:
            pager, _ = ready(child)
            time.sleep(random.Random(seed + number).random() * 0.2)
            os.kill(pager, signal.SIGKILL)
            assert child.wait(20) == -signal.SIGABRT
            assert child.err.count(DIED) == 1
            assert child.left_over() == []


@BOTH_STORES
def test_the_pager_is_killed_and_its_client_blocks(store: str, seed: int) -> None:
    source = call(life_scenarios.read_for_ever, seed=seed, store=store, death="block")
    with Child(source) as child:
        pager, _ = ready(child)
        os.kill(pager, signal.SIGKILL)
        assert soon(lambda: DIED in child.err, 20), "no message"
        turns = child.out.count("turn")
        assert child.wait(1.0) == STUCK
        assert child.out.count("turn") - turns < 5
        assert "verdict" not in child.out


def test_the_pager_of_a_demonstration_is_killed() -> None:
    with Child(call(life_scenarios.demonstrate, size="64MiB")) as child:

        def pagers() -> list[int]:
            found = child.processes()
            return [p for p in found if Path(f"/proc/{p}/comm").read_text() == "userswap-pager\n"]

        assert soon(lambda: bool(pagers()), 20)
        time.sleep(0.3)
        os.kill(pagers()[0], signal.SIGKILL)
        assert child.wait(20) == -signal.SIGABRT
        assert DIED in child.err
        assert "0 lost" not in child.out
        assert child.left_over() == []


@BOTH_STORES
def test_an_interrupt_of_the_whole_group(store: str, seed: int) -> None:
    """As a terminal's Ctrl-C: the pager outlives the client's own end."""
    with Child(call(life_scenarios.count_for_ever, seed=seed, store=store)) as child:
        ready(child)
        time.sleep(0.2)
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(20) == -signal.SIGINT
        assert child.said("counted").split()[1] == "0", "pages were lost"
        assert child.left_over() == []


def test_clients_killed_at_random_moments(seed: int) -> None:
    """Their pagers free everything by ending; another client notices nothing."""
    choice = random.Random(seed)
    with Child(call(life_scenarios.count_for_ever, seed=seed, store="ram:lz4")) as bystander:
        ready(bystander)
        for number in range(8):
            source = call(
                life_scenarios.count_for_ever,
                seed=seed + number,
                store=("ram:lz4", "memory:", "trial:?write_delay=50ms")[number % 3],
                path=("native", "asyncio")[number % 2],
            )
            with Child(source) as child:
                if number:
                    ready(child)
                time.sleep(choice.random() * 0.3)
                child.process.kill()
                assert child.wait(20) == -signal.SIGKILL
                assert child.left_over() == [], "the pager outlives its client"
                assert "Traceback" not in child.err
        Path(bystander.report).touch()
        assert bystander.wait(20) == 0


def test_a_stopped_agent_delays_eviction_only(seed: int) -> None:
    with Child(call(life_scenarios.keep_a_budget, seed=seed, seconds=1.5)) as child:
        _, agent = ready(child)
        stop_thread(agent)
        try:
            time.sleep(1.0)
        finally:
            continue_thread(agent)
        assert child.wait(30) == 0
        assert int(child.said("steps")) > 1000


def test_a_stopped_pager_is_waited_for_and_spoken_of(seed: int) -> None:
    source = call(life_scenarios.read_for_ever, seed=seed, store="ram:lz4")
    with Child(source) as child:
        pager, _ = ready(child)
        with stopped(pager):
            assert soon(lambda: "waited more than 5 s" in child.err, 20), "nothing was said"
            turns = child.out.count("turn")
        assert soon(lambda: child.out.count("turn") > turns + 5, 20), "it does not go on"
        assert child.process.poll() is None
        assert child.err.count("userswap:") == 1


@pytest.mark.parametrize(
    ("how", "beside", "faults"),
    [
        ("sleep", "ram:lz4", 5000),
        ("sleep", "memory:", 5000),
        ("spin", "ram:lz4", 2000),
        ("collect", "ram:lz4", 2000),
    ],
)
def test_a_store_that_blocks_stops_no_other_region(how: str, beside: str, faults: int) -> None:
    """A store that sleeps on its thread, keeps the interpreter, or collects garbage."""
    source = call(
        life_scenarios.fault_beside_a_blocked_store, how=how, beside=beside, faults=faults
    )
    print(check(source))


def test_a_stream_of_faults_starves_no_request(seed: int) -> None:
    print(check(call(life_scenarios.fault_steadily, seed=seed, store="memory:")))


@pytest.fixture
def group() -> Iterator[control_group.Group]:
    hierarchy = control_group.find()
    if hierarchy is None:
        pytest.skip("no memory control groups here")
    name = f"{control_group.NAME}-test-{os.getpid()}"
    folder = hierarchy.root / name
    control = hierarchy.root / "cgroup.subtree_control"
    switched_on = hierarchy.version == 2 and "memory" not in control.read_text().split()
    if switched_on:
        control.write_text("+memory")
    folder.mkdir()
    try:
        yield control_group.Group(hierarchy, name)
    finally:
        soon(lambda: not (folder / "cgroup.procs").read_text(), 5)
        folder.rmdir()
        if switched_on:
            control.write_text("-memory")


def test_a_region_in_a_small_control_group(group: control_group.Group) -> None:
    """What leaves the region leaves the group: more than twice its limit passes through it."""
    source = call(life_scenarios.live_in_a_group, size=128 * MIB, resident=8 * MIB)
    with Child(source) as child:
        child.said("ready")
        group.limit(48 * MIB)
        group.admit(child.pid)
        child.go_on()
        assert child.wait(60) == 0
        assert group.kills() == 0
        assert child.left_over() == []
