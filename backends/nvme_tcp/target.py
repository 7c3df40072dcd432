"""A target: one subsystem with namespaces, and discovery, for several hosts at once.

Responsible for: which host may connect which queue; which controller a connection belongs to, and
that all its connections end with it; limits; judging I/O commands, which become operations for
the shell to carry out.
Invariants:
 1. An operation's blocks exist and its data has just their size.
 2. What a connection costs before it belongs to a controller is bounded in number, memory and time.
 3. A connection that another one's end, or an event, concerns is among `touched`.
Must not know: sockets, the clock, what namespaces are stored in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from struct import error as StructError  # noqa: N812

from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import FABRICS, Connect, Fctype, Io, Sqe, Status
from userswap.backends.nvme_tcp.pdu import Buffer, ConnectionLostError, LocalProtocolError
from userswap.backends.nvme_tcp.target_controller import Answer, Identity, TargetController
from userswap.backends.nvme_tcp.target_queue import Arrived, Closed, Limits, TargetQueue

AT_CONTROLLER, AT_SUBSYSTEM, AT_HOST = 0x10010, 0x10100, 0x10200  # in the data of Connect
AT_RECFMT, AT_QUEUE, AT_SIZE = 0x28, 0x2A, 0x2C  # in the command
DEALLOCATE = 1 << 2
NAMESPACES = 32
KINDS = {int(kind): kind for kind in Io}


@dataclass(frozen=True, slots=True)
class Rules:
    """What a target allows."""

    hosts: frozenset[str] | None = None
    """NQNs of those that may connect; None: all"""
    connections: int = 128
    unconnected: int = 64
    """connections that do not belong to a controller (yet)"""
    controllers_per_host: int = 4
    queues: int = 8
    """I/O queues of a controller"""
    entries: int = 128
    connect_tmo: float = 10.0
    limits: Limits = field(default_factory=Limits)


class RefusedError(Exception):
    """There are as many connections as the rules allow."""


@dataclass(slots=True, eq=False)
class Operation:
    """What is to be done with the blocks of a namespace; answer it with `Session.complete`."""

    cid: int
    kind: Io
    nsid: int
    ranges: tuple[tuple[int, int], ...] = ()
    """(first block, blocks); all of them but Dataset Management have one, Flush has none"""
    data: memoryview | bytes = b""
    durable: bool = False
    """written data has to survive a crash when this is answered"""
    deallocate: bool = False


Event = Operation | Closed


class Target:
    """See the module. `namespaces` by number; `set_namespace` changes them."""

    def __init__(
        self,
        nqn: str,
        namespaces: dict[int, identify.Namespace],
        rules: Rules,
        *,
        serial: str,
        listens: Sequence[tuple[str, str]] = (),
        volatile_cache: bool = True,
    ) -> None:
        self.nqn = nqn
        self.rules = rules
        self.namespaces = dict(namespaces)
        self.listens = list(listens)
        self.sessions: set[Session] = set()
        self.controllers: dict[int, TargetController] = {}
        self.touched: set[Session] = set()
        """which have something to send, or to be closed, unasked; the shell looks and empties it"""
        self._number = 0  # of the controller that came last
        self._accepted = 0
        page = identify.Controller(
            serial=serial,
            model="userswap",
            firmware="1",
            transfer=rules.limits.transfer,
            in_capsule=rules.limits.in_capsule,
            namespaces=NAMESPACES,
            volatile_cache=volatile_cache,
            commands=rules.entries,
            subsystem=nqn,
        )
        discovery = identify.Controller(
            serial=serial,
            model="userswap",
            firmware="1",
            in_capsule=rules.limits.in_capsule,
            namespaces=0,
            optional=0,
            kind=identify.DISCOVERY_CONTROLLER,
            commands=rules.entries,
            subsystem=identify.DISCOVERY_NQN,
        )
        self._pages = {nqn: page, identify.DISCOVERY_NQN: discovery}

    def accept(self, now: float, reached: tuple[str, str] | None = None) -> Session:
        """Somebody has connected, to the address `reached`; None: to one of `listens`.

        Where too many do not say who they are, the one that has been silent longest has to go:
        refusing the newcomer would let silence keep hosts out.
        """
        unconnected = [session for session in self.sessions if session.controller is None]
        if len(unconnected) >= self.rules.unconnected:
            min(unconnected, key=lambda session: session.number).close("others wait")
        if len(self.sessions) >= self.rules.connections:
            raise RefusedError(f"there are {len(self.sessions)} connections")
        self._accepted += 1
        session = Session(self, self._accepted, now, reached)
        self.sessions.add(session)
        return session

    def set_namespace(self, nsid: int, namespace: identify.Namespace | None) -> None:
        """A namespace came, went, or changed: the hosts that want to know are told."""
        if namespace is None:
            self.namespaces.pop(nsid, None)
        else:
            self.namespaces[nsid] = namespace
        for controller in self.controllers.values():
            if controller.identity.discovery is None:
                controller.namespace_changed(nsid)
        for session in self.sessions:
            session.tell()

    # --- for sessions ---

    def identity(self, nqn: str, reached: tuple[str, str] | None = None) -> Identity:
        log = self._log([reached] if reached else self.listens)
        return Identity(
            page=self._pages[nqn],
            namespaces=self.namespaces,
            discovery=(lambda: log) if nqn == identify.DISCOVERY_NQN else None,
            entries=self.rules.entries,
            queues=self.rules.queues,
        )

    def _log(self, listens: Sequence[tuple[str, str]]) -> bytes:
        """Who listens everywhere is known to a host by the address that it came to."""
        entries = [
            identify.Entry(
                self.nqn,
                address,
                service,
                family=identify.IPV6 if ":" in address else identify.IPV4,
            )
            for address, service in listens
        ]
        return identify.pack_log(1, entries)

    def admit(
        self, connect: Connect, now: float, reached: tuple[str, str] | None
    ) -> TargetController | tuple[int, int]:
        """The controller that this connection belongs to, or status and result of a refusal."""
        rules = self.rules
        if connect.subsystem not in self._pages:
            return Status.CONNECT_INVALID, AT_SUBSYSTEM
        if rules.hosts is not None and connect.host not in rules.hosts:
            return Status.CONNECT_INVALID_HOST, AT_HOST
        if not 2 <= connect.entries <= rules.entries:
            return Status.CONNECT_INVALID, AT_SIZE
        if connect.queue:
            return self._admit_queue(connect)
        if connect.controller != nvme.ANY_CONTROLLER:
            return Status.CONNECT_INVALID, AT_CONTROLLER
        others = sum(c.connect.host == connect.host for c in self.controllers.values())
        if others >= rules.controllers_per_host:
            return Status.CONNECT_BUSY, 0
        self._number = self._number % 0xFFEF + 1
        while self._number in self.controllers:
            self._number = self._number % 0xFFEF + 1
        identity = self.identity(connect.subsystem, reached)
        controller = TargetController(self._number, connect, identity, now)
        self.controllers[controller.number] = controller
        return controller

    def _admit_queue(self, connect: Connect) -> TargetController | tuple[int, int]:
        controller = self.controllers.get(connect.controller)
        if controller is None:
            return Status.CONNECT_INVALID, AT_CONTROLLER
        owner = controller.connect
        if (owner.host, owner.host_id) != (connect.host, connect.host_id):
            return Status.CONNECT_INVALID, AT_HOST
        if owner.subsystem != connect.subsystem:
            return Status.CONNECT_INVALID, AT_SUBSYSTEM
        if connect.queue > self.rules.queues or controller.identity.discovery:
            return Status.CONNECT_INVALID, AT_QUEUE
        taken = any(
            session.controller is controller and session.queue.queue == connect.queue
            for session in self.sessions
        )
        if taken or not controller.ready:
            return Status.SEQUENCE_ERROR, 0
        return controller

    def ended(self, session: Session, why: str) -> None:
        """A connection is over, and with it its controller and all connections of that."""
        self.sessions.discard(session)
        controller, session.controller = session.controller, None
        if controller is None or self.controllers.pop(controller.number, None) is None:
            return
        for other in [s for s in self.sessions if s.controller is controller]:
            other.close(why)

    def reset(self, controller: TargetController) -> None:
        """The host disabled its controller: only the admin queue stays."""
        for other in [s for s in self.sessions if s.controller is controller]:
            if other.queue.queue:
                other.controller = None
                other.close("the controller was reset")


class Session:
    """One connection: what is received goes to the target, operations come out."""

    def __init__(
        self, target: Target, number: int, now: float, reached: tuple[str, str] | None
    ) -> None:
        self.target = target
        self.reached = reached
        self.number = number
        self.queue = TargetQueue(target.rules.limits)
        self.controller: TargetController | None = None
        self._deadline = now + target.rules.connect_tmo
        self._operations: dict[int, Operation] = {}

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        return self.queue.get_buffer(sizehint)

    def buffer_updated(self, count: int, now: float) -> list[Event]:
        return self._digest(self.queue.buffer_updated(count, now), now)

    def receive_data(self, data: Buffer, now: float) -> list[Event]:
        return self._digest(self.queue.receive_data(data, now), now)

    def eof_received(self, now: float) -> list[Event]:
        """The host sends nothing more, or the connection broke.

        An I/O queue goes alone: when Linux's host resets or leaves a controller, it closes these
        first, and waits for a minute if it then finds the admin queue closed.
        """
        if self.queue.queue and not self.over:
            self.controller = None
        return self._digest(self.queue.eof_received(), now)

    def data_to_send(self) -> list[Buffer]:
        return self.queue.data_to_send()

    @property
    def over(self) -> bool:
        """Send what there is and close the connection."""
        return self.queue.error is not None

    def get_timer(self) -> float | None:
        if self.over:
            return None
        return self._deadline if self.controller is None else self.controller.expires

    def handle_timer(self, now: float) -> list[Event]:
        """The connection ends if its host was silent for too long."""
        deadline = self.get_timer()
        if deadline is not None and deadline <= now:
            silent = ConnectionLostError("the host was silent for too long")
            return self._digest(self.queue.close(silent), now)
        return []

    def close(self, why: str) -> None:
        """End the connection from here; the shell finds it among those that were touched."""
        self.target.touched.add(self)
        self._digest(self.queue.close(ConnectionLostError(why)), 0.0)

    def complete(self, operation: Operation, status: int = 0, data: Buffer = b"") -> None:
        """Answer an operation; data only of a Read that succeeded."""
        if self.over:
            return
        if self._operations.pop(operation.cid, None) is not operation:
            raise LocalProtocolError(f"operation {operation.cid} is not to be answered")
        self.queue.complete(operation.cid, status, 0, data)

    def tell(self) -> None:
        """Send the host of an admin queue what it waits for, if there is anything."""
        if self.controller is not None and self.queue.queue == 0:
            for notice in self.controller.notices():
                self.queue.complete(notice.cid, notice.status, notice.result)
                self.target.touched.add(self)

    # --- commands ---

    def _digest(self, arrived: Sequence[Arrived | Closed], now: float) -> list[Event]:
        events: list[Event] = []
        for event in arrived:
            if isinstance(event, Closed):
                self._operations.clear()
                self.target.ended(self, str(event.error))
                events.append(event)
            elif not self.over:
                self._arrived(event, events, now)
        return events

    def _arrived(self, event: Arrived, events: list[Event], now: float) -> None:
        sqe = event.sqe
        controller = self.controller
        if controller is None:
            self._answer(self._connect(event, now))
            return
        controller.heard = now
        if self.queue.queue == 0:
            self._answer(controller.answer(sqe))
            if sqe.opcode == FABRICS and not controller.ready:
                self.target.reset(controller)
            self.tell()
            return
        operation = self._judge(sqe, event.data)
        if isinstance(operation, Operation):
            self._operations[operation.cid] = operation
            events.append(operation)
        else:
            self._answer(Answer(sqe.cid, operation))

    def _answer(self, answer: Answer | None) -> None:
        if answer is not None:
            self.queue.complete(answer.cid, answer.status, answer.result, answer.data)

    def _connect(self, event: Arrived, now: float) -> Answer:
        sqe = event.sqe
        if sqe.opcode != FABRICS or sqe.nsid != Fctype.CONNECT:
            return Answer(sqe.cid, Status.SEQUENCE_ERROR)
        if sqe.cdw[0] or sqe.cdw[1]:
            return Answer(sqe.cid, Status.CONNECT_FORMAT, AT_RECFMT)
        try:
            connect = Connect.parse(sqe.command, event.data)
        except (StructError, ValueError):
            return Answer(sqe.cid, Status.CONNECT_INVALID, AT_SUBSYSTEM)
        admitted = self.target.admit(connect, now, self.reached)
        if isinstance(admitted, tuple):
            return Answer(sqe.cid, *admitted)
        self.controller = admitted
        self.queue.connected(connect.queue, connect.entries, connect.flow_control)
        return Answer(sqe.cid, result=admitted.number)

    def _judge(self, sqe: Sqe, data: memoryview) -> Operation | int:
        """An I/O command as an operation, or the status that says why not."""
        kind = KINDS.get(sqe.opcode)
        if kind is None:
            return Status.INVALID_OPCODE
        controller = self.controller
        assert controller is not None
        if not controller.ready:
            return Status.SEQUENCE_ERROR
        namespace = self.target.namespaces.get(sqe.nsid)
        if namespace is None:
            known = 0 < sqe.nsid <= NAMESPACES
            return Status.PATH_ERROR if known else Status.INVALID_NAMESPACE
        if kind is Io.FLUSH:
            return Operation(sqe.cid, kind, sqe.nsid)
        dwords = sqe.dwords()
        flags = dwords[2]
        if kind is Io.DATASET_MANAGEMENT:
            number = (sqe.cdw[0] + 1) * nvme.RANGE.size
            if len(data) < number:
                return Status.SGL_LENGTH_INVALID
            found = nvme.RANGE.iter_unpack(data[:number])
            wanted = dwords[1] & DEALLOCATE
            ranges = tuple((first, count) for _, count, first in found if wanted)
        else:
            first, count = nvme.blocks_of(dwords)
            ranges = ((first, count),)
            size = 0 if kind is Io.WRITE_ZEROES else count * namespace.block_size
            if sqe.length != size:
                return Status.SGL_LENGTH_INVALID
        for first, count in ranges:
            if first + count > namespace.blocks:
                return Status.LBA_OUT_OF_RANGE
        if kind is Io.READ:
            return Operation(sqe.cid, kind, sqe.nsid, ranges)
        return Operation(
            cid=sqe.cid,
            kind=kind,
            nsid=sqe.nsid,
            ranges=ranges,
            data=data,
            durable=bool(flags & nvme.FUA) and kind is not Io.DATASET_MANAGEMENT,
            deallocate=bool(flags & nvme.DEALLOCATE) or kind is Io.DATASET_MANAGEMENT,
        )
