"""The host's connections: sockets and the clock for the state machines of qpair.py, controller.py.

Responsible for: receiving straight into the buffers that a queue names, sending, timers; and an
association, which is the admin connection and the I/O queues of one controller, brought up and
ended together.
Invariants:
 1. What the transport is given to send is a copy: what lies in it cannot be taken back when a
    caller's buffer is needed again.
 2. When an association is lost, its watcher is told once, with every request that has not ended;
    from then on nothing touches their buffers.
Must not know: what requests are for, pages, when to connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import Command
from userswap.backends.nvme_tcp.controller import (
    Controller,
    Discovered,
    NamespaceChanged,
    Ready,
    Settings,
    ShutDown,
)
from userswap.backends.nvme_tcp.controller import Event as ControllerEvent
from userswap.backends.nvme_tcp.direct import DirectConnection
from userswap.backends.nvme_tcp.native_queue import NativeQueuePair
from userswap.backends.nvme_tcp.pdu import Buffer, ConnectionLostError, ProtocolError
from userswap.backends.nvme_tcp.qpair import Completed, Connected, QueuePair, Terminated
from userswap.backends.nvme_tcp.qpair import Event as QueueEvent

DEFAULT_PORT = 4420
DISCOVERY_PORT = 8009
LINGER_S = 1.0
"""That a peer has to take a TermReq."""
LEAVE_S = 2.0
"""That a controller has to shut down in order."""

Event = TypeVar("Event")


class End(Protocol[Event]):
    """A QueuePair or a Controller."""

    def get_buffer(self, sizehint: int = -1) -> memoryview: ...
    def buffer_updated(self, count: int, now: float) -> list[Event]: ...
    def eof_received(self) -> list[Event]: ...
    def data_to_send(self) -> list[Buffer]: ...
    def close(self) -> list[Event]: ...
    def get_timer(self) -> float | None: ...
    def handle_timer(self, now: float) -> list[Event]: ...


class Owner(Protocol):
    """Who waits for requests."""

    def ended(self, request: Request, status: int) -> None:
        """It was answered, for good."""

    def failed(self, request: Request, error: Exception) -> None:
        """It will not be answered."""


@dataclass(slots=True, eq=False)
class Request:
    """A command on its way, with the buffer that goes along or is to be filled."""

    command: Command
    owner: Owner | None
    """None: nobody waits any more"""
    data: Buffer | None = None
    into: memoryview | None = None
    unit: int = 0
    """the first one concerned, of the owner's, and how many"""
    units: int = 0
    tries: int = 0
    since: float = 0.0
    """when it was answered for the first time that it should be tried again"""
    queue: IoQueue | None = None
    """where it is outstanding, and under which CID"""
    cid: int = 0


class Watcher(Protocol):
    """Who uses an association."""

    def completed(self, request: Request, status: int) -> None: ...
    def lost(self, error: ProtocolError, unfinished: list[Request]) -> None: ...
    def namespace_changed(self, namespace: identify.Namespace | None) -> None: ...


class HostConnection(asyncio.BufferedProtocol, Generic[Event]):
    """One end on one socket. `told` is called with what the end has to tell."""

    def __init__(
        self, end: End[Event], queue: QueuePair, told: Callable[[list[Event]], None]
    ) -> None:
        self._end = end
        self._queue = queue
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self.was_closed = False
        """the peer closed it: it has done with what it had"""

    # --- for the owner ---

    async def open(self, address: tuple[str, int]) -> None:
        """Connect; OSError where nobody answers."""
        await self._loop.create_connection(lambda: self, *address)

    def transmit(self) -> None:
        """Send what the end has to send, as far as the socket takes it."""
        transport = self._transport
        if transport is None or self._paused:
            return
        if parts := self._end.data_to_send():
            transport.write(b"".join(parts))
        if self._queue.error is not None:
            self._leave()
        else:
            self._arm()

    def drop(self) -> None:
        """End the connection at once; nobody is told."""
        self._end.close()
        self._leave(linger=0)

    # --- for the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(0)
        with contextlib.suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transmit()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._end.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        events = self._end.buffer_updated(nbytes, self._loop.time())
        if events:
            self._told(events)
        self.transmit()

    def eof_received(self) -> None:
        self.was_closed = self._queue.error is None
        self._tell(self._end.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._disarm()
        if isinstance(exc, ConnectionResetError | BrokenPipeError):
            self.was_closed = self._queue.error is None
        self._tell(self._end.eof_received())

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.transmit()

    # --- inside ---

    def _tell(self, events: list[Event]) -> None:
        if events:
            self._told(events)

    def _leave(self, linger: float = LINGER_S) -> None:
        transport, self._transport = self._transport, None
        self._disarm()
        if transport is None:
            return
        if linger:
            transport.close()
            self._loop.call_later(linger, transport.abort)
        else:
            transport.abort()

    def _arm(self) -> None:
        due = self._end.get_timer()
        if due is None or (self._timer is not None and self._timer.when() <= due):
            return  # an early timer costs one look
        self._disarm()
        self._timer = self._loop.call_at(due, self._ring)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        self._tell(self._end.handle_timer(self._loop.time()))
        self.transmit()


class IoQueue:
    """One I/O queue of an association."""

    def __init__(self, pair: NativeQueuePair, owner: HostController) -> None:
        self.pair = pair
        self.connection = DirectConnection(pair, self._told, self._answered, LINGER_S)
        self.outstanding: dict[int, Request] = {}
        self.connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._owner = owner

    def submit(self, request: Request, now: float) -> None:
        """Take a request; `connection.transmit` sends it."""
        cid = self.pair.submit(request.command, now, data=request.data, into=request.into)
        request.queue, request.cid = self, cid
        self.outstanding[cid] = request

    def _answered(self, answers: list[int]) -> None:
        completed = self._owner.completed
        for answer in answers:
            request = self.outstanding.pop(answer & 0xFFFF, None)
            if request is None:
                continue  # an answer before it lost the association, which took all requests
            request.queue = None
            completed(request, answer >> 16)

    def _told(self, events: list[QueueEvent]) -> None:
        for event in events:
            if isinstance(event, Completed):
                self._answered([event.cid | event.status << 16])
            elif isinstance(event, Connected):
                if not self.connected.done():
                    self.connected.set_result(None)
            else:
                self._owner.lose(event.error)

    def give_up(self, error: ProtocolError) -> None:
        """The association is over; a connection that ended by itself may have a last word."""
        if self.pair.error is None:
            self.connection.drop()
        _break(self.connected, error)


class HostController:
    """An association; `open_controller` makes one."""

    def __init__(self, settings: Settings, watcher: Watcher | None) -> None:
        loop = asyncio.get_running_loop()
        self.controller = Controller(settings, loop.time())
        self.connection: HostConnection[ControllerEvent] = HostConnection(
            self.controller, self.controller.queue, self._told
        )
        self.queues: list[IoQueue] = []
        self.error: ProtocolError | None = None
        """why it was lost"""
        self._watcher = watcher
        self._is_up = False
        self._up: asyncio.Future[None] = loop.create_future()
        self._left: asyncio.Future[None] = loop.create_future()
        self._entries: tuple[identify.Entry, ...] = ()

    @property
    def was_closed(self) -> bool:
        """By the controller, and not by this end, which gave it up."""
        connections = [self.connection.was_closed, *(q.connection.was_closed for q in self.queues)]
        return any(connections)

    @property
    def ready(self) -> Ready:
        """What it offers; of an I/O controller."""
        assert self.controller.ready is not None
        return self.controller.ready

    def discovery_log(self) -> tuple[identify.Entry, ...]:
        """What a discovery controller told as it was opened."""
        return self._entries

    async def open(self, address: tuple[str, int]) -> None:
        settings = self.controller.settings
        try:
            await _connect(address, self.connection, settings)
            await self._up
            if settings.discovery:
                return
            loop = asyncio.get_running_loop()
            for number in range(1, self.ready.queues + 1):
                pair = self.controller.io_queue(number, loop.time())
                queue = IoQueue(pair, self)
                self.queues.append(queue)
                await _connect(address, queue.connection, settings)
                await queue.connected
            if self.error is not None:
                raise self.error
        except BaseException:
            self.drop()
            raise
        self._is_up = True

    def completed(self, request: Request, status: int) -> None:
        assert self._watcher is not None
        self._watcher.completed(request, status)

    def lose(self, error: ProtocolError) -> None:
        """One of its connections is over, so all are."""
        if self.error is not None:
            return
        self.error = error
        unfinished = [request for queue in self.queues for request in queue.outstanding.values()]
        for queue in self.queues:
            queue.outstanding.clear()
            queue.give_up(error)
        for request in unfinished:
            request.queue = None
        if not self.controller.queue.error:
            self.connection.drop()
        for future in (self._up, self._left):
            _break(future, error)
        if self._is_up and self._watcher is not None:
            self._watcher.lost(error, unfinished)

    def drop(self) -> None:
        """Give it up at once; the watcher is not told."""
        self._is_up = False
        self.lose(ConnectionLostError("closed by this end"))

    async def aclose(self) -> None:
        """Leave in order, as far as the controller answers; nothing is to be outstanding."""
        self._is_up = False
        for queue in self.queues:
            queue.connection.drop()
        if self.error is None:
            with contextlib.suppress(ProtocolError, TimeoutError):
                self._told(self.controller.shutdown(asyncio.get_running_loop().time()))
                self.connection.transmit()
                async with asyncio.timeout(LEAVE_S):
                    await self._left
        self.drop()

    def _told(self, events: list[ControllerEvent]) -> None:
        for event in events:
            match event:
                case Ready():
                    self._up.set_result(None)
                case Discovered(entries):
                    self._entries = entries
                    self._up.set_result(None)
                case NamespaceChanged(namespace):
                    if self._is_up and self._watcher is not None:
                        self._watcher.namespace_changed(namespace)
                case ShutDown():
                    self._left.set_result(None)
                case Terminated(error):
                    self.lose(error)


def _break(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # perhaps nobody waits


async def _connect(
    address: tuple[str, int],
    connection: HostConnection[Event] | DirectConnection,
    settings: Settings,
) -> None:
    where = address_text(address)
    try:
        async with asyncio.timeout(settings.options.connect_tmo):
            await connection.open(address)
    except TimeoutError:
        raise ConnectionLostError(f"{where} does not answer") from None
    except UnicodeError:
        raise ConnectionLostError(f"{where}: no such name") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConnectionLostError(f"{where}: {why}") from None


def address_text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def open_controller(
    address: tuple[str, int], settings: Settings, watcher: Watcher | None = None
) -> HostController:
    """Connect to a subsystem: admin queue, keep-alive, events, I/O queues. With the NQN of
    discovery, its log is read. What goes wrong is a ProtocolError that says what."""
    controller = HostController(settings, watcher)
    await controller.open(address)
    return controller
