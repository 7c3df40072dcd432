"""The loss tests see what they look for: each deliberately wrong mover is caught.

USERSWAP_CANARY makes the pager do one thing wrong (enum us_canary in native/pager.h). Every
scenario passes without it; with it, threads stand still or read what they did not write.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import own_scenarios
import scenarios
from proof import LOST, STUCK, Child, call
from support import MOVER
from userswap.engine import probe

pytestmark = pytest.mark.privileged  # the kernel itself faults on these pages


@dataclass(frozen=True)
class Canary:
    name: str
    bit: int
    source: str
    verdict: int
    mover: str = ""
    """The one mover that can do it wrong; "" for either."""


SEED = 1
CANARIES = [
    Canary(
        "no_wake",
        1,
        call(scenarios.count, seed=SEED, store="memory:", steps=8_000, stuck_s=3.0),
        STUCK,
    ),
    Canary(
        "drop_before_store",
        2,
        call(scenarios.count, seed=SEED, store="ram:lz4", steps=8_000),
        LOST,
        "move",
    ),
    Canary(
        "drop_while_rescuable",
        4,
        call(scenarios.count, seed=SEED, store="memory:", steps=8_000, reads=97),
        LOST,
    ),
    Canary(
        "stale_clean_page",
        8,
        call(scenarios.count, seed=SEED, store="memory:", steps=8_000, reads=95),
        LOST,
    ),
    Canary(
        "late_store_write",
        16,
        call(own_scenarios.writes_that_overtake),
        LOST,
        "move",
    ),
    Canary(
        "fill_after_discard",
        32,
        call(
            scenarios.discard_what_is_on_its_way,
            store="trial:?read_delay=150ms&strict=on",
            ahead=True,
        ),
        LOST,
    ),
    Canary(
        "no_protection",
        64,
        call(scenarios.count, seed=SEED, store="trial:?write_delay=20ms", steps=4_000, reads=5),
        LOST,
        "protect",
    ),
]


TRIES = 5


@pytest.mark.parametrize("canary", CANARIES, ids=[canary.name for canary in CANARIES])
def test_a_wrong_mover_is_caught_and_a_right_one_passes(canary: Canary) -> None:
    if canary.mover == "move" and probe.best_mover(probe.gather()) != "move":
        pytest.skip("this kernel cannot move pages")
    env = {MOVER: canary.mover} if canary.mover else {}
    # Whether a wrong mover meets its victim is a matter of timing, on a busy machine above all.
    for _ in range(TRIES):
        with Child(canary.source, canary=canary.bit, env=env) as child:
            status = child.wait(40)
            print(child.out)
            # A debug build may see the forbidden step itself: then the pager ends, and its client.
            caught = status == canary.verdict or "may not become" in child.err
        if caught:
            break
    assert caught, f"exit status {status}: the loss tests would not have told"
    with Child(canary.source, env=env) as child:
        assert child.wait(40) == 0
