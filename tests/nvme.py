"""Both ends of NVMe over TCP in one process: what one sends the other receives, cut at will.

A target here keeps its blocks in a bytearray and answers at once, unless the test wants otherwise.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from userswap.backends.nvme_tcp import controller as host
from userswap.backends.nvme_tcp.command import Io, Status
from userswap.backends.nvme_tcp.identify import Namespace
from userswap.backends.nvme_tcp.qpair import Options, QueuePair
from userswap.backends.nvme_tcp.target import Operation, Rules, Session, Target

SUBSYSTEM = "nqn.2026-01.test:memory"
HOST = "nqn.2026-01.test:host"
HOST_ID = bytes(range(16))
BLOCKS = 1024

Cut = Callable[[bytes], Iterator[bytes]]


def whole(data: bytes) -> Iterator[bytes]:
    if data:
        yield data


def single(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def at_random(seed: int) -> Cut:
    rng = random.Random(seed)

    def cut(data: bytes) -> Iterator[bytes]:
        while data:
            count = min(rng.choice((1, 2, 7, 8, 24, 72, 100, 1500, 5000)), len(data))
            yield data[:count]
            data = data[count:]

    return cut


def settings(**changes: object) -> host.Settings:
    given: dict[str, object] = {"subsystem": SUBSYSTEM, "host": HOST, "host_id": HOST_ID}
    return host.Settings(**{**given, **changes})  # type: ignore[arg-type]


def with_digests(header: bool, data: bool, **more: object) -> Options:
    return Options(header_digest=header, data_digest=data, **more)  # type: ignore[arg-type]


@dataclass
class Medium:
    """A namespace in memory."""

    block_size: int = 4096
    blocks: int = BLOCKS
    data: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.data = bytearray(self.blocks * self.block_size)

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.blocks, self.block_size, nguid=bytes(range(16)))

    def perform(self, operation: Operation) -> bytes:
        size = self.block_size
        for first, count in operation.ranges:
            place = slice(first * size, (first + count) * size)
            if operation.kind == Io.READ:
                return bytes(self.data[place])
            if operation.kind == Io.WRITE:
                self.data[place] = operation.data
            else:
                self.data[place] = bytes(count * size)
        return b""


@dataclass
class Link:
    """A connection of a host's end and a target's session, with everything that went over it."""

    host: host.Controller | QueuePair
    session: Session
    medium: Medium
    cut: Cut = whole
    now: float = 0.0
    events: list[object] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    to_target: bytearray = field(default_factory=bytearray)
    to_host: bytearray = field(default_factory=bytearray)
    answering: bool = True

    def run(self) -> list[object]:
        """Carry bytes until nobody has any; what the host's end told since the last time."""
        while True:
            up = b"".join(map(bytes, self.host.data_to_send()))
            self.to_target += up
            for part in self.cut(up):
                for event in self.session.receive_data(part, self.now):
                    if isinstance(event, Operation):
                        self.operations.append(event)
            if self.answering:
                self.answer()
            down = b"".join(map(bytes, self.session.data_to_send()))
            self.to_host += down
            for part in self.cut(down):
                self.events += self.host.receive_data(part, self.now)
            if not up and not down:
                events, self.events = self.events, []
                return events

    def answer(self, status: int = 0) -> None:
        operations, self.operations = self.operations, []
        for operation in operations:
            data = b"" if status else self.medium.perform(operation)
            self.session.complete(operation, status, data)


@dataclass
class World:
    """A target and hosts that connect to it."""

    medium: Medium = field(default_factory=Medium)
    rules: Rules = field(default_factory=Rules)
    cut: Cut = whole
    target: Target = field(init=False)

    def __post_init__(self) -> None:
        self.target = Target(
            SUBSYSTEM,
            {1: self.medium.namespace},
            self.rules,
            serial="1",
            listens=[("127.0.0.1", "4420")],
        )

    def link(self, end: host.Controller | QueuePair, now: float = 0.0) -> Link:
        return Link(end, self.target.accept(now), self.medium, self.cut, now)

    def controller(self, wanted: host.Settings | None = None) -> tuple[host.Controller, Link]:
        controller = host.Controller(wanted or settings(), 0.0)
        return controller, self.link(controller)

    def ready(self, wanted: host.Settings | None = None) -> tuple[host.Controller, Link]:
        """A controller that was brought up."""
        controller, link = self.controller(wanted)
        events = link.run()
        assert [type(event) for event in events] == [host.Ready], events
        return controller, link

    def queue(self, wanted: host.Settings | None = None) -> tuple[QueuePair, Link]:
        """An I/O queue, connected, of a controller of its own."""
        controller, _ = self.ready(wanted)
        queue = controller.io_queue(1, 0.0)
        link = self.link(queue)
        (connected,) = link.run()
        assert type(connected).__name__ == "Connected", connected
        return queue, link


MEDIUM_ERROR = Status.UNRECOVERED_READ
