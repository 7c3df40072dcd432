"""The pager's end of a connection: what it refuses leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from userswap.engine.connection import Connection
from userswap.engine.control import Message, receive, send

HELLO = {
    "op": "hello",
    "features": 0,
    "fault_path": "native",
    "placement": 0,
    "mover": "move",
    "canary": 0,
}
NOBODY = 1 << 22
"""No process has this number: it is the most that the kernel gives out."""


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Peer:
    """A client that says what it likes, beside the pager's end in one process."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.connection = Connection(theirs)
        self.connection.open()

    def say(self, message: Message, descriptors: int = 0) -> None:
        """Send a message with copies of one descriptor, none of which stays open here."""
        reading, writing = os.pipe()
        send(self.socket, message, [reading] * descriptors)
        os.close(reading)
        os.close(writing)

    async def ask(self, message: Message, descriptors: int = 0) -> Message:
        self.say({"id": 1, **message}, descriptors)
        while True:
            try:
                answer, received = receive(self.socket)
            except BlockingIOError:
                await asyncio.sleep(0.001)
                continue
            for descriptor in received:
                os.close(descriptor)
            assert answer is not None
            return answer

    async def close(self) -> None:
        await self.connection.close()
        self.socket.close()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    made = Peer()
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        ({**HELLO, "pid": os.getpid()}, 0),
        ({**HELLO, "pid": os.getpid()}, 2),
        ({**HELLO, "pid": os.getpid()}, 8),
        ({**HELLO, "pid": os.getpid(), "placement": "moon"}, 1),
        ({**HELLO, "pid": os.getpid(), "mover": "moon"}, 1),
        ({**HELLO, "pid": os.getpid(), "features": None}, 1),
        ({**HELLO, "pid": os.getppid()}, 1),
        (HELLO, 1),
        ({"op": "hello"}, 1),
        ({"op": "open"}, 8),
        ({"op": "stats", "region": 1}, 3),
        ({"op": "nonsense"}, 1),
        ({"op": None}, 1),
        ({}, 1),
    ],
)
async def test_what_is_refused_leaves_no_descriptor(
    peer: Peer, message: Message, descriptors: int
) -> None:
    before = open_descriptors()
    for _ in range(3):
        assert not (await peer.ask(message, descriptors))["ok"]
        assert open_descriptors() == before


@pytest.mark.parametrize("descriptors", [0, 1, 5])
async def test_a_second_hello_is_refused(peer: Peer, descriptors: int) -> None:
    assert (await peer.ask({**HELLO, "pid": os.getpid()}, 1))["ok"]
    before = open_descriptors()
    assert not (await peer.ask({**HELLO, "pid": os.getpid()}, descriptors))["ok"]
    assert not (await peer.ask({"op": "quiesce", "region": 7}, descriptors))["ok"]
    assert open_descriptors() == before


@pytest.mark.parametrize("pid", [NOBODY, -1, "me", None, os.getppid()])
async def test_nobody_is_somebody_else(peer: Peer, pid: object) -> None:
    answer = await peer.ask({**HELLO, "pid": pid}, 1)
    assert not answer["ok"]
    assert f"this is process {os.getpid()}" in answer["error"]
    assert (await peer.ask({**HELLO, "pid": os.getpid()}, 1))["ok"]


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 10])
async def test_a_connection_that_ends_leaves_no_descriptor(turns: int) -> None:
    before = open_descriptors()
    peer = Peer()
    peer.say({**HELLO, "pid": os.getpid(), "id": 1}, 1)
    peer.say({"op": "open", "id": 2}, 4)
    peer.say({"op": "quiet", "id": 3}, 8)
    for _ in range(turns):
        await asyncio.sleep(0)
    await peer.close()
    assert open_descriptors() == before
