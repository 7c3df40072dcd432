"""A host over real sockets that does one thing at a time: the protocol's own machines, blocking."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from nvme import HOST, HOST_ID, SUBSYSTEM
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import controller as host
from userswap.backends.nvme_tcp.command import Command
from userswap.backends.nvme_tcp.identify import Namespace
from userswap.backends.nvme_tcp.pdu import Buffer
from userswap.backends.nvme_tcp.qpair import Completed, Connected, Options, QueuePair, Terminated
from userswap.backends.nvme_tcp.server import Server, serve
from userswap.backends.store import Store

PAGES = 1024
PATIENCE_S = 30.0
T = TypeVar("T")
Address = tuple[str, int]


class EndedError(Exception):
    """The connection ended; the message says why."""


class Wire:
    """A socket and one end's machine."""

    def __init__(self, address: Address, end: host.Controller | QueuePair) -> None:
        self.end = end
        self.socket = socket.create_connection(address, PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> None:
        data = b"".join(map(bytes, self.end.data_to_send()))
        if data:
            self.socket.sendall(data)

    def receive(self) -> list[object]:
        """Wait for bytes, or for the time that the end waits for, and say what follows."""
        timer = self.end.get_timer()
        wait = PATIENCE_S if timer is None else min(timer - time.monotonic(), PATIENCE_S)
        self.socket.settimeout(max(wait, 0.001))
        try:
            count = self.socket.recv_into(self.end.get_buffer())
        except TimeoutError:
            if timer is None or time.monotonic() < timer:
                raise
            return list(self.end.handle_timer(time.monotonic()))
        except ConnectionResetError:
            count = 0
        now = time.monotonic()
        if not count:
            return list(self.end.eof_received())
        return list(self.end.buffer_updated(count, now))

    def close(self) -> None:
        self.socket.close()


class Host:
    """A controller that is up, with its I/O queues."""

    def __init__(
        self,
        address: Address,
        *,
        subsystem: str = SUBSYSTEM,
        name: str = HOST,
        entries: int = 32,
        queues: int = 1,
        flow_control: bool = True,
        keep_alive: float = 0.0,
        options: Options | None = None,
    ) -> None:
        settings = host.Settings(
            subsystem=subsystem,
            host=name,
            host_id=HOST_ID,
            entries=entries,
            queues=queues,
            flow_control=flow_control,
            keep_alive_tmo=keep_alive,
            options=options or Options(),
        )
        self.address = address
        self.controller = host.Controller(settings, time.monotonic())
        self.admin = Wire(address, self.controller)
        self.queues: list[Wire] = []
        self.found = self.hear(host.Ready, host.Discovered)
        if isinstance(self.found, host.Ready):
            for _ in range(self.found.queues):
                self.add_queue()

    def add_queue(self) -> Wire:
        queue = self.controller.io_queue(len(self.queues) + 1, time.monotonic())
        self.queues.append(Wire(self.address, queue))
        self._await(self.queues[-1], Connected)
        return self.queues[-1]

    def hear(self, *kinds: type) -> object:
        """Wait for one of these events of the controller."""
        return self._await(self.admin, *kinds)

    def _await(self, wire: Wire, *kinds: type) -> object:
        wire.send()
        while True:
            for event in wire.receive():
                if isinstance(event, Terminated):
                    wire.close()
                    raise EndedError(str(event.error))
                if isinstance(event, kinds):
                    return event
            wire.send()

    def submit(
        self,
        command: Command,
        data: Buffer | None = None,
        into: memoryview | None = None,
        at: int = 0,
    ) -> int:
        queue = self.queues[at].end
        assert isinstance(queue, QueuePair)
        cid = queue.submit(command, time.monotonic(), data=data, into=into)
        self.queues[at].send()
        return cid

    def finish(self, count: int = 1, at: int = 0) -> dict[int, int]:
        """Wait for completions: status by CID."""
        done: dict[int, int] = {}
        wire = self.queues[at]
        while len(done) < count:
            for event in wire.receive():
                if isinstance(event, Terminated):
                    raise EndedError(str(event.error))
                if isinstance(event, Completed):
                    done[event.cid] = event.status
            wire.send()
        return done

    def do(
        self,
        command: Command,
        data: Buffer | None = None,
        into: memoryview | None = None,
        at: int = 0,
    ) -> int:
        """The status of one command."""
        self.submit(command, data, into, at)
        (status,) = self.finish(at=at).values()
        return status

    def read(self, first: int, count: int = 1, *, block: int = 4096, at: int = 0) -> bytes:
        buffer = bytearray(b"\xaa" * (count * block))
        status = self.do(nvme.read(1, first, count), into=memoryview(buffer), at=at)
        assert status == 0, nvme.status_name(status)
        return bytes(buffer)

    def write(
        self, first: int, data: bytes, *, block: int = 4096, fua: bool = False, at: int = 0
    ) -> None:
        status = self.do(nvme.write(1, first, len(data) // block, fua=fua), data, at=at)
        assert status == 0, nvme.status_name(status)

    def do_flush(self) -> None:
        assert self.do(nvme.flush(1)) == 0

    def namespace(self) -> Namespace:
        """As it was when the controller came up."""
        assert isinstance(self.found, host.Ready)
        return self.found.namespace

    def close(self) -> None:
        for wire in (*self.queues, self.admin):
            wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def exported(work: Callable[[Server], T], store: Store | None = None, **changes: object) -> T:
    """Serve a store while `work` runs on a thread."""
    store = store or MemoryStore(PAGES)
    given = {"nqn": SUBSYSTEM, "listen": ("127.0.0.1", 0), **changes}
    async with await serve(store, **given) as server:  # type: ignore[arg-type]
        result = await asyncio.to_thread(work, server)
    await store.aclose()
    return result


@contextmanager
def exporting(
    store: str, *options: str, size: str = "64MiB", nqn: str = SUBSYSTEM, prefix: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], Address, dict[str, Any]]]:
    """`userswap nvme export` in a process of its own, which has to end well; where it listens and
    all that it said. `prefix` is what runs it; `size` empty leaves the size out."""
    command = [*prefix, sys.executable, "-P", "-m", "userswap", "nvme", "export", "--json"]
    command += ["--store", store, "--nqn", nqn, *(["--size", size] if size else [])]
    command += options or ["--listen", "127.0.0.1:0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        line = child.stdout.readline()
        said = json.loads(line or child.stderr.read())
        host, _, port = said["address"].rpartition(":")
        yield child, (host, int(port)), said
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=PATIENCE_S)
        assert (child.returncode, "Traceback" in errors) == (0, False), errors
    finally:
        child.kill()
        child.communicate()
