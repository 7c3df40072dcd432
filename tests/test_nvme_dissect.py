"""Wireshark's dissector on NVMe/TCP of ours: it finds every PDU of both ends, whole and right.

Here both ends are ours; with Linux's at the other end, in a virtual machine, by `make vm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import linux_host
import nvmet_host
from dissect import dissect, pdus, read_capture, write_capture
from machine import Machine
from nvme import BLOCKS, Link, World, settings, with_digests
from nvmet_vm import Nvmet, target_machine
from packages import MissingError
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp.identify import DISCOVERY_NQN
from userswap.backends.nvme_tcp.pdu import KNOWN, PduType
from userswap.backends.nvme_tcp.qpair import QueuePair

PORT = 4420
GOOD = "1"
EVERY_KIND = {int(kind) for kind in KNOWN}
TERM_REQUESTS = {int(PduType.H2C_TERM), int(PduType.C2H_TERM)}


def checked(path: Path) -> set[int]:
    """The kinds of PDUs that the capture has; all are found, none is malformed."""
    connections = read_capture(path)
    first_ways = [next(iter(connection)) for connection in connections if connection]
    try:
        found = dissect(path, {target[1] for _, target in first_ways})  # hosts speak first
    except MissingError as error:
        pytest.skip(str(error))
    assert found.complaints == []
    assert set(found.digests) <= {GOOD}
    kinds = set()
    for number, connection in enumerate(connections):
        for way, stream in connection.items():
            sent = pdus(stream)
            assert found.pdus[number, way[0][1]] == sent, (number, way)
            kinds |= {kind for kind, _ in sent}
    return kinds


class Recorded:
    """A link whose bytes are kept in the order in which they went."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.parts: list[tuple[bool, bytes]] = []

    def run(self) -> None:
        up, down = len(self.link.to_target), len(self.link.to_host)
        self.link.run()
        self.parts.append((True, bytes(self.link.to_target[up:])))
        self.parts.append((False, bytes(self.link.to_host[down:])))


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("data", [False, True])
def test_both_ends_are_ours(tmp_path: Path, header: bool, data: bool) -> None:
    world = World()
    options = with_digests(header, data)
    controller, link = world.controller(settings(options=options))
    admin = Recorded(link)
    admin.run()
    queues = [Recorded(world.link(controller.io_queue(1, 0.0))) for _ in range(2)]
    queues[0].run()
    use(queues[0])
    for namespace in (None, world.medium.namespace):
        world.target.set_namespace(1, namespace)
        admin.run()
    controller.shutdown(0.0)
    admin.run()
    _, finding = world.controller(settings(subsystem=DISCOVERY_NQN, options=options))
    discovery = Recorded(finding)
    discovery.run()
    kinds = set()
    for number, recorded in enumerate((admin, queues[0], discovery)):
        path = tmp_path / f"{number}.pcap"
        write_capture(path, PORT, recorded.parts)
        kinds |= checked(path)
    assert kinds == EVERY_KIND - TERM_REQUESTS


def use(recorded: Recorded) -> None:
    queue = recorded.link.host
    assert isinstance(queue, QueuePair)
    clear, ranges = nvme.deallocate(1, [(0, 8), (64, 1)])
    for command, given in (
        (nvme.write(1, 0, 1), bytes(range(256)) * 16),  # in its capsule
        (nvme.write(1, 1, 64), bytes(range(256)) * 1024),  # asked for
        (nvme.write_zeroes(1, 0, 1), None),
        (clear, ranges),
        (nvme.flush(1), None),
    ):
        queue.submit(command, 0.0, data=given)
        recorded.run()
    for first, count in ((0, 1), (1, 64), (BLOCKS, 1)):  # the last one fails
        into = memoryview(bytearray(count * 4096))
        queue.submit(nvme.read(1, first, count), 0.0, into=into)
    recorded.run()


@pytest.mark.parametrize("of_host", [False, True])
def test_ends_that_give_up(tmp_path: Path, of_host: bool) -> None:
    """Each of them is told something that it must not be."""
    world = World()
    controller, _ = world.ready(settings(options=with_digests(header=True, data=True)))
    queue = world.link(controller.io_queue(1, 0.0))
    queue.run()
    wrong = bytes([PduType.R2T, 1, 24, 0, 28, 0, 0, 0]) + bytes(20)
    up, down = bytes(queue.to_target), bytes(queue.to_host)
    parts = [(True, up), (False, down)]
    if of_host:
        queue.host.receive_data(wrong, 0.0)
        term = b"".join(map(bytes, queue.host.data_to_send()))
    else:
        queue.session.receive_data(wrong, 0.0)
        term = b"".join(map(bytes, queue.session.data_to_send()))
    path = tmp_path / "capture"
    write_capture(path, PORT, [*parts, (of_host, term)])
    assert checked(path) & TERM_REQUESTS == {2 if of_host else 3}


def captured(folder: Path, make: Callable[[], Machine], work: Callable[[Machine], object]) -> Path:
    """What went in and out of a machine."""
    try:
        machine = make()
    except MissingError as error:
        pytest.skip(f"no virtual machine for NVMe/TCP: {error}")
    path = folder / "capture"
    machine.capture(path)
    with machine:
        work(machine)
    return path


@pytest.mark.vm
@pytest.mark.timeout(900)
def test_linux_is_the_target(tmp_path: Path) -> None:
    def work(machine: Machine) -> None:
        nvmet = Nvmet(machine)
        for scenario in nvmet_host.SCENARIOS:
            scenario(nvmet)

    path = captured(tmp_path, partial(target_machine, tmp_path), work)
    assert checked(path) == EVERY_KIND - TERM_REQUESTS


@pytest.mark.vm
@pytest.mark.timeout(900)
def test_linux_is_the_host(tmp_path: Path) -> None:
    make = partial(linux_host.host_machine, tmp_path, "nvme")
    path = captured(tmp_path, make, linux_host.every_form)
    assert checked(path) == EVERY_KIND - TERM_REQUESTS
