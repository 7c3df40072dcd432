"""Eviction policies as pure objects, against models in plain Python that are plainly right."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userswap.engine.policies.eviction import Evictor, names
from userswap.engine.simulation import Setting, Touches

PAGES = 64
TOUCHES = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=400)
CAPACITIES = st.integers(1, 40)


def misses(policy: str, touches: list[int], capacity: int, *, hits_seen: bool = False) -> int:
    return (
        Touches(touches, bound=PAGES)
        .simulate(Setting(policy, "none", capacity, least=0, hits_seen=hits_seen))
        .misses
    )


def model_of_clock(touches: list[int], capacity: int, *, touched_stay: bool) -> int:
    queue: deque[int] = deque()
    touched: dict[int, bool] = {}
    count = 0
    for page in touches:
        if page in touched:
            touched[page] = touched_stay
            continue
        count += 1
        while len(queue) == capacity:
            oldest = queue.popleft()
            if touched[oldest]:
                touched[oldest] = False
                queue.append(oldest)
            else:
                del touched[oldest]
        queue.append(page)
        touched[page] = False
    return count


@dataclass
class ModelOfS3Fifo:
    capacity: int
    small: dict[int, int] = field(default_factory=dict)  # page: touches; in order
    main: dict[int, int] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)  # page: the number of its departure
    departures: int = 0
    full: bool = False
    misses: int = 0

    def touch(self, page: int, *, stays: int, seen: bool) -> None:
        small_size = self.capacity // 10
        for queue in (self.small, self.main):
            if page in queue:
                queue[page] = min(queue[page] + seen, 3)
                return
        self.misses += 1
        while len(self.small) + len(self.main) >= self.capacity:
            self.send_out(small_size, stays, seen)
        reach = max(self.capacity - small_size, 1)
        number = self.left.pop(page, None)
        back = number is not None and self.departures - number < reach
        if back or (not self.full and len(self.small) >= small_size):
            self.main[page] = 0
        else:
            self.small[page] = 0

    def send_out(self, small_size: int, stays: int, seen: bool) -> None:
        self.full = True
        from_main = len(self.main) > self.capacity - small_size
        while True:
            queue = self.main if from_main or not self.small else self.small
            page = next(iter(queue))
            touches = queue.pop(page)
            if queue is self.main and touches:
                self.main[page] = touches - 1
            elif queue is self.small and touches >= stays:
                self.main[page] = 0
            else:
                if queue is self.small or not seen:
                    self.departures += 1
                    self.left[page] = self.departures
                return


@given(TOUCHES, CAPACITIES)
def test_fifo(touches: list[int], capacity: int) -> None:
    expected = model_of_clock(touches, capacity, touched_stay=False)
    assert misses("fifo", touches, capacity) == expected
    # Without touches that are seen, clock and LRU are fifo too.
    assert misses("clock", touches, capacity) == expected


@given(TOUCHES, CAPACITIES)
def test_clock(touches: list[int], capacity: int) -> None:
    expected = model_of_clock(touches, capacity, touched_stay=True)
    assert misses("clock", touches, capacity, hits_seen=True) == expected


@given(TOUCHES, CAPACITIES, st.booleans())
def test_s3g(touches: list[int], capacity: int, seen: bool) -> None:
    model = ModelOfS3Fifo(capacity)
    for page in touches:
        model.touch(page, stays=2 if seen else 1, seen=seen)
    assert misses("s3g", touches, capacity, hits_seen=seen) == model.misses


def best(touches: list[int], capacity: int) -> int:
    resident: set[int] = set()
    count = 0
    for at, page in enumerate(touches):
        if page in resident:
            continue
        count += 1
        if len(resident) == capacity:
            rest = touches[at:]
            resident.remove(
                max(resident, key=lambda old: rest.index(old) if old in rest else len(touches))
            )
        resident.add(page)
    return count


@settings(max_examples=50)
@given(TOUCHES, CAPACITIES)
def test_no_policy_beats_the_optimum(touches: list[int], capacity: int) -> None:
    optimum = Touches(touches, bound=PAGES).best(capacity)
    assert optimum == best(touches, capacity)
    assert all(misses(name, touches, capacity) >= optimum for name in names())


@settings(max_examples=50)
@pytest.mark.parametrize("name", names())
@given(
    operations=st.lists(st.tuples(st.sampled_from("itsvr"), st.integers(0, 63))),
    tail=st.integers(0, 128),
)
def test_what_goes_in_comes_out_once(
    name: str, operations: list[tuple[str, int]], tail: int
) -> None:
    evictor = Evictor(name, pages=PAGES, capacity=16, tail=tail)
    inside: set[int] = set()
    staged: set[int] = set()
    for operation, page in operations:
        if operation == "i" and page not in inside:
            evictor.insert(page, ahead=page % 3 == 0)
            inside.add(page)
        elif operation == "t" and page in inside:
            evictor.touch(page)
            staged.discard(page)
        elif operation == "s":
            while (found := evictor.stage()) is not None:
                assert found in inside - staged
                staged.add(found)
            assert len(staged) <= len(inside) / 2 + 3
        elif operation == "r":
            evictor.resize(1 + page, tail)
        elif operation == "v":
            victim = evictor.victim()
            assert (victim is None) == (not inside)
            inside.discard(victim if victim is not None else -1)
            staged.discard(victim if victim is not None else -1)
    left = [evictor.victim() for _ in inside]
    assert {page for page in left if page is not None} == inside
    assert evictor.victim() is None


# --- what each is for ---


def ratios(touches: list[int], share: float, tail: int = 0) -> dict[str, float]:
    trace = Touches(touches)
    room = int(trace.different * share)
    found = {
        name: trace.simulate(Setting(name, "none", room, tail=tail)).miss_ratio for name in names()
    }
    return found | {"best": trace.best(room) / len(touches)}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_sweep_larger_than_memory_costs_what_it_must(share: float) -> None:
    # Of 60 laps the second half: by then the policies have found out what they deal with.
    pages = 16384
    room = int(pages * share)
    early, whole = Touches(list(range(pages)) * 30), Touches(list(range(pages)) * 60)
    found = {
        name: whole.simulate(Setting(name, "none", room)).misses
        - early.simulate(Setting(name, "none", room)).misses
        for name in ("fifo", "bip", "auto")
    }
    optimum = whole.best(room) - early.best(room)
    assert found["fifo"] == 30 * pages
    assert found["bip"] <= 1.1 * optimum
    # What its samples of the other rules miss weighs more, the less there is to miss.
    assert found["auto"] <= (1.1 if share < 0.9 else 1.5) * optimum


def skewed(count: int, pages: int, draw: random.Random) -> list[int]:
    ranks = draw.sample(range(pages), pages)
    weights = [rank**-0.9 for rank in range(1, pages + 1)]
    return draw.choices(ranks, weights, k=count)


def test_ghosts_tell_what_is_hot(seed: int) -> None:
    touches = skewed(150_000, 10_000, random.Random(seed))
    found = ratios(touches, 0.1)
    assert found["s3g"] < 0.9 * found["fifo"]
    assert found["auto"] < 1.03 * found["s3g"]
    # A tail tells more, at a few faults that read nothing.
    assert ratios(touches, 0.1, tail=64)["s3g"] < 0.95 * found["s3g"]


def test_auto_keeps_clear_of_the_worst_rule(seed: int) -> None:
    draw = random.Random(seed)
    moving = [(at // 40 + int(draw.paretovariate(0.6))) % 8000 for at in range(150_000)]
    again = [page for turn in range(120) for page in range(turn * 700, turn * 700 + 2000)]
    for touches in (moving, again, skewed(150_000, 10_000, draw)):
        for share in (0.1, 0.25, 0.5):
            found = ratios(touches, share)
            assert found["auto"] <= 1.25 * min(found[rule] for rule in ("s3g", "bip", "fifo"))


def test_scans_do_not_flush_what_is_hot(seed: int) -> None:
    touches = []
    for turn in range(10):
        touches += skewed(15_000, 10_000, random.Random(seed))
        touches += range(20_000 + turn * 4000, 24_000 + turn * 4000)
    found = ratios(touches, 0.05)
    assert found["s3g"] < 0.9 * found["fifo"]


def test_a_tail_names_the_oldest_pages_and_touched_ones_return() -> None:
    evictor = Evictor("clock", pages=PAGES, capacity=8, tail=128)
    for page in range(8):
        evictor.insert(page)
    assert [evictor.stage() for _ in range(5)] == [0, 1, 2, 3, None]
    evictor.touch(1)
    assert [evictor.victim() for _ in range(3)] == [0, 2, 3]


def test_names() -> None:
    assert names()[0] == "s3g"
    with pytest.raises(KeyError):
        Evictor("psychic", pages=1, capacity=1)
