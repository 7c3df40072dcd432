"""The host's side of a controller: bringing it up, keeping it alive, hearing of changes, leaving.

Responsible for: the admin queue and what is said on it. Each conversation is a script: a generator
that yields commands and pauses and is resumed with their completions.
Invariants:
 1. Ready, or the log that Discovered has, comes once, and only after everything that it tells of
    was read.
 2. Every script ends with the queue; an error that a conversation cannot go on from ends the queue.
Must not know: sockets, the clock, I/O commands. The shell connects I/O queues when told Ready, by
`io_queue`, and gives all of them up when this one ends.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace

from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import (
    Cns,
    Command,
    Connect,
    Feature,
    Log,
    Property,
    status_name,
)
from userswap.backends.nvme_tcp.native_queue import NativeQueuePair
from userswap.backends.nvme_tcp.pdu import Buffer, ConnectionLostError, LocalProtocolError
from userswap.backends.nvme_tcp.qpair import Completed, Connected, Options, QueuePair, Terminated
from userswap.backends.nvme_tcp.qpair import Event as QueueEvent

READY_POLL = 0.1
SHUTDOWN_TMO = 5.0
ADMIN_ENTRIES = 32
LOG_PART = 4096
LOG_BYTES = 512
RECORDS_MAX = 4096
DISCOVERY_TRIES = 5
KEEP_ALIVES = 2
"""Keep Alives in one keep_alive_tmo, so that one may be late."""


@dataclass(frozen=True, slots=True)
class Settings:
    subsystem: str
    host: str
    host_id: bytes
    nsid: int = 1
    queues: int = 1
    """I/O queues that are wanted; Ready tells how many there are"""
    entries: int = 128
    """of each of them; Ready tells this too"""
    keep_alive_tmo: float = 5.0
    """0: no keep-alive"""
    flow_control: bool = True
    options: Options = field(default_factory=Options)

    @property
    def discovery(self) -> bool:
        return self.subsystem == identify.DISCOVERY_NQN


@dataclass(frozen=True, slots=True)
class Ready:
    """I/O queues can be connected."""

    controller: identify.Controller
    namespace: identify.Namespace
    queues: int
    entries: int


@dataclass(frozen=True, slots=True)
class Discovered:
    entries: tuple[identify.Entry, ...]


@dataclass(frozen=True, slots=True)
class NamespaceChanged:
    """None: it is gone. It may come back."""

    namespace: identify.Namespace | None


@dataclass(frozen=True, slots=True)
class ShutDown:
    """The controller was left in order; `queue` is closed."""


Event = Ready | Discovered | NamespaceChanged | ShutDown | Terminated


class ControllerError(ConnectionLostError):
    """The controller refused something without which it is of no use; `status` says what."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(f"{message}: {status_name(status)}" if status else message)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Do:
    command: Command
    into: memoryview | None = None
    timed: bool = True


@dataclass(frozen=True, slots=True)
class _Pause:
    seconds: float


_NOTHING = Completed(0, 0, 0)  # what a script is resumed with that nothing has completed for
Script = Generator[_Do | _Pause, Completed, None]


class Controller:
    """See the module. To the shell it is one connection, as a QueuePair is."""

    def __init__(self, settings: Settings, now: float) -> None:
        self.settings = settings
        connect = Connect(
            subsystem=settings.subsystem,
            host=settings.host,
            host_id=settings.host_id,
            entries=ADMIN_ENTRIES,
            keep_alive_ms=round(settings.keep_alive_tmo * 1000),
            flow_control=settings.flow_control,
        )
        self.queue = QueuePair(connect, settings.options, now)
        self.ready: Ready | None = None
        self._now = now
        self._number = 0
        self._scripts: dict[int, Script] = {}  # by the CID of the command that each waits for
        self._pauses: list[tuple[float, Script]] = []
        self._alive_until: float | None = None
        self._leaving = False
        self._events: list[Event] = []

    # --- for the shell ---

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        return self.queue.get_buffer(sizehint)

    def buffer_updated(self, count: int, now: float) -> list[Event]:
        self._now = now
        return self._told(self.queue.buffer_updated(count, now))

    def receive_data(self, data: Buffer, now: float) -> list[Event]:
        self._now = now
        return self._told(self.queue.receive_data(data, now))

    def eof_received(self) -> list[Event]:
        return self._told(self.queue.eof_received())

    def data_to_send(self) -> list[Buffer]:
        return self.queue.data_to_send()

    def close(self) -> list[Event]:
        """Give the controller up at once; `shutdown` is the orderly way."""
        return self._told(self.queue.close())

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to be called."""
        times = [until for until, _ in self._pauses]
        times += [t for t in (self.queue.get_timer(), self._alive_until) if t is not None]
        return min(times, default=None)

    def handle_timer(self, now: float) -> list[Event]:
        self._now = now
        self._take_in(self.queue.handle_timer(now))
        if self._alive_until is not None and self._alive_until <= now:
            self._fail(ControllerError("no answer to Keep Alive in time"))
        due = [pause for pause in self._pauses if pause[0] <= now]
        self._pauses = [pause for pause in self._pauses if pause[0] > now]
        for _, script in due:
            self._resume(script, _NOTHING)
        return self._take_events()

    def io_queue(self, number: int, now: float) -> NativeQueuePair:
        """The I/O queue of that number, 1 to `ready.queues`, to be connected by itself."""
        if self.ready is None:
            raise LocalProtocolError("the controller is not ready")
        connect = replace(
            self.queue.connect,
            queue=number,
            entries=self.ready.entries,
            controller=self._number,
            keep_alive_ms=0,
        )
        options = replace(self.settings.options, in_capsule=self.ready.controller.in_capsule)
        return NativeQueuePair(connect, options, now)

    def shutdown(self, now: float) -> list[Event]:
        """Leave the controller in order, when no I/O is outstanding; ShutDown tells that it is."""
        self._now = now
        if not self._leaving and self.queue.room:
            self._leaving = True
            self._resume(self._shut_down(), None)
        return self._take_events()

    # --- scripts ---

    def _told(self, queue_events: list[QueueEvent]) -> list[Event]:
        self._take_in(queue_events)
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _take_in(self, queue_events: list[QueueEvent]) -> None:
        for event in queue_events:
            match event:
                case Connected(number):
                    self._number = number
                    self._resume(self._bring_up(), None)
                case Completed(cid):
                    if script := self._scripts.pop(cid, None):
                        self._resume(script, event)
                case Terminated():
                    self._scripts.clear()
                    self._pauses.clear()
                    self._alive_until = None
                    self._events.append(event)

    def _fail(self, error: ControllerError) -> None:
        self._take_in(self.queue.end(error))

    def _resume(self, script: Script, done: Completed | None) -> None:
        """Let a script go on until its next command or pause; None begins it."""
        if self.queue.error is not None:
            return
        try:
            step = next(script) if done is None else script.send(done)
        except StopIteration:
            return
        except ControllerError as error:
            self._fail(error)
            return
        if isinstance(step, _Pause):
            self._pauses.append((self._now + step.seconds, script))
        else:
            cid = self.queue.submit(step.command, self._now, into=step.into, timed=step.timed)
            self._scripts[cid] = script

    def _do(self, what: str, command: Command) -> Generator[_Do, Completed, int]:
        """The result of a command that has to succeed."""
        done = yield _Do(command)
        if done.status:
            raise ControllerError(what, done.status)
        return done.result

    def _page(
        self, what: str, command: Command, length: int = identify.PAGE_BYTES
    ) -> Generator[_Do, Completed, bytearray]:
        """The data that a command which has to succeed brings."""
        page = bytearray(length)
        done = yield _Do(command, into=memoryview(page))
        if done.status:
            raise ControllerError(what, done.status)
        return page

    def _bring_up(self) -> Script:
        cap = yield from self._do("CAP", nvme.property_get(Property.CAP))
        yield from self._do("CC", nvme.property_set(Property.CC, nvme.CC_ENABLE))
        until = self._now + identify.ready_timeout(cap)
        while True:
            status = yield from self._do("CSTS", nvme.property_get(Property.CSTS))
            if status & nvme.CSTS_FAILED:
                raise ControllerError("the controller failed")
            if status & nvme.CSTS_READY:
                break
            if self._now >= until:
                raise ControllerError("the controller was not ready in time")
            yield _Pause(READY_POLL)
        page_min = identify.PAGE_BYTES << (cap >> 48 & 0xF)
        page = yield from self._page("Identify Controller", nvme.identify(Cns.CONTROLLER))
        controller = identify.Controller.parse(page, page_min)
        if self.settings.keep_alive_tmo:
            self._resume(self._keep_alive(), None)
        if self.settings.discovery:
            yield from self._discover()
        else:
            yield from self._use(controller, entries=(cap & 0xFFFF) + 1)

    def _use(self, controller: identify.Controller, entries: int) -> Script:
        settings = self.settings
        granted = yield from self._do("number of queues", nvme.set_queues(settings.queues))
        namespace = yield from self._namespace()
        if namespace is None:
            raise ControllerError(f"there is no namespace {settings.nsid}")
        # A controller may know no events; what it does not tell, commands will.
        wanted = nvme.set_features(Feature.ASYNC_EVENTS, nvme.EVENT_NAMESPACES)
        done = yield _Do(wanted)
        if not done.status:
            self._resume(self._listen(), None)
        self.ready = Ready(
            controller=controller,
            namespace=namespace,
            queues=min(settings.queues, (granted & 0xFFFF) + 1, (granted >> 16 & 0xFFFF) + 1),
            entries=min(settings.entries, entries),
        )
        self._events.append(self.ready)

    def _namespace(self) -> Generator[_Do, Completed, identify.Namespace | None]:
        """The namespace as it is now; None if it is not active."""
        page = bytearray(identify.PAGE_BYTES)
        nsid = self.settings.nsid
        done = yield _Do(nvme.identify(Cns.NAMESPACE, nsid), into=memoryview(page))
        if nvme.code_of(done.status) == nvme.Status.INVALID_NAMESPACE:
            return None
        if done.status:
            raise ControllerError("Identify Namespace", done.status)
        return identify.Namespace.parse(page)

    def _listen(self) -> Script:
        """Hear of changes of the namespace, as long as the controller lasts."""
        while True:
            done = yield _Do(nvme.ASYNC_EVENT, timed=False)
            if done.status:
                return
            log = done.result >> 16 & 0xFF
            if log == Log.CHANGED_NAMESPACES:
                read = nvme.get_log(Log.CHANGED_NAMESPACES, identify.PAGE_BYTES)
                page = yield from self._page("changed namespaces", read)
                changed = identify.parse_active(page)
                if self.settings.nsid in changed or nvme.ALL_NAMESPACES in changed:
                    namespace = yield from self._namespace()
                    self._events.append(NamespaceChanged(namespace))
            elif log in tuple(Log):
                # Reading the log that an event names is what arms the event again.
                yield _Do(nvme.get_log(Log(log), LOG_BYTES), into=memoryview(bytearray(LOG_BYTES)))

    def _keep_alive(self) -> Script:
        tmo = self.settings.keep_alive_tmo
        while True:
            yield _Pause(tmo / KEEP_ALIVES)
            self._alive_until = self._now + tmo
            yield from self._do("Keep Alive", nvme.KEEP_ALIVE)
            self._alive_until = None

    def _discover(self) -> Script:
        """Read the discovery log; again, when it changed meanwhile."""
        for _ in range(DISCOVERY_TRIES):
            header = yield from self._log_part(0, identify.LOG_HEADER.size)
            generation, records = identify.log_size(header)
            if records > RECORDS_MAX:
                raise ControllerError(f"a discovery log of {records} records")
            size = identify.LOG_ENTRY.size
            log = bytearray()
            for at in range(size, size * (records + 1), LOG_PART):
                log += yield from self._log_part(at, min(LOG_PART, size * (records + 1) - at))
            header = yield from self._log_part(0, identify.LOG_HEADER.size)
            if identify.log_size(header)[0] == generation:
                parts = [bytes(log[at : at + size]) for at in range(0, len(log), size)]
                self._events.append(Discovered(tuple(map(identify.Entry.parse, parts))))
                return
        raise ControllerError("the discovery log changes all the time")

    def _log_part(self, offset: int, length: int) -> Generator[_Do, Completed, bytearray]:
        read = nvme.get_log(Log.DISCOVERY, length, offset, nsid=0)
        return (yield from self._page("discovery log", read, length))

    def _shut_down(self) -> Script:
        cc = nvme.CC_ENABLE | nvme.CC_SHUTDOWN
        yield from self._do("shutdown", nvme.property_set(Property.CC, cc))
        until = self._now + SHUTDOWN_TMO
        while True:
            status = yield from self._do("CSTS", nvme.property_get(Property.CSTS))
            if status & nvme.CSTS_SHUTDOWN_MASK == nvme.CSTS_SHUTDOWN_DONE:
                break
            if self._now >= until:
                raise ControllerError("the controller did not shut down in time")
            yield _Pause(READY_POLL)
        self._events.append(ShutDown())
        self.queue.close()
        self._pauses.clear()
        self._alive_until = None
