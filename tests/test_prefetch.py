"""What a program prefetches: it waits for its own pages alone."""

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
