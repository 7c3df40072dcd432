"""The shared budget: its promises hold whatever regions do, and it settles."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userswap.engine.budget import (
    FLOOR,
    GRACE,
    HOLD,
    PAGE,
    WEIGHT_MAX,
    WEIGHT_MIN,
    Budget,
    BudgetError,
    Claim,
    fill,
)

MIB = 1 << 20
weights = st.floats(WEIGHT_MIN, WEIGHT_MAX)


@st.composite
def shares(draw: st.DrawFn) -> tuple[int, list[Claim]]:
    claims = []
    for _ in range(draw(st.integers(0, 12))):
        low = draw(st.integers(0, 1000)) * PAGE
        claims.append(Claim(low, low + draw(st.integers(0, 1 << 20)) * PAGE, draw(weights)))
    spare = draw(st.integers(0, 1 << 22)) * PAGE
    return sum(claim.low for claim in claims) + spare, claims


@given(shares())
def test_water_finds_its_level(case: tuple[int, list[Claim]]) -> None:
    total, claims = case
    filled = fill(total, claims)
    assert sum(filled) <= total
    for claim, share in zip(claims, filled, strict=True):
        assert claim.low <= share <= claim.high
        assert share % PAGE == 0
    lost = len(claims) * PAGE  # to rounding
    assert sum(filled) >= min(total, sum(claim.high for claim in claims)) - lost
    open_ones = [
        (share / claim.weight, PAGE / claim.weight)
        for claim, share in zip(claims, filled, strict=True)
        if claim.low < share < claim.high - PAGE
    ]
    for level, coarse in open_ones:  # who is neither at the bottom nor full has the same height
        for other, others_coarse in open_ones:
            assert abs(level - other) <= coarse + others_coarse + 1e-6 * level


class Machine:
    """Regions that hold and want what they are told, against a budget."""

    def __init__(self, total: int, minimum: int) -> None:
        self.budget = Budget(total, minimum)
        self.wants: dict[tuple[int, int], int] = {}
        """What each region would hold if it could."""
        self.deaf: set[tuple[int, int]] = set()
        """Regions that give nothing back."""
        self.used: dict[tuple[int, int], int] = {}
        self.limits: dict[tuple[int, int], int] = {}
        self.taken = 0
        """Bytes by which limits came down."""

    def open(self, client: int, region: int, cap: int, wants: int) -> None:
        self.budget.open(client, region, cap)
        key = client, region
        self.wants[key], self.used[key], self.limits[key] = wants, 0, 0
        self.look()

    def close(self, client: int, region: int) -> None:
        self.budget.close(client, region)
        for book in (self.wants, self.used, self.limits):
            del book[client, region]

    def look(self) -> None:
        for key, wants in self.wants.items():
            limit, used = self.limits[key], self.used[key]
            least = used if key in self.deaf else 0
            self.used[key] = max(min(wants, limit), least, used - 64 * MIB)
            pressed = wants > limit or (wants > used and self.used[key] >= limit * 7 // 8)
            self.budget.observe(*key, self.used[key], pressed)
        for client, region, limit in self.budget.settle():
            assert isinstance(client, int)
            assert isinstance(region, int)
            self.taken += max(self.limits[client, region] - limit, 0)
            self.limits[client, region] = limit
            assert sum(self.limits.values()) <= self.budget.total
        for client, region, account in self.budget.accounts():
            assert self.limits[client, region] == account.limit  # type: ignore[index]
            assert account.floor <= account.limit <= account.cap

    def run(self, looks: int) -> None:
        for _ in range(looks):
            self.look()


@given(seed=st.integers(0, 1 << 32))
def test_promises_hold_whatever_happens(seed: int) -> None:
    rnd = random.Random(seed)
    machine = Machine(rnd.randrange(16, 512) * MIB, rnd.choice((0, 8, 16)) * MIB)
    budget = machine.budget
    number = 0
    for _ in range(40):
        keys = list(machine.wants)
        match rnd.randrange(8):
            case 0 | 1 | 2:
                number += 1
                cap = rnd.randrange(1, 300 * MIB)
                with contextlib.suppress(BudgetError):
                    machine.open(rnd.randrange(4), number, cap, rnd.randrange(cap))
            case 3 if keys:
                machine.close(*rnd.choice(keys))
            case 4 if keys:
                machine.wants[rnd.choice(keys)] = rnd.randrange(300 * MIB)
            case 5 if keys:
                machine.deaf ^= {rnd.choice(keys)}
            case 6 if keys:
                key = rnd.choice(keys)
                try:
                    budget.resize(*key, rnd.randrange(1, 300 * MIB))
                    budget.promise(key[0], rnd.choice((None, key[1])), rnd.randrange(64 * MIB))
                except BudgetError:
                    continue
            case 7 if keys:
                key = rnd.choice(keys)
                budget.weigh(key[0], rnd.choice((None, key[1])), rnd.uniform(0.01, 100))
        assert sum(holder.reserved for holder in budget.holders.values()) <= budget.total
        machine.run(rnd.randrange(1, 4))


def test_who_presses_gets_what_others_do_not_use() -> None:
    machine = Machine(256 * MIB, 16 * MIB)
    machine.open(1, 1, 256 * MIB, 10 * MIB)
    machine.open(2, 1, 256 * MIB, 256 * MIB)
    machine.run(40)
    assert machine.limits[2, 1] >= 230 * MIB
    machine.wants[1, 1] = 256 * MIB  # and it comes back on demand
    machine.run(20)
    assert abs(machine.limits[1, 1] - 128 * MIB) <= 4 * MIB
    assert abs(machine.limits[2, 1] - 128 * MIB) <= 4 * MIB


def test_weights_share_what_all_press_for() -> None:
    machine = Machine(400 * MIB, 0)
    for client in (1, 2, 3):
        machine.open(client, 1, 400 * MIB, 400 * MIB)
    machine.open(3, 2, 400 * MIB, 400 * MIB)
    machine.budget.weigh(1, None, 2)
    machine.budget.weigh(3, 2, 3)
    machine.run(60)
    expected = {(1, 1): 200, (2, 1): 100, (3, 1): 25, (3, 2): 75}
    for key, share in expected.items():
        assert abs(machine.limits[key] - share * MIB) <= 8 * MIB, machine.limits


def test_a_minimum_holds_under_pressure() -> None:
    machine = Machine(256 * MIB, 0)
    machine.open(1, 1, 256 * MIB, 96 * MIB)
    machine.budget.promise(1, None, 96 * MIB)
    machine.run(10)
    for client in range(2, 20):
        machine.open(client, 1, 256 * MIB, 256 * MIB)
        machine.budget.weigh(client, None, 100)
        machine.run(5)
    machine.run(10 * HOLD)  # quiet for long, and still not taken
    assert machine.used[1, 1] == 96 * MIB
    assert machine.limits[1, 1] >= 96 * MIB


def test_a_quiet_region_gives_way_and_has_its_share_back() -> None:
    machine = Machine(256 * MIB, 16 * MIB)
    machine.open(1, 1, 256 * MIB, 250 * MIB)
    machine.run(20)
    assert machine.used[1, 1] == 250 * MIB
    machine.wants[1, 1] = 0  # it holds them, and touches nothing
    machine.deaf.add((1, 1))
    machine.open(2, 1, 256 * MIB, 250 * MIB)
    machine.deaf.clear()
    for _ in range(400):
        machine.wants[1, 1] = min(machine.used[1, 1], machine.limits[1, 1])
        machine.look()
    assert machine.limits[2, 1] > 200 * MIB
    assert machine.limits[1, 1] >= 16 * MIB
    machine.wants[1, 1] = 250 * MIB
    machine.run(20)
    assert machine.limits[1, 1] >= 120 * MIB


def test_it_comes_to_rest() -> None:
    rnd = random.Random(5)
    machine = Machine(1024 * MIB, 16 * MIB)
    for client in range(20):
        machine.open(client, 1, 256 * MIB, rnd.randrange(20, 256) * MIB)
    machine.run(3000)  # now and then a quiet region is tried, less and less often
    machine.taken = 0
    machine.run(100)
    assert machine.taken <= machine.budget.total // 10


def test_who_gives_nothing_back_holds_others_up_for_a_while_only() -> None:
    machine = Machine(256 * MIB, 16 * MIB)
    machine.open(1, 1, 256 * MIB, 256 * MIB)
    machine.run(10)
    machine.deaf.add((1, 1))
    machine.open(2, 1, 256 * MIB, 256 * MIB)
    machine.run(2)
    assert machine.limits[2, 1] < 64 * MIB  # the memory is not there yet
    machine.run(3 * GRACE)
    assert machine.limits[2, 1] >= 120 * MIB


def test_refusals_have_figures() -> None:
    budget = Budget(64 * MIB, 16 * MIB)
    for client in range(4):
        budget.open(client, 1, 64 * MIB)
    with pytest.raises(
        BudgetError, match=r"needs a minimum of 16MiB.*of 64MiB, 64MiB are promised"
    ):
        budget.open(4, 1, 64 * MIB)
    with pytest.raises(BudgetError, match="promised to others"):
        budget.promise(1, None, 20 * MIB)
    with pytest.raises(BudgetError, match="more than all"):
        budget.promise(1, None, 65 * MIB)
    with pytest.raises(BudgetError, match="weight=0: use"):
        budget.weigh(1, None, 0)
    budget.promise(1, None, 8 * MIB)
    budget.open(4, 1, 8 * MIB)
    assert budget.account(4, 1).floor == FLOOR
