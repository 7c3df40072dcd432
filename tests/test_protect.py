"""The mover `protect`: the loss tests that another mover could fail, and what is its own.

The tests that are imported run here with this mover too. `USERSWAP_TEST_MOVER=protect make test`
runs every test with it; of the loss tests it may fail the one whose direct I/O no protection sees.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kernel_scenarios
import scenarios
from children import good
from daemons import Daemon, wait_for
from proof import Child, call, check
from support import MOVER, TOLD_BY_PROTECT, run_child
from test_deaths import (
    group,
    test_a_region_in_a_small_control_group,
    test_a_stopped_agent_delays_eviction_only,
    test_an_interrupt_of_the_whole_group,
    test_clients_killed_at_random_moments,
    test_the_pager_is_killed_and_its_client_blocks,
)
from test_loss import (
    LOSES,
    folder,
    test_a_discard_meets_a_load,
    test_a_full_store_lets_the_region_grow,
    test_a_lost_page_is_a_bus_error_for_who_touches_it,
    test_a_model_before_a_store_that_reorders,
    test_counters_before_a_store_that_reorders,
    test_locked_pages_stay,
    test_pinned_pages_stay,
)
from test_region import (
    test_a_region_that_the_program_split,
    test_ranges,
)

__all__ = [
    "folder",
    "group",
    "test_a_discard_meets_a_load",
    "test_a_full_store_lets_the_region_grow",
    "test_a_lost_page_is_a_bus_error_for_who_touches_it",
    "test_a_model_before_a_store_that_reorders",
    "test_a_region_in_a_small_control_group",
    "test_a_region_that_the_program_split",
    "test_a_stopped_agent_delays_eviction_only",
    "test_an_interrupt_of_the_whole_group",
    "test_clients_killed_at_random_moments",
    "test_counters_before_a_store_that_reorders",
    "test_locked_pages_stay",
    "test_pinned_pages_stay",
    "test_ranges",
    "test_the_pager_is_killed_and_its_client_blocks",
]
pytestmark = pytest.mark.privileged  # the kernel itself faults on these pages
ONE_OF_EACH = pytest.mark.parametrize(
    ("store", "path"), [("ram:lz4", "native"), ("memory:", "native"), ("memory:", "asyncio")]
)
KILLS = 8


@pytest.fixture(autouse=True)
def _by_protection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MOVER, "protect")


@ONE_OF_EACH
def test_counters_that_threads_share(store: str, path: str, seed: int) -> None:
    print(check(call(scenarios.count, seed=seed, store=store, path=path, steps=4_000)))


@pytest.mark.parametrize("store", ["ram:lz4", "memory:"])
def test_hot_pages(store: str, seed: int) -> None:
    """Written in the very moment they are read or dropped."""
    source = call(scenarios.count, seed=seed, store=store, steps=200_000, burst=32, hot=48, reads=5)
    print(check(source))


def test_counters_that_are_mostly_read(seed: int) -> None:
    print(check(call(scenarios.count, seed=seed, store="ram:lz4", steps=3_000, reads=95)))


@pytest.mark.parametrize(("store", "path"), [("ram:lz4", "native"), ("memory:", "asyncio")])
def test_a_budget_that_changes_under_load(store: str, path: str, seed: int) -> None:
    print(check(call(scenarios.change_the_budget, seed=seed, store=store, path=path)))


@ONE_OF_EACH
def test_random_operations_against_a_model(store: str, path: str, seed: int) -> None:
    print(check(call(scenarios.model, seed=seed, store=store, path=path, turns=300)))


def test_signals_while_threads_fault(seed: int) -> None:
    source = call(
        scenarios.writers_in_a_signal_storm, seed=seed, store="ram:lz4", path="native", steps=3_000
    )
    print(check(source))


@pytest.mark.parametrize("store", ["ram:lz4", "memory:"])
def test_system_calls_on_memory_that_is_out(store: str) -> None:
    check(call(kernel_scenarios.make_system_calls, store=store, path="native"))


@pytest.mark.parametrize(
    ("on", "how", "sticky"),
    [
        ("write", "full", False),
        ("write", "failed", True),
        pytest.param("read", "lost", False, marks=LOSES),
        ("discard", "bug", False),
    ],
)
def test_a_store_fails_at_its_nth_call(on: str, how: str, sticky: bool) -> None:
    source = call(kernel_scenarios.live_through_failures, on=on, how=how, sticky=sticky, most=16)
    print(check(source))


def test_a_discard_where_locked_pages_cannot_be_dropped() -> None:
    check(call(kernel_scenarios.discard_without_dropping_locked_pages))


@pytest.mark.parametrize("store", ["ram:lz4", "memory:"])
def test_memory_that_the_program_itself_may_not_read(store: str) -> None:
    check(call(kernel_scenarios.forbid_memory_where_the_agent_reads, store=store))


def test_its_limit_is_told_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MOVER)
    child = run_child("""
import userswap
for _ in range(2):
    with (
        userswap.Region("2MiB", resident="2MiB", mover="protect") as one,
        userswap.Region("2MiB", resident="2MiB", mover="protect", store="memory:") as two,
    ):
        assert one.stats().mover == two.stats().mover == "protect"
        assert one.stats().held_by == ""
""")
    assert child.returncode == 0, child.stderr
    assert child.stderr.startswith(TOLD_BY_PROTECT)
    assert "O_DIRECT" in child.stderr
    assert child.stderr.count("\n") == 1


def test_pins_anywhere_in_the_process_hold_what_was_written() -> None:
    with Child(call(kernel_scenarios.hold_written_pages_by_a_pin)) as child:
        assert child.wait() == 0
        lines = [line for line in child.err.splitlines() if not line.startswith(TOLD_BY_PROTECT)]
        assert len(lines) == 1, child.err
        assert "held:" in lines[0]
        assert "VmPin" in lines[0]


def test_a_killed_program_is_not_said_to_hold_memory(tmp_path: Path) -> None:
    """As it ends it has no VmPin any more, and nobody is left to be told of one."""
    code = """
import sys, userswap
ballast = b"x" * (200 << 20)  # it takes long to end
region = userswap.Region(
    "16MiB", resident="2MiB", store="fast", pager=sys.argv[1], mover="protect"
)
print("pages", flush=True)
while True:
    for at in range(0, region.size, 4096):
        region.memory[at] = at >> 12 & 255
"""
    with Daemon(tmp_path / "s", "64MiB") as daemon:
        for _ in range(KILLS):
            program = subprocess.Popen(
                [sys.executable, "-P", "-c", code, daemon.path],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert program.stdout is not None
            assert program.stdout.readline() == b"pages\n"
            assert wait_for(lambda: daemon.regions()[0]["stored_bytes"] > 4 << 20)
            program.kill()
            program.communicate()
            assert wait_for(lambda: not daemon.clients())
        assert daemon.end() == 0
        assert "written stays in memory" not in daemon.log.read_text()


def test_where_no_pager_may_read_the_program() -> None:
    """A process that has given up root is not dumpable: the agent copies for the pager."""
    good("""
import ctypes, random, userswap
libc = ctypes.CDLL(None)
PAGE = 4096
for store in ("ram:lz4", "memory:"):
    with userswap.Region("8MiB", resident="2MiB", store=store) as region:
        assert libc.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
        choice, version = random.Random(5), [0] * (region.size // PAGE)
        for turn in range(6000):
            page = choice.randrange(len(version))
            found = int.from_bytes(region.memory[page * PAGE : page * PAGE + 4], "little")
            assert found == version[page], (store, page, found, version[page])
            version[page] += 1
            region.memory[page * PAGE : page * PAGE + 4] = version[page].to_bytes(4, "little")
        stats = region.stats()
        assert stats.dropped_pages > 3000, stats
        assert stats.evicted_pages == stats.lost_pages == 0, stats
        assert libc.prctl(4, 1, 0, 0, 0) == 0
""")
