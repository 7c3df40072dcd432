"""What there is at an address: the discovery log there, and at those that it refers to.

Responsible for: asking each discovery controller once, for a bounded time, and few of them.
Must not know: command lines, what subsystems are used for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from userswap.backends.nvme_tcp.command import Status, code_of
from userswap.backends.nvme_tcp.controller import Settings
from userswap.backends.nvme_tcp.host import open_controller
from userswap.backends.nvme_tcp.identify import DISCOVERY_NQN, TCP, Entry
from userswap.backends.nvme_tcp.pdu import ConnectionLostError, ProtocolError
from userswap.backends.nvme_tcp.qpair import ConnectRefusedError, Options
from userswap.backends.nvme_tcp.url import default_host

REFERRAL, SUBSYSTEM, ITSELF = 1, 2, 3
"""Subtypes of entries."""
ASKED_MAX = 16
PATIENCE_S = 10.0

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Log:
    """What the discovery controller at `address` told, or why it told nothing."""

    address: Address
    entries: tuple[Entry, ...] = ()
    problem: str = ""


@dataclass
class _Asked:
    logs: list[Log] = field(default_factory=list)
    left: deque[Address] = field(default_factory=deque)
    known: set[Address] = field(default_factory=set)

    def refer(self, address: Address) -> None:
        if address not in self.known and len(self.known) < ASKED_MAX:
            self.known.add(address)
            self.left.append(address)


async def discover(address: Address, *, host: str | None = None) -> list[Log]:
    """The logs, that of `address` first, as the host of that NQN is shown them.

    Raises a ProtocolError where the first one cannot be had; others have a `problem` then.
    """
    asked = _Asked()
    asked.refer(address)
    while asked.left:
        where = asked.left.popleft()
        try:
            entries = await _log(where, host)
        except ProtocolError as error:
            if where == address:
                raise
            asked.logs.append(Log(where, problem=str(error)))
            continue
        asked.logs.append(Log(where, entries))
        for entry in entries:
            if entry.subtype == REFERRAL and entry.transport == TCP and entry.service.isdigit():
                asked.refer((entry.address, int(entry.service)))
    return asked.logs


async def _log(address: Address, host: str | None) -> tuple[Entry, ...]:
    name, host_id = default_host()
    settings = Settings(
        subsystem=DISCOVERY_NQN,
        host=host or name,
        host_id=host_id,
        keep_alive_tmo=0.0,
        options=Options(connect_tmo=PATIENCE_S, command_tmo=PATIENCE_S),
    )
    try:
        controller = await open_controller(address, settings)
    except ConnectRefusedError as error:
        if code_of(error.status) == Status.CONNECT_INVALID_HOST:
            message = f"does not let this host in, which is {settings.host} (--allow-host there)"
            raise ConnectionLostError(message) from None
        raise
    try:
        return controller.discovery_log()
    finally:
        await controller.aclose()
