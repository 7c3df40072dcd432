"""One repetition of each measurement of `userswap bench nvme`, against bench/nvme_target.py.

Responsible for: a target process on a CPU, connections to it, and what is timed on them: raw round
trips, the loop in C, the store. All of it blocks or runs a loop of its own; nothing runs beside it.
Must not know: how often, in which order, how results are shown.
"""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from userswap.backends.nvme_tcp.controller import Controller, Ready, Settings
from userswap.backends.nvme_tcp.native_queue import NativeQueuePair
from userswap.backends.nvme_tcp.qpair import Connected, QueuePair
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run
from userswap.bench.nvme_target import ANSWER, ASK, BLOCK, NQN, RAW
from userswap.native import check, ffi, lib

BLOCKS = 1 << 14
WARM = 500


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one operation, and how many there were in a second."""

    p50: float
    p99: float
    p999: float
    rate: float

    @classmethod
    def of(cls, nanoseconds: list[int], elapsed: float) -> Times:
        ordered = sorted(nanoseconds)

        def share(part: float) -> float:
            return ordered[min(len(ordered) - 1, int(part * len(ordered)))] / 1000

        return cls(share(0.5), share(0.99), share(0.999), len(ordered) / elapsed)


@contextmanager
def target(cpu: int, *, spin: bool) -> Iterator[int]:
    """The port of a target that runs on that CPU."""
    program = [sys.executable, "-P", "-m", "userswap.bench.nvme_target"]
    options = ["--cpu", str(cpu), "--blocks", str(BLOCKS), *(["--spin"] if spin else [])]
    with subprocess.Popen(
        program + options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            yield int(child.stdout.readline())
        finally:
            child.stdin.close()


def url(port: int, *, digests: bool = False) -> str:
    on = "&hdr_digest=on&data_digest=on" if digests else ""
    return f"nvme+tcp://127.0.0.1:{port}/{NQN}?nr_io_queues=1{on}"


def raw(port: int, count: int, *, spin: bool) -> Times:
    """Round trips of the bytes of a read, and nothing else."""
    took = ffi.new("uint64_t[]", count + WARM)
    with _connected(port) as connection:
        connection.sendall(RAW)
        time.sleep(0.01)  # so that the byte is taken before more come
        number = connection.fileno()
        check(lib.us_nvme_ping(number, ASK, ANSWER, WARM, spin, took))
        began = time.perf_counter()
        check(lib.us_nvme_ping(number, ASK, ANSWER, count, spin, took))
        elapsed = time.perf_counter() - began
    return Times.of(ffi.unpack(took, count), elapsed)


def loop(port: int, depth: int, count: int, *, spin: bool) -> Times:
    """Reads by the loop in C, which sends and receives what a host does."""
    settings = Settings(NQN, "nqn.2026-01.io.userswap:loop", b"userswap's bench", keep_alive_tmo=0)
    took = ffi.new("uint64_t[]", count + WARM)
    with _connected(port) as admin, _connected(port) as connection:
        controller = Controller(settings, 0.0)
        _bring_up(controller, admin, Ready)
        _bring_up(controller.io_queue(1, 0.0), connection, Connected)
        bare = ffi.new(
            "struct us_nvme_bare *", {"blocks": BLOCKS, "block_size": BLOCK, "spin": spin}
        )
        number = connection.fileno()
        check(lib.us_nvme_bare_ask(number, bare, depth, WARM, took))
        began = time.perf_counter()
        check(lib.us_nvme_bare_ask(number, bare, depth, count, took))
        elapsed = time.perf_counter() - began
    return Times.of(ffi.unpack(took, count), elapsed)


def store(port: int, depth: int, count: int, *, digests: bool = False) -> Times:
    """Reads by the store, each awaited by itself."""
    return asyncio.run(_store(url(port, digests=digests), depth, count))


async def _store(place: str, depth: int, count: int) -> Times:
    store = await open_stack(place, Geometry(BLOCKS // 2))
    try:
        await store.write([Run(0, memoryview(bytearray(BLOCK)))])  # the namespace is taken
        generator = random.Random(1)
        pages = iter([generator.randrange(BLOCKS // 2) for _ in range(count + WARM)])
        took: list[int] = []
        began = 0.0

        async def reader() -> None:
            nonlocal began
            buffer = memoryview(bytearray(BLOCK))
            for page in pages:
                before = time.perf_counter_ns()
                await store.read([Run(page, buffer)])
                took.append(time.perf_counter_ns() - before)
                if len(took) == WARM:
                    began = time.perf_counter()
                await asyncio.sleep(0)  # as faults, each begins in a turn of the loop of its own

        await asyncio.gather(*(reader() for _ in range(depth)))
        return Times.of(took[WARM:], time.perf_counter() - began)
    finally:
        await store.aclose()


@contextmanager
def _connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def _bring_up(
    end: Controller | QueuePair | NativeQueuePair, connection: socket.socket, until: type[Any]
) -> None:
    while True:
        for part in end.data_to_send():
            connection.sendall(part)
        for event in end.receive_data(connection.recv(1 << 16), 0.0):
            if isinstance(event, until):
                return
