"""What a program and the policies prefetch: pages are right, and nobody waits for others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import prefetch_scenarios
from proof import call, check


@pytest.mark.parametrize(
    "scenario",
    [
        prefetch_scenarios.beside_faults,
        prefetch_scenarios.beside_evictions,
    ],
)
def test_a_prefetch_waits_for_its_own_pages_alone(
    scenario: Callable[[], None],
) -> None:
    check(call(scenario))


@pytest.mark.parametrize("store", ["ram:lz4", "memory:"])
def test_pages_are_right_whatever_policies_name(store: str, seed: int) -> None:
    check(call(prefetch_scenarios.by_every_policy, store=store, seed=seed))


def test_a_store_that_hangs_leaves_batches_to_others() -> None:
    check(call(prefetch_scenarios.beside_regions_whose_store_hangs))
