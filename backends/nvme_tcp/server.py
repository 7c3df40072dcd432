"""A store exported over NVMe/TCP: the sockets and tasks around a Target.

Responsible for: carrying bytes between connections and their sessions, starting operations and
answering them, time-outs, and an end that loses nothing that was answered.
Invariants:
 1. What a connection holds is bounded, whatever its host does: commands by the queue, data that
    comes or goes by `Limits`, and what was sent but not taken by the transport's high-water mark;
    a host that does not read is not read from.
 2. Connections share nothing but the store, which takes so many operations at once, and the loop:
    no host waits for another one's memory.
 3. A connection that is over is closed within LINGER_S, and few of them are kept for so long.
Must not know: which store it is, command lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

from userswap.backends.nvme_tcp.command import Io, Status
from userswap.backends.nvme_tcp.pdu import Buffer, RemoteProtocolError
from userswap.backends.nvme_tcp.target import Operation, RefusedError, Rules, Session, Target
from userswap.backends.nvme_tcp.target_blocks import BLOCK_SIZES, Blocks, Outcome
from userswap.backends.store import Store

__all__ = ["BLOCK_SIZES", "Rules", "Server", "check_exposure", "serve"]

log = logging.getLogger("userswap.nvme")

PORT = 4420
NSID = 1
OPERATIONS = 32
"""Of one connection that are in the store at once; more would not make a store faster."""
OPERATIONS_IN_ALL = 512
"""Also those that lost their connection: a store that hangs must not collect them."""
READ_BYTES = 1 << 20
"""Of one connection, read and not yet given to its transport; one command may have as much."""
NAMES = {kind: kind.name.lower() for kind in Io}
"""Of the counters."""
TICK_S = 0.25
LINGER_S = 2.0
LINGERING = 32
"""Connections that are over and whose hosts have not closed them yet."""
STOP_S = 10.0
"""For operations that are in the store when the server is stopped."""
KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4}
USER_TIMEOUT_MS = 30_000


async def serve(
    store: Store,
    *,
    nqn: str,
    listen: tuple[str, int] = ("127.0.0.1", PORT),
    block_size: int = 4096,
    nguid: bytes = b"",
    rules: Rules | None = None,
) -> Server:
    """Export a store as namespace 1 of subsystem `nqn` until `stop`, which leaves it open.

    `nguid` is the identity of the content: who gives none says that it will be gone when this
    server is. Raises OSError where it cannot listen, ValueError for what `check_exposure` refuses.
    """
    rules = rules or Rules()
    check_exposure(listen[0], rules.hosts)
    server = Server(Blocks(store, block_size=block_size, nguid=nguid or os.urandom(16)), nqn, rules)
    await server.start(*listen)
    return server


def check_exposure(host: str, hosts: Collection[str] | None) -> None:
    """Who listens where others can reach it has to say who may come: nobody is asked for more
    than a name. Raises ValueError."""
    if hosts:
        return
    found = {host or "::"}  # no host means every address
    with contextlib.suppress(OSError):  # a name that is none cannot be listened on either
        found = {str(info[4][0]) for info in socket.getaddrinfo(host or "::", None)}
    if not all(_is_loopback(address) for address in found):
        raise ValueError(
            f"{host or 'every address'} can be reached from outside, and hosts are not "
            "authenticated: name those that may connect, and keep to a private network"
        )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


class Server:
    """One subsystem with one namespace, and discovery; `serve` makes it."""

    def __init__(self, blocks: Blocks, nqn: str, rules: Rules) -> None:
        self.nqn = nqn
        self.blocks = blocks
        serial = hashlib.blake2b(nqn.encode(), digest_size=10).hexdigest()
        self.target = Target(nqn, {NSID: blocks.namespace}, rules, serial=serial)
        self.loop = asyncio.get_running_loop()
        self.address = ("", 0)
        """Where it listens, with the port that port 0 became."""
        self.connections: dict[Session, Connection] = {}
        self.counts: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[None]] = set()
        self._starved: dict[Connection, None] = {}
        self._told: dict[int, str] = {}
        """The hosts of controllers that the operator knows of."""
        self._lingering: dict[Connection, float] = {}
        self._listener: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self, host: str, port: int) -> None:
        self._listener = await self.loop.create_server(
            lambda: Connection(self), host or None, port, backlog=128
        )
        address = self._listener.sockets[0].getsockname()
        self.address = (str(address[0]), int(address[1]))
        self._watch = asyncio.create_task(self._watch_time())

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what there is now."""
        controllers = self.target.controllers.values()
        return {
            **dict(sorted(self.counts.items())),
            "connections": len(self.connections),
            "hosts": len({controller.connect.host for controller in controllers}),
        }

    async def stop(self) -> None:
        """Hear nobody any more, let operations end, and flush; what fails in that is raised."""
        if self._stopped:
            return
        self._stopped = True
        if self._listener is not None:
            self._listener.close()
        if self._watch is not None:
            self._watch.cancel()
        for session in list(self.connections):
            session.close("the target ends")
        self.settle()
        if self.tasks:
            _, hanging = await asyncio.wait(self.tasks, timeout=STOP_S)
            for task in hanging:
                task.cancel()
            if hanging:
                log.warning("%d operations do not end; they are given up", len(hanging))
                await asyncio.wait(hanging, timeout=STOP_S)
        for connection in [*self._lingering, *self.connections.values()]:
            connection.abort()
        await self.blocks.store.flush()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    # --- for connections ---

    def settle(self) -> None:
        """Send and close what one connection's events mean for others."""
        touched = self.target.touched
        while touched:
            connection = self.connections.get(touched.pop())
            if connection is not None:
                connection.pump()

    def linger(self, connection: Connection) -> None:
        """Give a host time to take what it was told last."""
        self._lingering[connection] = self.loop.time() + LINGER_S
        if len(self._lingering) > LINGERING:
            oldest = next(iter(self._lingering))
            oldest.abort()

    def gone(self, connection: Connection) -> None:
        self._lingering.pop(connection, None)
        self._starved.pop(connection, None)
        if connection.session is not None:
            self.connections.pop(connection.session, None)

    def start_task(self, connection: Connection, operation: Operation, size: int) -> bool:
        """Perform an operation; False if there are too many already: `pump` is called then."""
        if len(self.tasks) >= OPERATIONS_IN_ALL:
            self._starved[connection] = None
            return False
        task = self.loop.create_task(connection.perform(operation, size))
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if self._starved:
            connection = next(iter(self._starved))
            del self._starved[connection]
            connection.pump()

    async def _watch_time(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self.loop.time()
            for connection in list(self.connections.values()):
                connection.check_time(now)
            self.settle()
            for connection in [c for c, until in self._lingering.items() if until <= now]:
                connection.abort()
            self._tell_operator()

    def _tell_operator(self) -> None:
        """Which hosts came and went; one that only asked what there is was neither."""
        there = {
            number: controller.connect.host
            for number, controller in self.target.controllers.items()
            if controller.identity.discovery is None
        }
        for number in there.keys() - self._told.keys():
            log.info("controller %d: %s is here", number, there[number])
        for number in self._told.keys() - there.keys():
            log.info("controller %d: %s has left", number, self._told[number])
        self._told = there


class Connection(asyncio.BufferedProtocol):
    """One socket and its session."""

    def __init__(self, server: Server) -> None:
        self.session: Session | None = None
        self._server = server
        self._transport: Any = None
        self._waiting: deque[Operation] = deque()
        self._running = 0
        self._reading = 0  # bytes of Reads that were started and not given to the transport
        self._read = 0  # those of them that are ready
        self._paused = False
        self._scheduled = False
        self._over = False

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        server = self._server
        found = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                found.setsockopt(socket.IPPROTO_TCP, option, value)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        try:
            host, port, *_ = transport.get_extra_info("sockname")
            self.session = server.target.accept(server.loop.time(), (host, str(port)))
        except RefusedError:
            server.counts["refused"] += 1
            self.abort()
            return
        server.counts["accepted"] += 1
        server.connections[self.session] = self
        server.settle()

    def get_buffer(self, sizehint: int) -> memoryview:
        assert self.session is not None
        return self.session.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        assert self.session is not None
        for event in self.session.buffer_updated(nbytes, self._server.loop.time()):
            if isinstance(event, Operation):
                self._waiting.append(event)
        self.pump()
        if self._server.target.touched:
            self._server.settle()

    def eof_received(self) -> bool:
        self._end_of_input()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_of_input()
        self._server.gone(self)

    def pause_writing(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._transport.resume_reading()
        self.pump()

    def _end_of_input(self) -> None:
        self._over = True
        if self.session is not None:
            self.session.eof_received(self._server.loop.time())
            self._waiting.clear()
            self._server.settle()

    # --- the server's side ---

    def abort(self) -> None:
        self._over = True
        self._transport.abort()

    def check_time(self, now: float) -> None:
        assert self.session is not None
        if self.session.handle_timer(now):
            self._server.counts["timed out"] += 1
            self.pump()

    def pump(self) -> None:
        """Start what may start, send what there is; once more where that made room."""
        if self.session is None or self._over:
            return
        while True:
            while self._waiting and self._start(self._waiting[0]):
                self._waiting.popleft()
            sent = self._send()
            if not (sent and self._waiting) or self._paused:
                break
        if self.session.over:
            self._close()

    def _send(self) -> bool:
        assert self.session is not None
        parts = self.session.data_to_send()
        if parts:
            self._transport.writelines(parts)
        self._reading -= self._read
        self._read = 0
        return bool(parts)

    def _close(self) -> None:
        """The session is over: say so, and let the host read why."""
        assert self.session is not None
        self._over = True
        self._waiting.clear()
        error = self.session.queue.error
        log.debug("connection %d is over: %s", self.session.number, error)
        if isinstance(error, RemoteProtocolError):
            self._server.counts["protocol errors"] += 1
            # Closing with input unread would destroy what was sent last.
            self._transport.resume_reading()
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        else:
            self._transport.close()
        self._server.linger(self)

    # --- operations ---

    def _start(self, operation: Operation) -> bool:
        """Begin an operation; False if it has to wait."""
        assert self.session is not None
        if self._paused or self._running >= OPERATIONS:
            return False
        size = 0
        blocks = self._server.blocks
        if operation.kind == Io.READ:
            size = operation.ranges[0][1] * blocks.namespace.block_size
            if self._reading and self._reading + size > READ_BYTES:
                return False
            data = blocks.read_now(operation)
            if data is not None:
                self._reading += size
                self._answer(operation, size, Status.SUCCESS, data)
                return True
        if not self._server.start_task(self, operation, size):
            return False
        self._reading += size
        self._running += 1
        return True

    async def perform(self, operation: Operation, size: int) -> None:
        outcome: Outcome = (Status.INTERNAL_ERROR, b"")
        try:
            outcome = await self._server.blocks.perform(operation)
        finally:
            self._running -= 1
            self._answer(operation, size, *outcome)
            if not self._running:
                self.pump()
            elif not self._scheduled:  # others may be ready too: one send for all
                self._scheduled = True
                self._server.loop.call_soon(self._pump_soon)

    def _pump_soon(self) -> None:
        self._scheduled = False
        self.pump()

    def _answer(self, operation: Operation, size: int, status: int, data: Buffer) -> None:
        assert self.session is not None
        self._read += size
        counts = self._server.counts
        counts[NAMES[operation.kind]] += 1
        if status:
            counts[f"failed {Status(status).name.lower()}"] += 1
        self.session.complete(operation, status, data)
