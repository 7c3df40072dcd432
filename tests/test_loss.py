"""Nothing is lost: real processes, real faults, pages that leave and come back all the time.

The scenarios run in children (scenarios.py, kernel_scenarios.py): whoever waits for a page that
never comes cannot be interrupted from inside. tests/test_canary.py shows that they would tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import kernel_scenarios
import scenarios
from media import completed
from proof import Child, call, check
from userswap.engine import probe

pytestmark = pytest.mark.privileged  # the kernel itself faults on these pages
BOTH_PATHS = pytest.mark.parametrize("path", ["native", "asyncio"])
BOTH_STORES = pytest.mark.parametrize("store", ["ram:lz4", "memory:"])
LOSES = pytest.mark.skipif(
    not probe.gather().has(probe.FEATURE_POISON),
    reason="before Linux 6.6 who touches a lost page waits, instead of getting SIGBUS",
)
LATE = "trial:?read_delay=2ms&write_delay=10ms&rare=4&strict=on"
"""Later operations overtake earlier ones, and the store ends the pager if two meet on a page."""
MIB = 1 << 20
STACKS = ("checksum::", "encrypt::", "tier?fast=ram:lz4&limit=1MiB::checksum::")


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder on the medium of this checkout: what is in memory already needs no direct I/O."""
    with TemporaryDirectory(dir=Path(__file__).parent, prefix=".direct-") as name:
        yield name


@BOTH_PATHS
@BOTH_STORES
def test_counters_that_threads_share(path: str, store: str, seed: int) -> None:
    """Own counters, atomic ones, and pairs under a mutex that lives in the page."""
    print(check(call(scenarios.count, seed=seed, store=store, path=path, steps=25_000)))


def test_millions_of_increments(seed: int) -> None:
    """Most steps hit, and the hot pages are written in the very moment they are taken."""
    source = call(
        scenarios.count, seed=seed, store="ram:lz4", steps=1_500_000, burst=32, hot=48, reads=5
    )
    print(check(source))


def test_counters_before_a_store_that_reorders(seed: int) -> None:
    print(check(call(scenarios.count, seed=seed, store=LATE, steps=10_000, burst=4, hot=64)))


@BOTH_STORES
def test_counters_that_are_mostly_read(store: str, seed: int) -> None:
    """Clean pages are dropped in place, under readers and beside the few writers."""
    print(check(call(scenarios.count, seed=seed, store=store, steps=12_000, reads=95)))


def test_counters_in_a_stream(seed: int) -> None:
    """Readahead runs before the threads, which walk through the region."""
    source = call(
        scenarios.count, seed=seed, store="memory:", steps=60_000, stride=1, burst=4, threads=2
    )
    print(check(source))


@BOTH_PATHS
@BOTH_STORES
def test_a_budget_that_changes_under_load(path: str, store: str, seed: int) -> None:
    print(check(call(scenarios.change_the_budget, seed=seed, store=store, path=path)))


@BOTH_PATHS
@BOTH_STORES
def test_random_operations_against_a_model(path: str, store: str, seed: int) -> None:
    print(check(call(scenarios.model, seed=seed, store=store, path=path, turns=600)))


@BOTH_PATHS
def test_a_model_before_a_store_that_reorders(path: str, seed: int) -> None:
    print(check(call(scenarios.model, seed=seed, store=LATE, path=path, turns=250)))


@pytest.mark.parametrize("filters", STACKS)
def test_a_model_over_filters(filters: str, seed: int) -> None:
    """Each takes part of the work from the store that it is over, which reorders."""
    url = completed(filters) + LATE
    print(check(call(scenarios.model, seed=seed, store=url, path="native", turns=200)))


@BOTH_PATHS
@BOTH_STORES
def test_touches_with_the_interpreter_lock_held(path: str, store: str, seed: int) -> None:
    check(call(scenarios.touch_with_the_lock, seed=seed, store=store, path=path))


@pytest.mark.parametrize("ahead", [False, True], ids=["awaited", "ahead"])
def test_a_discard_meets_a_load(ahead: bool) -> None:
    store = "trial:?read_delay=150ms&strict=on"
    check(call(scenarios.discard_what_is_on_its_way, store=store, ahead=ahead))


@pytest.mark.parametrize("store", ["ram:lz4", "memory:?limit=2MiB"])
def test_what_is_written_after_a_discard_stays(store: str, seed: int) -> None:
    """A full store keeps the evictor at pages that a discard is about to drop."""
    source = call(scenarios.discard_under_eviction, seed=seed, store=store, turns=300)
    check(source, timeout=100)


@pytest.mark.parametrize("mover", ["move", "protect"])
def test_what_was_discarded_holds_no_fault_up(mover: str) -> None:
    check(call(scenarios.touch_after_much_was_discarded, mover=mover))


@pytest.mark.parametrize(("path", "store"), [("native", "ram:lz4"), ("asyncio", "memory:")])
def test_signals_while_threads_fault(path: str, store: str, seed: int) -> None:
    source = call(scenarios.writers_in_a_signal_storm, seed=seed, store=store, path=path)
    print(check(source))


# --- the kernel's own accesses ---


@BOTH_PATHS
@BOTH_STORES
def test_system_calls_on_memory_that_is_out(path: str, store: str) -> None:
    check(call(kernel_scenarios.make_system_calls, store=store, path=path))


@pytest.mark.parametrize(("path", "store"), [("native", "ram:lz4"), ("asyncio", "memory:")])
def test_direct_reads_race_with_eviction(path: str, store: str, folder: str, seed: int) -> None:
    source = call(
        kernel_scenarios.read_directly,
        seed=seed,
        store=store,
        path=path,
        folder=folder,
        turns=400,
    )
    print(check(source))


@BOTH_STORES
def test_pinned_pages_stay(store: str, folder: str, seed: int) -> None:
    source = call(
        kernel_scenarios.keep_pinned_pages, seed=seed, store=store, path="native", folder=folder
    )
    check(source)


@BOTH_STORES
def test_locked_pages_stay(store: str) -> None:
    check(call(kernel_scenarios.keep_locked_pages, store=store, path="native"))


# --- stores that fail ---


@pytest.mark.parametrize(
    ("on", "how", "sticky"),
    [
        ("write", "transient", False),
        ("write", "full", False),
        ("write", "failed", True),
        ("write", "bug", False),
        ("read", "transient", False),
        pytest.param("read", "lost", False, marks=LOSES),
        pytest.param("read", "failed", True, marks=LOSES),
        pytest.param("read", "bug", False, marks=LOSES),
        ("discard", "failed", False),
        ("discard", "bug", False),
        ("flush", "failed", False),
        ("flush", "bug", False),
        pytest.param("any", "failed", True, marks=LOSES),
    ],
)
def test_a_store_fails_at_its_nth_call(on: str, how: str, sticky: bool) -> None:
    source = call(kernel_scenarios.live_through_failures, on=on, how=how, sticky=sticky, most=24)
    print(check(source))


@BOTH_PATHS
@pytest.mark.parametrize("store", ["ram:lz4?limit=1MiB", "memory:?limit=64K"])
def test_a_full_store_lets_the_region_grow(path: str, store: str) -> None:
    check(call(kernel_scenarios.fill_a_full_store, store=store, path=path))


@LOSES
def test_a_lost_page_is_a_bus_error_for_who_touches_it() -> None:
    # AddressSanitizer would make an abort of it.
    env = {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":handle_sigbus=0"}
    with Child(call(kernel_scenarios.touch_a_lost_page, page=3), env=env) as child:
        assert child.wait() == -7
        assert child.out == "touches\n"
        assert child.left_over() == []
