"""What a host of ours does with Linux's target, command by command: no store, no region.

Each function is given a target that runs, and makes what it needs there. They are as sharp as the
protocol: which status, which event, which bytes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import product

import pytest

from nvme import with_digests
from nvme_socket import EndedError, Host
from nvmet_vm import Nvmet, Subsystem
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp.command import Status, code_of
from userswap.backends.nvme_tcp.controller import NamespaceChanged, Ready, ShutDown
from userswap.backends.nvme_tcp.identify import DISCOVERY_NQN
from userswap.backends.nvme_tcp.qpair import Options

PAGE = 4096
QUEUES = 5
FRIEND = "nqn.2026-01.test:friend"
QUICK = Options(connect_tmo=0.5)
IN_CAPSULE = 16 * 1024  # what nvmet takes; from here on it asks for the data
SIZES = (PAGE, IN_CAPSULE, IN_CAPSULE + PAGE, 40 * PAGE)


def linux(subsystem: Subsystem, **how: object) -> Host:
    return Host(subsystem.nvmet.address, subsystem=subsystem.nqn, **how)  # type: ignore[arg-type]


def everything_in_every_form(nvmet: Nvmet) -> None:
    """Both block sizes, all digests, with and without flow control, five queues, all commands."""
    for block in (512, PAGE):
        with nvmet.exported(block_size=block, write_cache=True) as (subsystem, _):
            for header, data, flow_control in product((False, True), repeat=3):
                options = with_digests(header, data)
                with linux(
                    subsystem, queues=QUEUES, flow_control=flow_control, options=options
                ) as host:
                    use(host, block, random.Random(block))


def use(host: Host, block: int, rng: random.Random) -> None:
    ready = host.found
    assert isinstance(ready, Ready)
    assert (ready.namespace.block_size, ready.controller.in_capsule) == (block, IN_CAPSULE)
    assert len(host.queues) == QUEUES
    for number, size in product(range(QUEUES), SIZES):
        data, first = rng.randbytes(size), rng.randrange(1000)
        host.write(first, data, block=block, fua=number == 1, at=number)
        assert host.read(first, size // block, block=block, at=-1 - number) == data
    count = 4 * PAGE // block
    for _ in range(host.queues[0].end.room):  # type: ignore[union-attr]
        host.submit(nvme.read(1, rng.randrange(1000), 1), into=memoryview(bytearray(block)))
    depth = ready.entries - (0 if host.controller.settings.flow_control is False else 1)
    assert set(host.finish(depth).values()) == {0}
    for clear in (nvme.write_zeroes(1, 8, count), None):
        host.write(0, rng.randbytes(16 * PAGE), block=block)
        if clear is None:
            clear, ranges = nvme.deallocate(1, [(8, count)])
            assert host.do(clear, ranges) == 0
        else:
            assert host.do(clear) == 0
        assert not any(host.read(8, count, block=block))
        assert any(host.read(8 + count, 1, block=block))
    assert host.do(nvme.flush(1)) == 0
    beyond = host.do(nvme.read(1, ready.namespace.blocks, 1), into=memoryview(bytearray(block)))
    assert code_of(beyond) == Status.INTERNAL_ERROR  # never "LBA out of range"
    assert not nvme.retryable(beyond)
    host.controller.shutdown(time.monotonic())
    host.hear(ShutDown)


def discovery(nvmet: Nvmet) -> None:
    with (
        nvmet.exported() as (subsystem, _),
        Host(nvmet.address, subsystem=DISCOVERY_NQN) as host,
    ):
        found = {entry.subsystem: entry for entry in host.found.entries}  # type: ignore[attr-defined]
        assert set(found) == {DISCOVERY_NQN, subsystem.nqn}
        assert found[subsystem.nqn].service == "4420"


def a_namespace_goes_and_returns(nvmet: Nvmet) -> None:
    with nvmet.exported() as (subsystem, _), linux(subsystem) as host:
        host.write(3, b"x" * PAGE)
        for _ in range(2):
            subsystem.take()
            changed = host.hear(NamespaceChanged)
            assert isinstance(changed, NamespaceChanged)
            assert changed.namespace is None
            status = host.do(nvme.read(1, 3, 1), into=memoryview(bytearray(PAGE)))
            assert code_of(status) in (Status.PATH_ERROR, Status.INVALID_NAMESPACE)
            subsystem.give()
            changed = host.hear(NamespaceChanged)
            assert isinstance(changed, NamespaceChanged)
            assert changed.namespace is not None
            assert host.read(3) == b"x" * PAGE


def the_port_goes_and_returns(nvmet: Nvmet) -> None:
    """With another subsystem that still listens there, and without."""
    with nvmet.exported() as (subsystem, _), nvmet.exported() as (other, _):
        for alone in (False, True):
            with linux(subsystem) as host:
                host.write(3, bytes([alone]) * PAGE)
                host.submit(nvme.read(1, 0, 1), into=memoryview(bytearray(PAGE)))
                if alone:
                    other.hide()
                subsystem.hide()
                with pytest.raises(EndedError, match="the peer closed"):
                    host.finish(2)
                with pytest.raises(EndedError, match="the peer closed"):
                    host.hear(ShutDown)
            why = "the peer closed" if alone else "connect invalid"
            with pytest.raises(EndedError, match=why):
                linux(subsystem)
            subsystem.listen()
            if alone:
                other.listen()
            with linux(subsystem) as host:
                assert host.read(3) == bytes([alone]) * PAGE


def bad_blocks(nvmet: Nvmet) -> None:
    with nvmet.exported() as (subsystem, device), linux(subsystem) as host:
        host.write(0, b"x" * 8 * PAGE)
        device.damage(2 * 8, 3 * 8 - 1)
        for command, data in ((nvme.read(1, 2, 1), None), (nvme.write(1, 2, 1), bytes(PAGE))):
            into = memoryview(bytearray(PAGE)) if data is None else None
            status = host.do(command, data, into)
            assert code_of(status) == Status.INTERNAL_ERROR
            assert not nvme.retryable(status)
        assert host.read(1) == host.read(3) == b"x" * PAGE
        device.mend(2 * 8, 3 * 8 - 1)
        assert host.read(0, 8) == b"x" * 8 * PAGE


def only_friends(nvmet: Nvmet) -> None:
    with nvmet.exported(FRIEND) as (subsystem, _):
        with pytest.raises(EndedError, match=r"connect invalid host.*10200h"):
            linux(subsystem)
        with linux(subsystem, name=FRIEND) as host:
            assert not any(host.read(0))


def a_slow_medium(nvmet: Nvmet) -> None:
    """Commands wait for each other's sake only; one that takes too long ends the queue."""
    with nvmet.exported(delay_us=300_000) as (subsystem, _):
        with linux(subsystem) as host:
            began = time.monotonic()
            pages = [bytearray(PAGE) for _ in range(16)]
            for number in range(16):
                host.submit(nvme.write(1, number, 1), bytes([number]) * PAGE)
            assert set(host.finish(16).values()) == {0}
            for number, page in enumerate(pages):
                host.submit(nvme.read(1, number, 1), into=memoryview(page))
            assert set(host.finish(16).values()) == {0}
            assert [page[0] for page in pages] == list(range(16))
            assert time.monotonic() - began > 0.6
        with linux(subsystem, options=Options(command_tmo=0.1)) as host:
            host.submit(nvme.read(1, 0, 1), into=memoryview(bytearray(PAGE)))
            with pytest.raises(EndedError, match="no answer in time: a command"):
                host.finish()


def silence(nvmet: Nvmet) -> None:
    with nvmet.exported() as (subsystem, _):
        with linux(subsystem, keep_alive=1.0) as host:
            host.write(3, b"x" * PAGE)
            with nvmet.machine.frozen():
                with pytest.raises(EndedError, match="Keep Alive"):
                    host.hear(ShutDown)
                with pytest.raises(EndedError, match="no answer in time: initializing"):
                    linux(subsystem, options=QUICK)
        with linux(subsystem) as host:
            assert host.read(3) == b"x" * PAGE


SCENARIOS: list[Callable[[Nvmet], None]] = [
    everything_in_every_form,
    discovery,
    a_namespace_goes_and_returns,
    the_port_goes_and_returns,
    bad_blocks,
    only_friends,
    a_slow_medium,
    silence,
]
