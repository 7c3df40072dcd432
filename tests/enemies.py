"""Clients of a daemon that mean harm, each function in a process of its own (daemons.py)."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Sequence

from daemons import MIB, PAGE
from userswap import Region
from userswap.engine.control import Message, receive, send
from userswap.engine.listening import dial
from userswap.native import check, ffi, lib


class Enemy:
    """A client that says hello as it should, and then does as it likes."""

    def __init__(self, path: str) -> None:
        self.socket, _ = dial(path)
        out, features = ffi.new("int[2]"), ffi.new("uint64_t *")
        check(lib.us_agent_open(False, out, out + 1, features))
        self.uffd, self.features = out[0], features[0]
        self.number = 0
        self.given: list[int] = []

    def say(self, operation: str, descriptors: Sequence[int] = (), **arguments: object) -> None:
        self.number += 1
        send(self.socket, {"id": self.number, "op": operation, **arguments}, descriptors)

    def ask(self, operation: str, descriptors: Sequence[int] = (), **arguments: object) -> Message:
        self.say(operation, descriptors, **arguments)
        while True:
            answer, self.given = receive(self.socket)
            assert answer is not None, "it has hung up"
            if answer.get("id") == self.number:
                return answer

    def hello(self, **different: object) -> Message:
        usual: Message = {
            "pid": os.getpid(),
            "features": self.features,
            "fault_path": "native",
            "placement": 0,
            "mover": "move",
            "canary": 0,
        }
        return self.ask("hello", [self.uffd], **{**usual, **different})

    def serve(self, staging: int = 1 << 40) -> list[int]:
        """Become a client whose agent is nobody; the channel and the agent's two descriptors."""
        answer = self.hello()
        assert answer["ok"], answer
        given = self.given[:3]
        answer = self.ask("agent", staging=staging, tid=os.getpid())
        assert answer["ok"], answer
        return given

    def open(self, memory: mmap.mmap, **different: object) -> Message:
        start = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
        usual: Message = {
            "start": start,
            "pages": len(memory) // PAGE,
            "limit": 4 * MIB,
            "store": "fast",
            "name": None,
            "grow": True,
            "prefetch": "none",
        }
        answer = self.ask("open", **{**usual, **different})
        if answer["ok"]:
            check(lib.us_agent_register(self.uffd, start, len(memory)))
        return answer


def memory_of(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def write_from_a_thread(memory: mmap.mmap) -> None:
    """Fault on all of it, as far as one comes."""

    def run() -> None:
        lib.us_touch_run(plan, result)

    sample = ffi.new("uint8_t[]", PAGE)
    plan, result = ffi.new("struct us_touch_plan *"), ffi.new("struct us_touch_result *")
    plan.memory = ffi.cast("uint8_t *", ffi.from_buffer(memory))
    plan.sample, plan.sample_pages = sample, 1
    order = ffi.new("uint32_t[]", list(range(len(memory) // PAGE)))
    versions = ffi.new("uint32_t[]", len(memory) // PAGE)
    plan.order, plan.versions, plan.count = order, versions, len(memory) // PAGE
    plan.operation, plan.threads = lib.US_TOUCH_FILL, 1
    plan.cpus[0] = -1
    keep.append((sample, order, versions, plan, result))
    threading.Thread(target=run, daemon=True).start()


keep: list[object] = []


def garbage(path: str) -> None:
    """What is no message, with descriptors."""
    reading, writing = os.pipe()
    for payload in (b"{", b"[]", b"\xff", b'{"op":' * 9000, b"{}" + bytes(70000), b"x" * 200000):
        connection, _ = dial(path)
        with contextlib.suppress(OSError):
            socket.send_fds(connection, [payload], [reading, writing] * 4)
        with contextlib.suppress(OSError, Exception):
            receive(connection)
        connection.close()


def descriptors(path: str) -> None:
    """Descriptors with every request, each more than the last."""
    enemy = Enemy(path)
    enemy.serve()
    reading, writing = os.pipe()
    for count in range(300):
        enemy.ask("stats", [reading, writing] * (count % 5), region=1)
    for operation in ("hello", "open", "agent", "close", "quiet", "nonsense"):
        assert not enemy.ask(operation, [reading] * 8).get("ok") or operation == "quiet"


def lies(path: str) -> None:
    """A hello that is not true, and numbers that cannot be."""
    for different in (
        {"pid": os.getppid()},
        {"pid": 1},
        {"fault_path": "asyncio"},
        {"placement": 77},
        {"placement": -1},
        {"mover": "bulldozer"},
        {"mover": ["move"]},
        {"features": -1},
        {"features": 1 << 70},
        {"features": "all"},
        {"features": [1]},
    ):
        enemy = Enemy(path)
        assert not enemy.hello(**different)["ok"], different
        enemy.socket.close()
        os.close(enemy.uffd)
    for kind in (os.open("/dev/null", os.O_RDWR), os.open("/tmp", os.O_RDONLY), *os.pipe()):
        enemy = Enemy(path)
        os.close(enemy.uffd)
        enemy.uffd = kind
        answer = enemy.hello()
        assert not answer["ok"]
        assert "no userfaultfd" in answer["error"]
    enemy = Enemy(path)
    assert enemy.hello()["ok"]
    for staging, thread in ((0, os.getpid()), (5, os.getpid()), (1 << 63, os.getpid())):
        assert not enemy.ask("agent", staging=staging, tid=thread)["ok"]
    for thread in (1, os.getppid(), 0, -1, 1 << 40):
        assert not enemy.ask("agent", staging=1 << 40, tid=thread)["ok"]


def numbers(path: str) -> None:
    """Regions that cannot be, and requests about regions that are not there."""
    enemy = Enemy(path)
    enemy.serve()
    memory = memory_of(4 * MIB)
    assert enemy.open(memory)["ok"]
    huge = 1 << 62
    regions: tuple[Message, ...] = (
        {"start": -PAGE}, {"start": 1}, {"start": 0}, {"start": huge}, {"start": 1 << 70},
        {"start": None}, {"start": [PAGE]}, {"start": 1e308}, {"pages": 0}, {"pages": -1},
        {"pages": huge}, {"pages": 1 << 40}, {"pages": "many"}, {"limit": 0}, {"limit": -5},
        {"limit": huge * huge}, {"limit": {}}, {"store": "ram:lz4"}, {"store": "/etc/passwd"},
        {"store": "file:/etc/passwd"}, {"store": ["fast"]}, {"store": None}, {"prefetch": "x"},
        {"prefetch": 7}, {"name": 5}, {"name": "\n"}, {"pages": float("inf")}, {},
    )  # fmt: skip
    for different in regions:
        answer = enemy.open(memory, **different)  # {}: it overlaps the first
        assert not answer["ok"], different
    for operation in ("stats", "limit", "prefetch", "discard", "flush", "quiesce", "resume"):
        wrong: tuple[object, ...] = (0, -1, 2, 1 << 80, "1x", None, [], {}, 1.5e300)
        for region in wrong:
            answer = enemy.ask(operation, region=region, limit=1, first=0, count=1)
            assert not answer["ok"], (operation, region)
    for operation in ("prefetch", "discard"):
        for first, count in ((-1, 1), (0, -1), (0, huge), (huge, 1), (1024, 1), (0, 1025), ("", 1)):
            answer = enemy.ask(operation, region=1, first=first, count=count)
            assert not answer["ok"], (operation, first, count)
    limits: tuple[object, ...] = (0, -1, "x", None, [])
    for limit in limits:
        assert not enemy.ask("limit", region=1, limit=limit)["ok"], limit
    assert enemy.ask("limit", region=1, limit=huge)["ok"]
    assert enemy.ask("stats", region=1)["stats"]["resident_limit"] <= 4 * MIB


def no_agent(path: str) -> None:
    """Nobody takes the orders; faults go on."""
    enemy = Enemy(path)
    enemy.serve()
    memory = memory_of(16 * MIB)
    assert enemy.open(memory)["ok"]
    write_from_a_thread(memory)
    enemy.say("quiesce", region=1)
    enemy.say("discard", region=1, first=0, count=4096)
    time.sleep(3)


def deaf(path: str) -> None:
    """Asks, and reads no answer."""
    enemy = Enemy(path)
    enemy.serve()
    memory = memory_of(4 * MIB)
    assert enemy.open(memory)["ok"]
    enemy.socket.setblocking(False)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            enemy.say("stats", region=1)
            continue
        time.sleep(0.001)


def forger(path: str) -> None:
    """Writes into the channel what it likes, and takes away what was shared."""
    enemy = Enemy(path)
    channel, order, done = enemy.serve()
    size = os.fstat(channel).st_size
    for change in (os.ftruncate, lambda fd, _: fcntl.fcntl(fd, 1033, 0)):
        with contextlib.suppress(OSError):
            change(channel, 0)
    assert os.fstat(channel).st_size == size
    shared = mmap.mmap(channel, size)
    memory = memory_of(16 * MIB)
    assert enemy.open(memory)["ok"]
    write_from_a_thread(memory)
    for descriptor in (order, done, enemy.uffd):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ os.O_NONBLOCK)
    head, rnd = min(size, 72 << 10), random.Random(1)
    deadline = time.monotonic() + 4
    patterns = [rnd.randbytes(head), b"\xff" * head, bytes(head), b"\3\0\0\0" * (head // 4)]
    while time.monotonic() < deadline:
        shared[:head] = patterns[rnd.randrange(4)]
        shared[rnd.randrange(head)] = rnd.randrange(256)
        fcntl.fcntl(done, fcntl.F_SETFL, os.O_NONBLOCK)
        with contextlib.suppress(OSError):
            os.write(done, rnd.randbytes(4096))
        with contextlib.suppress(OSError):
            os.write(order, b"\xff" * 8)
        fcntl.fcntl(enemy.uffd, fcntl.F_SETFL, os.O_NONBLOCK)


def crowd(path: str) -> None:
    """More connections than a user may have; some say hello and some nothing."""
    enemies = []
    for _ in range(40):
        with contextlib.suppress(OSError, AssertionError):
            enemy = Enemy(path)
            enemies.append(enemy)
            if len(enemies) % 2:
                enemy.hello()
    refused = Enemy(path)
    with contextlib.suppress(OSError, AssertionError):
        answer = refused.hello()
        assert not answer["ok"]
        assert "the most that one may have" in answer["error"]


def greedy(path: str) -> None:
    """More regions and bytes than a user may have."""
    enemy = Enemy(path)
    enemy.serve()
    memory = memory_of(MIB)
    start = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    answer = enemy.ask("open", **opening(start, 1 << 40))
    assert not answer["ok"]
    assert "too many" in answer["error"], answer
    for index in range(256):
        answer = enemy.ask("open", **opening(start + index * PAGE, PAGE))
        if not answer["ok"]:
            assert "regions here" in answer["error"] or "promised" in answer["error"], answer
            return
    raise AssertionError("no end to it")


def opening(start: int, size: int) -> Message:
    return {
        "start": start,
        "pages": size // PAGE,
        "limit": size,
        "store": "fast",
        "name": None,
        "grow": True,
        "prefetch": "none",
    }


def torn(path: str) -> None:
    """Unmaps, remaps and protects its region while it is paged."""
    region = Region(8 * MIB, resident=2 * MIB, pager=path, store="fast", on_pager_death="block")
    memory, rnd = region.memory, random.Random(2)
    for index in range(len(memory) // PAGE):
        memory[index * PAGE] = 1
    start, library = int(ffi.cast("uintptr_t", ffi.from_buffer(memory))), ctypes.CDLL(None)
    for turn in range(300):
        at = ctypes.c_void_p(start + rnd.randrange(len(memory) // PAGE) * PAGE)
        library.madvise(at, ctypes.c_size_t(PAGE), mmap.MADV_DONTNEED)
        if turn % 3 == 0:
            library.munmap(at, ctypes.c_size_t(PAGE))
    time.sleep(0.5)


HOSTILE = (garbage, descriptors, lies, numbers, no_agent, deaf, forger, torn, crowd, greedy)
