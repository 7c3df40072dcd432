"""What hosts, and those that are none, can do to a target and to each other."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from daemons import wait_for
from nvme import HOST, SUBSYSTEM
from nvme_socket import EndedError, Host, exported, exporting
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.command import FABRICS, Connect
from userswap.backends.nvme_tcp.pdu import PduType
from userswap.backends.nvme_tcp.server import Rules, Server

CAPSULE = PduType.CAPSULE_CMD
SILENT = 1000
GROWTH_MAX = 24 << 20
"""Of a target's memory under a flood: 64 connections that are nobody's yet, and what is sent."""


@pytest.fixture(autouse=True)
def many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def ic_req() -> bytes:
    return pdu.init(PduType.IC_REQ, alignment=0, digests=0, limit=0)


def connect() -> bytes:
    wanted = Connect(SUBSYSTEM, HOST, bytes(16))
    entry = wanted.command().entry(0, 1024, nvme.SGL_IN_CAPSULE)
    return b"".join(map(bytes, pdu.PLAIN.frame(CAPSULE, 0, entry, wanted.data())))


def nothing() -> bytes:
    return b""


def half_an_ic_req() -> bytes:
    return ic_req()[:64]


def half_a_connect() -> bytes:
    return ic_req() + connect()[:600]


def endless_pdu() -> bytes:
    return ic_req() + pdu.COMMON.pack(CAPSULE, 0, 72, 72, 1 << 31)


def endless_ic_req() -> bytes:
    return pdu.COMMON.pack(PduType.IC_REQ, 0, 128, 0, 1 << 31) + bytes(120)


def garbage() -> bytes:
    return bytes(range(256)) * 4


class Worker(threading.Thread):
    """A host that writes and verifies until it is told to stop."""

    def __init__(self, host: Host) -> None:
        super().__init__(daemon=True)
        self.host = host
        self.rounds = 0
        self.error: BaseException | None = None
        self._stop_it = threading.Event()

    def run(self) -> None:
        try:
            while not self._stop_it.is_set():
                content = os.urandom(2048) * 2
                self.host.write(self.rounds % 512, content)
                assert self.host.read(self.rounds % 512) == content
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self._stop_it.set()
        self.join(30)
        assert self.error is None, self.error


def test_a_flood_costs_little_and_harms_no_host() -> None:
    said = [nothing(), half_an_ic_req(), half_a_connect()]
    said += [endless_pdu(), endless_ic_req(), garbage()]
    with exporting("ram:lz4") as (child, address, _), Host(address) as host:
        worker = Worker(host)
        worker.start()
        before = rss(child.pid)
        flood = []
        for number in range(SILENT):
            flood.append(socket.create_connection(address, 30))
            with contextlib.suppress(ConnectionError):  # others wait: it had to go
                flood[-1].sendall(said[number % len(said)])
        rounds = worker.rounds
        assert wait_for(lambda: worker.rounds > rounds + 20 or worker.error is not None)
        grown = rss(child.pid) - before
        with Host(address, name="nqn.2026-01.test:newcomer") as newcomer:
            assert newcomer.read(600) == bytes(4096)
        worker.finish()
        for connection in flood:
            connection.close()
        assert grown < GROWTH_MAX, f"{grown >> 20} MiB"


async def test_who_says_nothing_is_let_go() -> None:
    rules = Rules(connect_tmo=0.5)

    def work(server: Server) -> None:
        with Host(server.address) as host:
            silent = [socket.create_connection(server.address, 30) for _ in range(5)]
            silent[1].sendall(half_an_ic_req())
            silent[2].sendall(ic_req())
            silent[3].sendall(half_a_connect())
            silent[4].sendall(ic_req() + connect()[:-1])
            for connection in silent:
                while connection.recv(4096):
                    pass
                connection.close()
            assert host.read(0) == bytes(4096)

    await exported(work, rules=rules)


async def test_a_connected_host_that_falls_silent_is_let_go() -> None:
    def work(server: Server) -> None:
        with Host(server.address) as host, Host(server.address, keep_alive=0.4) as silent:
            with pytest.raises(EndedError):
                silent.finish()
            assert silent.admin.socket.recv(1 << 16) == b""
            assert host.read(0) == bytes(4096)
            assert wait_for(lambda: server.stats()["connections"] == 2)
            assert server.stats()["timed out"] == 1

    await exported(work)


async def test_a_broken_protocol_ends_that_controller_alone() -> None:
    def work(server: Server) -> None:
        with Host(server.address) as good, Host(server.address, name=HOST + "2") as bad:
            bad.queues[0].socket.sendall(endless_pdu()[128:])
            with pytest.raises(EndedError, match="FES 5, FEI 4"):
                bad.finish()
            bad.queues[0] = bad.admin
            with pytest.raises(EndedError):
                bad.finish()
            good.write(0, b"x" * 4096)
            assert good.read(0) == b"x" * 4096
            assert server.stats()["hosts"] == 1

    await exported(work)


async def test_hosts_share_a_namespace() -> None:
    def work(server: Server) -> None:
        names = [f"nqn.2026-01.test:host{number}" for number in range(6)]
        hosts = [Host(server.address, name=name) for name in names]
        for number, host in enumerate(hosts):
            host.write(number, bytes([number + 1]) * 4096)
        for host in hosts:
            for number in range(6):
                assert host.read(number) == bytes([number + 1]) * 4096
        assert server.stats()["hosts"] == 6
        for host in hosts:
            host.close()
        assert wait_for(lambda: server.stats()["connections"] == 0)

    await exported(work)


async def test_a_host_has_so_many_controllers_and_a_target_so_many_connections() -> None:
    rules = Rules(connections=7, controllers_per_host=2)

    def work(server: Server) -> None:
        hosts = [Host(server.address), Host(server.address)]
        with pytest.raises(EndedError, match="connect busy"):
            Host(server.address)
        hosts.append(Host(server.address, name=HOST + "2"))
        with socket.create_connection(server.address, 30):
            assert wait_for(lambda: server.stats()["connections"] == 7)
            with pytest.raises((EndedError, ConnectionError)):
                Host(server.address, name=HOST + "3")
        hosts.pop(0).close()
        assert wait_for(lambda: server.stats()["connections"] == 4)
        hosts.append(Host(server.address, name=HOST + "3"))
        for host in hosts:
            assert host.read(0) == bytes(4096)
            host.close()

    await exported(work, rules=rules)


@pytest.mark.parametrize("sent", [0, 20, 72, 700])
async def test_a_killed_host_leaves_nothing_behind(sent: int) -> None:
    content = b"x" * 4096

    def work(server: Server) -> None:
        with Host(server.address) as other:
            for _ in range(5):
                killed = Host(server.address, name=HOST + "2")
                entry = nvme.write(1, 0, 2).entry(9, 8192, nvme.SGL_IN_CAPSULE)
                capsule = pdu.PLAIN.frame(CAPSULE, 0, entry, b"y" * 8192)
                killed.submit(nvme.write(1, 2, 256), b"z" * (1 << 20))  # asked for, never sent
                killed.queues[0].socket.sendall(b"".join(map(bytes, capsule))[:sent])
                for wire in (*killed.queues, killed.admin):
                    linger = struct.pack("ii", 1, 0)
                    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    wire.close()
                other.write(600, content)
                assert other.read(600) == content
                assert other.read(0, 4) == bytes(4 * 4096)
            assert wait_for(lambda: server.stats()["connections"] == 2)

    await exported(work)


def unsent(server: Server) -> int:
    """Bytes that the target holds because hosts do not take them."""
    return sum(each._transport.get_write_buffer_size() for each in server.connections.values())


def flood_with_identify(host: Host) -> None:
    """Ask for pages, which are answered at once, and take none of them."""
    connection = host.admin.socket
    connection.settimeout(1)
    for _ in range(4000):
        for cid in range(8):
            entry = nvme.identify(nvme.Cns.CONTROLLER).entry(1000 + cid, 4096)
            connection.sendall(b"".join(map(bytes, pdu.PLAIN.frame(CAPSULE, 0, entry))))
        time.sleep(0.0005)


async def test_who_does_not_read_is_not_read_from() -> None:
    """Answers pile up nowhere, and nobody else waits."""
    written: list[int] = []

    def work(server: Server) -> None:
        with Host(server.address) as good, Host(server.address, name=HOST + "2") as deaf:
            good.write(0, b"x" * 4096 * 256)
            into = [memoryview(bytearray(1 << 20)) for _ in range(30)]
            for buffer in into:
                deaf.submit(nvme.read(1, 0, 256), into=buffer)
            for _ in range(50):
                assert good.read(0) == b"x" * 4096
            written.append(unsent(server))
            assert set(deaf.finish(30).values()) == {0}
            assert all(buffer == into[0] == b"x" * (1 << 20) for buffer in into)

            with contextlib.suppress(OSError):  # no room, or more at once than the queue takes
                flood_with_identify(deaf)
            written.append(unsent(server))
            assert good.read(0) == b"x" * 4096

    await exported(work)
    assert max(written) < 8 << 20, written


async def test_a_reset_keeps_the_admin_queue_alone() -> None:
    def work(server: Server) -> None:
        with Host(server.address) as host:
            assert host.read(0) == bytes(4096)
            disable = nvme.property_set(nvme.Property.CC, 0)
            assert disable.opcode == FABRICS
            host.controller.queue.submit(disable, 0.0)
            host.admin.send()
            with pytest.raises(EndedError):
                host.finish()
            assert wait_for(lambda: server.stats()["connections"] == 1)

    await exported(work)
