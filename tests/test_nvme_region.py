"""Memory on another machine: regions that page to a namespace whose connections are cut."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

import nvme_scenarios
import scenarios
from nvme_remote import Cached, Proxy, started, url
from proof import Child, call, check, soon
from userswap.backends.nvme_tcp.server import Server
from userswap.engine import probe

pytestmark = pytest.mark.privileged  # the kernel itself faults on these pages
LOSES = pytest.mark.skipif(
    not probe.gather().has(probe.FEATURE_POISON),
    reason="before Linux 6.6 who touches a lost page waits, instead of getting SIGBUS",
)
PAGES = 1 << 13

T = TypeVar("T")


class World:
    """A target and a way to it that can be cut, on a thread of their own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.medium = Cached(PAGES)
        self.server: Server
        self.proxy: Proxy

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    async def start(self) -> None:
        self.server = await started(self.medium)
        self.proxy = await Proxy(self.server.address[1]).__aenter__()

    async def stop(self) -> None:
        await self.proxy.__aexit__()
        await self.server.stop()

    async def restart(self) -> None:
        """The target loses its power, and what its cache held."""
        port = self.server.address[1]
        self.medium.lose_power()
        await self.server.stop()
        self.medium.regain_power()
        self.server = await started(self.medium, port=port)

    async def cut(self) -> None:
        self.proxy.cut()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.thread.start()
    try:
        world.do(world.start())
        yield world
        world.do(world.stop())
    finally:
        world.loop.call_soon_threadsafe(world.loop.stop)
        world.thread.join()
        world.loop.close()


@contextlib.contextmanager
def meanwhile(world: World, disturb: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Disturb again and again from the first evictions on, until the block ends."""
    over = threading.Event()

    def go_on() -> None:
        soon(lambda: over.is_set() or world.server.counts["write"] > 100, 20)
        while not over.wait(0.3):
            world.do(disturb())

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def place(world: World, **options: object) -> str:
    return url(world.proxy.address, reconnect_delay="10ms", **options)


def count(world: World, seed: int, steps: int, **options: object) -> None:
    store = place(world, **options)
    print(check(call(scenarios.count, seed=seed, store=store, steps=steps)))


def test_connections_that_are_cut_anywhere(world: World, seed: int) -> None:
    rng = random.Random(seed)
    whole = 3  # the first association
    world.proxy.cuts = lambda: rng.randrange(1_000_000) if world.proxy.accepted > whole else None
    with meanwhile(world, world.cut):
        count(world, seed, 1500, data_digest="on")
    assert world.proxy.cut_connections > 3


def test_a_target_that_loses_its_power(world: World, seed: int) -> None:
    with meanwhile(world, world.restart):
        count(world, seed, 1500)
    assert world.proxy.accepted > 3
    assert soon(lambda: not world.server.connections, 20)


def test_a_fault_waits_for_a_target_that_is_away(world: World) -> None:
    with Child(call(nvme_scenarios.touch_when_told, store=place(world))) as child:
        child.said("ready")
        world.do(world.server.stop())
        child.go_on()
        soon(lambda: "no way back yet" in child.err, 20)
        assert child.process.poll() is None, "waits for its store"
        world.do(world.restart())
        assert child.wait() == 0
        assert "back after" in child.err


@LOSES
def test_a_fault_that_waited_too_long_is_a_signal(world: World) -> None:
    store = place(world, ctrl_loss_tmo="500ms")
    with Child(call(nvme_scenarios.touch_when_told, store=store)) as child:
        child.said("ready")
        world.do(world.server.stop())
        soon(lambda: "ctrl_loss_tmo=0.5s is over" in child.err, 20)
        child.go_on()
        assert child.wait() == -signal.SIGBUS
