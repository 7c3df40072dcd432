"""Every store and every filter keeps the contract; and the suite tells those that do not."""

import pytest

from media import completed
from userswap.backends.conformance import (
    CHECKS,
    Check,
    ConformanceError,
    check_opened_by_one_at_a_time,
    check_what_was_flushed_survives,
    perform,
    run,
)
from userswap.backends.memory import MemoryStore
from userswap.backends.store import Store
from wrong_stores import WRONG, HarnessOf

STORES = {
    "memory:": "memory:?limit=1MiB",
    "ram:lz4": "ram:lz4?limit=1MiB",
    "ram:zstd?level=3": "ram:zstd?limit=1MiB",
    "ram:none": "ram:none?limit=1MiB",
    "lmdb:{dir}": "lmdb:{dir}?map_size=2MiB",
    "lmdb:{dir}?codec=lz4&durability=commit": "lmdb:{dir}?codec=none&map_size=2MiB",
}
"""Every store, and one of its kind that is soon full."""
FILTERS = (
    "checksum::",
    "delay?read=20us&write=50us&jitter=on::",
    "encrypt::",
    "faulty?read=n999999::",
    "retry?tries=2&first=1us::",
    "stats::",
    "tier?fast=ram:lz4&limit=256KiB::",
    "tier?fast=delay%3Fwrite=1ms%3A:memory:&limit=1MiB::",
    "stats::checksum::retry?tries=2&first=1us::",
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("url", STORES)
def test_stores(url: str, check: Check, seed: int) -> None:
    run(check, url, limited=STORES[url], seed=seed)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("under", ["memory:", "ram:lz4"])
@pytest.mark.parametrize("filters", FILTERS)
def test_filters(filters: str, under: str, check: Check, seed: int) -> None:
    filters = completed(filters)
    run(check, filters + under, limited=filters + STORES[under], seed=seed)


@pytest.mark.parametrize("check", [check_what_was_flushed_survives, check_opened_by_one_at_a_time])
@pytest.mark.parametrize("filters", FILTERS)
def test_filters_over_a_durable_store(filters: str, check: Check, seed: int) -> None:
    run(check, completed(filters) + "lmdb:{dir}/db?durability=commit", seed=seed)


@pytest.mark.parametrize("check", CHECKS)
def test_a_store_that_forgets(check: Check, seed: int) -> None:
    run(check, "null:", forgets=True, seed=seed)


# --- the suite itself ---


def test_every_check_has_a_store_that_it_catches() -> None:
    assert {check.__name__ for check in CHECKS} == set(WRONG.values())


@pytest.mark.parametrize("kind", WRONG)
async def test_wrong_stores_are_caught(kind: type[Store]) -> None:
    (check,) = (check for check in CHECKS if check.__name__ == WRONG[kind])
    with pytest.raises((ConformanceError, OSError)):
        await perform(check, HarnessOf(kind))


@pytest.mark.parametrize("check", CHECKS)
async def test_the_same_stores_without_the_fault_pass(check: Check) -> None:
    await perform(check, HarnessOf(MemoryStore))


async def test_what_does_not_apply_is_said() -> None:
    (check,) = (check for check in CHECKS if "flushed" in check.__name__)
    assert await perform(check, HarnessOf(MemoryStore)) == "it is not durable"
