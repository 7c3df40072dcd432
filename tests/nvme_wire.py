"""Two machines in one: network namespaces that a wire joins, which is slow, loses packets, is cut.

The wire is a process that carries packets between two TUN devices: it needs no traffic control of
the kernel, which many are built without. It obeys lines on its standard input: `delay SECONDS`,
`loss SHARE`, `cut`, `mend`; it answers each with the number of packets that it has dropped so far.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from packages import CANNOT_BE_HAD

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
MTU = 9000
QUEUE_PACKETS = 2000
BURST = 64
TARGET, HOST = "10.231.0.1", "10.231.0.2"


def make_tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


class Wire:
    """Carries packets from each end to the other one."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.ends = ends
        self.delay, self.loss, self.is_cut = 0.0, 0.0, False
        self.dropped = 0
        self._rng = random.Random(1)
        self._queue: deque[tuple[float, int, bytes]] = deque()

    def run(self) -> None:
        """Until standard input ends."""
        while True:
            wait = max(self._queue[0][0] - time.monotonic(), 0) if self._queue else None
            ready, _, _ = select.select([*self.ends, 0], [], [], wait)
            if 0 in ready:
                orders = os.read(0, 4096)
                if not orders:
                    return
                for order in orders.splitlines():
                    self._obey(*order.split())
            for end, other in (self.ends, self.ends[::-1]):
                if end in ready:
                    self._take(end, other)
            now = time.monotonic()
            while self._queue and self._queue[0][0] <= now:
                _, end, packet = self._queue.popleft()
                with contextlib.suppress(OSError):
                    os.write(end, packet)

    def _take(self, end: int, other: int) -> None:
        for _ in range(BURST):
            try:
                packet = os.read(end, MTU + 100)
            except BlockingIOError:
                return
            lost = self.is_cut or len(self._queue) >= QUEUE_PACKETS
            if lost or self._rng.random() < self.loss:
                self.dropped += 1
            else:
                self._queue.append((time.monotonic() + self.delay, other, packet))

    def _obey(self, word: bytes, value: bytes = b"0") -> None:
        if word == b"delay":
            self.delay = float(value)
        elif word == b"loss":
            self.loss = float(value)
        else:
            self.is_cut = word == b"cut"
            self._queue.clear()
        print(self.dropped, flush=True)


@dataclass
class Machines:
    """The namespaces of a target and of a host, and the wire between them."""

    wire: subprocess.Popen[str]
    target: str
    host: str

    def on(self, machine: str) -> tuple[str, ...]:
        """What runs a command there."""
        return ("ip", "netns", "exec", machine)

    def tell(self, order: str) -> int:
        """Change the wire; the packets that it has dropped."""
        assert self.wire.stdin is not None
        assert self.wire.stdout is not None
        self.wire.stdin.write(order + "\n")
        self.wire.stdin.flush()
        return int(self.wire.stdout.readline())


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    """Two of them; skips where they cannot be made."""
    number = os.getpid()
    names = (f"userswap-{number}-a", f"userswap-{number}-b")
    devices = (f"us{number}a", f"us{number}b")
    made: list[str] = []
    wire: subprocess.Popen[str] | None = None
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
            wire = subprocess.Popen(
                [sys.executable, __file__, *devices],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert wire.stdout is not None
            assert wire.stderr is not None
            if not wire.stdout.readline():
                raise OSError(wire.stderr.read().strip().rpartition("\n")[2])
            for name, device, address in zip(names, devices, (TARGET, HOST), strict=True):
                _ip("link", "set", device, "netns", name)
                _ip("-n", name, "address", "add", f"{address}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "mtu", str(MTU), "up")
        except OSError as error:
            pytest.skip(f"joined network namespaces: {CANNOT_BE_HAD} ({error})")
        yield Machines(wire, *names)
    finally:
        if wire is not None:
            wire.kill()
            wire.communicate()
        for name in made:
            _ip("netns", "delete", name)


if __name__ == "__main__":
    tuns = (make_tun(sys.argv[1]), make_tun(sys.argv[2]))
    print("ready", flush=True)
    Wire(tuns).run()
