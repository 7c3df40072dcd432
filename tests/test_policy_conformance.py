"""The conformance suite of policies: ours pass, and each check knows a policy that is wrong."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from userswap.engine.policies import eviction, prefetch
from userswap.engine.policy_conformance import ConformanceError, check_policy


@pytest.mark.parametrize("name", prefetch.names())
def test_our_prefetch_policies(name: str) -> None:
    check_policy(partial(prefetch.Prefetcher, name))


@pytest.mark.parametrize("name", eviction.names())
def test_our_eviction_policies(name: str) -> None:
    check_policy(partial(eviction.Evictor, name, pages=4096, capacity=500))


class Next:
    """A policy as a user may write it."""

    def fault(self, page: int) -> Iterable[int]:
        return range(page + 1, page + 5)


class Queue:
    def __init__(self) -> None:
        self.pages: deque[int] = deque()

    def insert(self, page: int, *, ahead: bool = False) -> None:
        self.pages.append(page)

    def touch(self, page: int) -> None:
        pass

    def victim(self) -> int | None:
        return self.pages.popleft() if self.pages else None


def test_small_policies_of_a_users_own() -> None:
    check_policy(Next)
    check_policy(Queue)


class Nothing(Next):
    def fault(self, page: int) -> Any:
        return None


class Floating(Next):
    def fault(self, page: int) -> Any:
        return [page + 1.0]


class Everything(Next):
    def fault(self, page: int) -> Iterable[int]:
        return range(page + 1, page + 1_000_000)


class Itself(Next):
    def fault(self, page: int) -> Iterable[int]:
        return range(page, page + 5)


class Common(Next):
    last = 0

    def fault(self, page: int) -> Iterable[int]:
        step, Common.last = page - Common.last, page
        return [page + step] if step else []


class Slow(Next):
    def fault(self, page: int) -> Iterable[int]:
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        return ()


class Talking(Next):
    def used(self, page: int) -> Any:
        return [page]


class Invents(Queue):
    def victim(self) -> int | None:
        return super().victim() or 9999


class Keeps(Queue):
    def victim(self) -> int | None:
        return self.pages[0] if self.pages else None


class Loses(Queue):
    def insert(self, page: int, *, ahead: bool = False) -> None:
        if not ahead:
            self.pages.append(page)


class TakesEachOnce(Queue):
    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()

    def insert(self, page: int, *, ahead: bool = False) -> None:
        if page not in self.known or page > 100:
            self.pages.append(page)
        self.known.add(page)


@pytest.mark.parametrize(
    ("make", "about"),
    [
        (object, "neither"),
        (Nothing, "not pages"),
        (Floating, "not a page number"),
        (Everything, "more than 256"),
        (Itself, "just faulted"),
        (Common, "another of its kind"),
        (Slow, "late"),
        (Talking, "nobody listens"),
        (Invents, "before any page"),
        (Keeps, "not here"),
        (Loses, "no victim"),
        (TakesEachOnce, "no victim"),
    ],
)
def test_wrong_policies_are_told(make: Callable[[], Any], about: str) -> None:
    with pytest.raises(ConformanceError, match=about):
        check_policy(make)
