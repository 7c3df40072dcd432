"""A controller as one host sees it: registers, features, identity, logs, events.

Responsible for: answers to Fabrics properties and to admin commands, in memory alone.
Invariants: a command is answered at once, but for at most AERS asynchronous event requests, which
wait for something to tell; a notice is sent once until the host has read the log that it names.
Must not know: connections, how data travels, what namespaces are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from struct import pack_into

from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import (
    CSTS_READY,
    CSTS_SHUTDOWN_DONE,
    CSTS_SHUTDOWN_MASK,
    EVENT_NAMESPACES,
    EVENT_NAMESPACES_RESULT,
    FABRICS,
    Admin,
    Cns,
    Connect,
    Fctype,
    Feature,
    Io,
    Log,
    Property,
    Sqe,
    Status,
)

READY_TMO = 15.0
CC_EN, CC_SHN = 1, 0b11 << 14
RETAIN_EVENT = 1 << 15
SUPPORTED, CHANGES_BLOCKS = 1, 2
HEALTHY = {1: 300 & 0xFF, 2: 300 >> 8, 3: 100, 4: 10}
"""Of the health log: 300 K, all of the spare, which is to be worried about below 10 %."""


@dataclass(frozen=True, slots=True)
class Answer:
    cid: int
    status: int = 0
    result: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the controllers of a subsystem have in common."""

    page: identify.Controller
    namespaces: Mapping[int, identify.Namespace]
    """as they are now; the mapping may change"""
    discovery: Callable[[], bytes] | None = None
    """the log, of a discovery subsystem"""
    entries: int = 128
    queues: int = 8


class TargetController:
    """See the module; `connect` says whose it is."""

    def __init__(self, number: int, connect: Connect, identity: Identity, now: float) -> None:
        self.number = number
        self.connect = connect
        self.identity = identity
        self.keep_alive_ms = connect.keep_alive_ms
        self.heard = now  # when there was a command last
        self.configuration = 0
        self.status = 0
        self.events = 0
        self._requests: list[int] = []  # asynchronous event requests that wait
        self._changed: set[int] = set()
        self._told = False
        self._commands: dict[int, Callable[[Sqe], Answer | None]] = {
            Admin.IDENTIFY: self._identify,
            Admin.GET_LOG: self._get_log,
            Admin.SET_FEATURES: self._set_features,
            Admin.GET_FEATURES: self._get_features,
            Admin.ASYNC_EVENT: self._async_event,
            Admin.KEEP_ALIVE: self._keep_alive,
            Admin.ABORT: lambda sqe: Answer(sqe.cid, result=1),  # nothing was aborted
        }

    @property
    def ready(self) -> bool:
        return self.status & (CSTS_READY | CSTS_SHUTDOWN_MASK) == CSTS_READY

    @property
    def expires(self) -> float | None:
        """When the host has been silent for too long: twice what it asked for, as Linux has it."""
        if not self.keep_alive_ms:
            return None
        return self.heard + 2 * self.keep_alive_ms / 1000

    def answer(self, sqe: Sqe) -> Answer | None:
        """To any command of the admin queue but Connect; None: the answer comes by `notices`."""
        if sqe.opcode == FABRICS:
            return self._property(sqe)
        if not self.ready:
            return Answer(sqe.cid, Status.SEQUENCE_ERROR)
        perform = self._commands.get(sqe.opcode)
        return perform(sqe) if perform else Answer(sqe.cid, Status.INVALID_OPCODE)

    def namespace_changed(self, nsid: int) -> None:
        self._changed.add(nsid)

    def notices(self) -> list[Answer]:
        """Answers to asynchronous event requests that are due now."""
        wanted = self._changed and self.events & EVENT_NAMESPACES and not self._told
        if not wanted or not self._requests:
            return []
        self._told = True
        return [Answer(self._requests.pop(0), result=EVENT_NAMESPACES_RESULT)]

    # --- properties ---

    def _property(self, sqe: Sqe) -> Answer:
        wide, offset, low, high, *_ = sqe.dwords()
        if sqe.nsid == Fctype.PROPERTY_GET:
            values = {
                Property.CAP: identify.capabilities(self.identity.entries, READY_TMO),
                Property.VS: identify.VERSION,
                Property.CC: self.configuration,
                Property.CSTS: self.status,
            }
            if offset not in values or wide & 7 != (offset == Property.CAP):
                return Answer(sqe.cid, Status.INVALID_FIELD)
            return Answer(sqe.cid, result=values[Property(offset)])
        if sqe.nsid == Fctype.PROPERTY_SET and offset == Property.CC and not wide & 7 and not high:
            self._configure(low)
            return Answer(sqe.cid)
        known = sqe.nsid in (Fctype.PROPERTY_GET, Fctype.PROPERTY_SET)
        return Answer(sqe.cid, Status.INVALID_FIELD if known else Status.INVALID_OPCODE)

    def _configure(self, value: int) -> None:
        before, self.configuration = self.configuration, value
        if not value & CC_EN:
            self.status = 0
            self.events = 0
            self._requests.clear()
            self._told = False
        elif not before & CC_EN:
            self.status = CSTS_READY
        if value & CC_SHN:
            self.status |= CSTS_SHUTDOWN_DONE

    # --- identity and logs ---

    def _identify(self, sqe: Sqe) -> Answer:
        what = sqe.dwords()[0] & 0xFF
        namespaces = self.identity.namespaces
        namespace = namespaces.get(sqe.nsid)
        if what == Cns.CONTROLLER:
            # Linux's host leaves a controller that is another one than it was connected to.
            return _page(sqe, replace(self.identity.page, controller=self.number).pack())
        if self.identity.discovery or what not in tuple(Cns)[:4]:
            return Answer(sqe.cid, Status.INVALID_FIELD)
        if what == Cns.ACTIVE_NAMESPACES:
            return _page(sqe, identify.pack_active(namespaces, sqe.nsid))
        if not 0 < sqe.nsid <= self.identity.page.namespaces:
            return Answer(sqe.cid, Status.INVALID_NAMESPACE)
        if what == Cns.NAMESPACE:
            return _page(sqe, namespace.pack() if namespace else bytes(identify.PAGE_BYTES))
        if namespace is None:
            return Answer(sqe.cid, Status.INVALID_NAMESPACE)
        return _page(sqe, identify.pack_descriptors(namespace.nguid))

    def _get_log(self, sqe: Sqe) -> Answer:
        first, words, low, high, *_ = sqe.dwords()
        length = ((first >> 16 | (words & 0xFFFF) << 16) + 1) * 4
        offset = low | high << 32
        if length != sqe.length or offset % 4:
            return Answer(sqe.cid, Status.INVALID_FIELD)
        log = first & 0xFF
        if self.identity.discovery:
            content = self.identity.discovery() if log == Log.DISCOVERY else None
        else:
            content = self._log(log, bool(first & RETAIN_EVENT))
        if content is None:
            return Answer(sqe.cid, Status.INVALID_LOG_PAGE)
        return _page(sqe, content[offset : offset + length])

    def _log(self, log: int, retain: bool) -> bytes | None:
        page = bytearray(identify.PAGE_BYTES)
        if log == Log.HEALTH:
            for at, value in HEALTHY.items():
                page[at] = value
        elif log == Log.CHANGED_NAMESPACES:
            page = identify.pack_active(self._changed)
            if not retain:
                self._changed.clear()
                self._told = False
        elif log == Log.EFFECTS:
            for admin in self._commands:
                pack_into("<I", page, admin * 4, SUPPORTED)
            for io in Io:
                changes = CHANGES_BLOCKS if io not in (Io.READ, Io.FLUSH) else 0
                pack_into("<I", page, 1024 + io * 4, SUPPORTED | changes)
        elif log != Log.ERRORS:
            return None
        return bytes(page)

    # --- features, events ---

    def _set_features(self, sqe: Sqe) -> Answer:
        feature, value, *_ = sqe.dwords()
        match feature & 0xFF:
            case Feature.QUEUES:
                return self._get_features(sqe)
            case Feature.ASYNC_EVENTS:
                self.events = value
            case Feature.KEEP_ALIVE:
                self.keep_alive_ms = value
            case _:
                return Answer(sqe.cid, Status.INVALID_FIELD)
        return Answer(sqe.cid)

    def _get_features(self, sqe: Sqe) -> Answer:
        granted = self.identity.queues - 1
        values = {
            Feature.QUEUES: granted | granted << 16,
            Feature.ASYNC_EVENTS: self.events,
            Feature.KEEP_ALIVE: self.keep_alive_ms,
            Feature.VOLATILE_WRITE_CACHE: int(self.identity.page.volatile_cache),
        }
        feature = sqe.dwords()[0] & 0xFF
        if feature not in values or (sqe.direction == 2 and sqe.length):
            return Answer(sqe.cid, Status.INVALID_FIELD)
        return Answer(sqe.cid, result=values[Feature(feature)])

    def _async_event(self, sqe: Sqe) -> Answer | None:
        if len(self._requests) >= identify.AERS:
            return Answer(sqe.cid, Status.ASYNC_EVENTS_EXCEEDED)
        self._requests.append(sqe.cid)
        return None

    def _keep_alive(self, sqe: Sqe) -> Answer:
        return Answer(sqe.cid, 0 if self.keep_alive_ms else Status.KEEP_ALIVE_INVALID)


def _page(sqe: Sqe, content: bytes | bytearray) -> Answer:
    """As much of the page as was asked for, with zeros after its end."""
    return Answer(sqe.cid, data=bytes(content[: sqe.length]).ljust(sqe.length, b"\0"))
