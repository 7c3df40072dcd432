"""The contract of a policy (engine/policies/interface.py) as checks that every policy has to pass.

`check_policy(make)` runs all that apply, on fresh policies that `make` makes; it raises
ConformanceError with what is wrong. A test file, whole:

    from userswap.engine.policy_conformance import check_policy
    def test_mine() -> None:
        check_policy(Mine)

Must not know: any policy; pytest.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from userswap.engine.policies.interface import PAGES_MAX

PAGE_MAX = (1 << 32) - 1
FAULTS = 2000
FEW = 50
AVERAGE_S = 0.001
"""Processor time for one answer: a policy that takes longer is always late."""


class ConformanceError(Exception):
    """A policy does not do what the contract says."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConformanceError(otherwise)


def check_policy(make: Callable[[], Any], *, seed: int = 1) -> None:
    """Put what `make` makes to the checks: a prefetch or an eviction policy, by its methods."""
    policy = make()
    if callable(getattr(policy, "fault", None)):
        checks: Sequence[Check] = PREFETCH_CHECKS
    elif all(callable(getattr(policy, name, None)) for name in ("insert", "touch", "victim")):
        checks = EVICTION_CHECKS
    else:
        raise ConformanceError("has neither fault() nor insert(), touch() and victim()")
    for check in checks:
        check(make, random.Random(seed))


# --- prefetch ---


def faults(draw: random.Random) -> list[int]:
    """A bit of everything: scans, strides, irregular orders again, the ends of the range."""
    irregular = draw.sample(range(1 << 20), 200)
    pages = [*range(100, 400), *range(9000, 8700, -1), *range(0, 7000, 7), *irregular, *irregular]
    pages += [0, PAGE_MAX, 0, PAGE_MAX, PAGE_MAX - 1, PAGE_MAX, 1, 0]
    pages += [draw.randrange(1 << 12) for _ in range(FAULTS - len(pages) % FAULTS)]
    return pages


def answer(policy: Any, page: int) -> list[int]:
    said = policy.fault(page)
    require(
        isinstance(said, Iterable), f"answers {said!r}, not pages: an empty tuple names no page"
    )
    named = []
    for each in said:
        require(type(each) is int, f"names {each!r}, which is not a page number")
        named.append(each)
        require(len(named) <= PAGES_MAX, f"names more than {PAGES_MAX} pages at once")
    return named


def check_answers_are_pages(make: Callable[[], Any], draw: random.Random) -> None:
    policy = make()
    for page in faults(draw):
        named = answer(policy, page)
        require(page not in named, "names the page that has just faulted, which is read anyway")


def check_hits_may_be_seen_or_not(make: Callable[[], Any], draw: random.Random) -> None:
    policy = make()
    used = getattr(policy, "used", None)
    if used is None:
        return
    for page in faults(draw):
        for named in answer(policy, page):
            if draw.random() < 0.2:
                require(used(named) is None, "answers in used(), where nobody listens")
    used(12345)  # never named: the program asked for it


def check_policies_share_nothing(make: Callable[[], Any], draw: random.Random) -> None:
    pages = faults(draw)
    alone = make()
    expected = [answer(alone, page) for page in pages]
    first, second = make(), make()
    for page, alone_said in zip(pages, expected, strict=True):
        answer(second, draw.randrange(1 << 20))
        require(
            answer(first, page) == alone_said, "answers otherwise when there is another of its kind"
        )


def check_answers_are_quick(make: Callable[[], Any], draw: random.Random) -> None:
    policy, pages = make(), faults(draw)
    for first in range(0, len(pages), FEW):
        began = time.thread_time()
        for page in pages[first : first + FEW]:
            answer(policy, page)
        took = (time.thread_time() - began) / FEW
        require(took <= AVERAGE_S, f"takes {1000 * took:.1f} ms for an answer: always late")


# --- eviction ---


def check_what_came_in_goes_out_once(make: Callable[[], Any], draw: random.Random) -> None:
    policy, here = make(), set[int]()
    require(policy.victim() is None, "names a victim before any page came in")
    for _ in range(FAULTS):
        page = draw.randrange(4096)
        if page in here:
            policy.touch(page)
        else:
            policy.insert(page, ahead=draw.random() < 0.3)
            here.add(page)
        if len(here) > 500:
            here.remove(_victim(policy, here))
    while here:
        here.remove(_victim(policy, here))
    require(policy.victim() is None, "names a victim after the last has gone")


def _victim(policy: Any, here: set[int]) -> int:
    page = policy.victim()
    require(page is not None, f"names no victim of {len(here)} pages")
    require(page in here, f"names page {page!r}, which is not here")
    return int(page)


def check_a_victim_that_cannot_go_comes_back(make: Callable[[], Any], draw: random.Random) -> None:
    policy, here = make(), set(range(100))
    for page in here:
        policy.insert(page)
    for _ in range(300):
        policy.insert(_victim(policy, here))  # pinned, or touched at that moment
    while here:
        here.remove(_victim(policy, here))


def check_victims_are_named_quickly(make: Callable[[], Any], draw: random.Random) -> None:
    policy = make()
    began = time.thread_time()
    for page in range(FAULTS):
        policy.insert(page)
    for _ in range(FAULTS):
        policy.victim()
    took = (time.thread_time() - began) / FAULTS
    require(took <= AVERAGE_S, f"takes {1000 * took:.1f} ms for a victim: faults would wait")


Check = Callable[[Callable[[], Any], random.Random], None]
PREFETCH_CHECKS: tuple[Check, ...] = (
    check_answers_are_quick,  # first: the others take as long as their answers
    check_answers_are_pages,
    check_hits_may_be_seen_or_not,
    check_policies_share_nothing,
)
EVICTION_CHECKS: tuple[Check, ...] = (
    check_what_came_in_goes_out_once,
    check_a_victim_that_cannot_go_comes_back,
    check_victims_are_named_quickly,
)
