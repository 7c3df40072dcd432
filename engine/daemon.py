"""The daemon: one pager for many programs, which share one budget and trust each other in nothing.

A client is a stranger. It gets the channel to its own agent and nothing else of the pager's memory;
it names stores that the operator declared, never what a URL could name; every number that it sends
is checked; and what it may have open is limited by user. What it does not do (answer, read, let go)
harms nobody else: whatever waits for it, waits on its own.

Must not know: how sockets are made, how limits are found.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from userswap.backends.grammar import format_size, unknown_name
from userswap.engine.budget import FLOOR, Budget, BudgetError
from userswap.engine.connection import Connection, Terms
from userswap.engine.control import Message
from userswap.engine.desk import Desk
from userswap.engine.errors import ConfigError, ResidentError, UserswapError
from userswap.engine.listening import Listener
from userswap.engine.served import ClientService, OpenRegion
from userswap.engine.stores import Stores
from userswap.native import check, ffi, lib

log = logging.getLogger("userswap.pager")

PAGE = 4096
ADDRESS_MAX = 1 << 57
TICK_S = 0.1
TICK_SHARE = 20
"""A look at the budget takes at most one part in so many of the time."""
HELLO_S = 30.0
ACCEPT_AGAIN_S = 0.1
USERFAULTFD = "anon_inode:[userfaultfd]"
PRESSED_FAULTS = 4
"""Faults between two looks that say that a region wants more than it has."""


@dataclass(frozen=True)
class Limits:
    """What one user may have of a daemon at once."""

    clients: int
    regions: int
    bytes: int


@dataclass(eq=False)
class Seat:
    """An open region, or one that is being opened, in the books of the daemon."""

    client: Connection
    pages: int
    cap: int
    number: int = 0
    region: OpenRegion | None = None
    releasing: bool = False
    """Its limit is not the budget's any more."""
    faults: int = 0
    parked: int = 0
    weight: float = field(default=1.0)


class Daemon(Terms):
    """The clients of one socket. `stores` are those that the operator declared, by name."""

    requests_max = 64
    patience_s = 10.0

    def __init__(
        self, listener: Listener, stores: Mapping[str, str], budget: Budget, limits: Limits
    ) -> None:
        self.listener = listener
        self.stores = stores
        self.opened_stores = Stores(stores)
        self.budget = budget
        self.limits = limits
        self.clients: dict[int, Connection] = {}
        """By number, also those that are being let go of."""
        self.seats: list[Seat] = []
        self.desk = Desk(self)
        self.draining = False
        self._last_client = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._pidfd = os.pidfd_open(os.getpid())
        self._report = ffi.new("struct us_report *")

    async def try_stores(self) -> None:
        """Open each declared store once; raises ConfigError, UserswapError for what cannot be."""
        for name in self.stores:
            await self.opened_stores.close(await self.opened_stores.open(0, name, "trial", 1))

    def start(self) -> None:
        """Take clients from now on."""
        asyncio.get_running_loop().add_reader(self.listener.socket.fileno(), self._accept)
        self._keep(self._look_after_budget())

    async def stop(self) -> None:
        """After the last region is gone: let go of everybody."""
        asyncio.get_running_loop().remove_reader(self.listener.socket.fileno())
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.listener.close()
        os.close(self._pidfd)

    def _keep(self, job: Any) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- connections ---

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._rest(str(error.strerror))
            return
        self._last_client += 1
        client = Connection(connection, self, self._last_client)
        if self._of_user(client.credentials.uid) >= 2 * self.limits.clients:
            log.warning("user %d has too many connections", client.credentials.uid)
            connection.close()
            return
        self.clients[client.number] = client
        client.open()
        self._keep(self._attend(client))

    def _of_user(self, uid: int) -> int:
        return sum(client.credentials.uid == uid for client in self.clients.values())

    def _rest(self, why: str) -> None:
        """No descriptor is free: whoever waits, waits a little longer."""
        log.warning("no connection can be taken: %s", why)
        loop = asyncio.get_running_loop()
        listener = self.listener.socket
        loop.remove_reader(listener.fileno())

        def again() -> None:
            if listener.fileno() >= 0:
                loop.add_reader(listener.fileno(), self._accept)

        loop.call_later(ACCEPT_AGAIN_S, again)

    async def _attend(self, client: Connection) -> None:
        """A client's whole life here."""
        try:
            try:
                await asyncio.wait_for(client.introduced.wait(), HELLO_S)
                await client.ended.wait()
            except TimeoutError:
                log.warning("process %d says nothing", client.credentials.pid)
            await client.close()
        except Exception:
            log.exception("process %d", client.credentials.pid)
        finally:
            for seat in [seat for seat in self.seats if seat.client is client]:
                self._leave(seat)
            del self.clients[client.number]
            self.budget.leave(client.number)

    # --- what clients ask for ---

    def begin(self, client: Connection, hello: Message, uffd: int) -> ClientService:
        uid = client.credentials.uid
        self._refuse_when_draining()
        served = sum(
            other.credentials.uid == uid and other.service is not None
            for other in self.clients.values()
        )
        if served >= self.limits.clients:
            raise UserswapError(f"user {uid} has {served} clients here, the most that one may have")
        if os.readlink(f"/proc/self/fd/{uffd}") != USERFAULTFD:
            raise ConfigError("hello: the descriptor is no userfaultfd")
        if hello["fault_path"] == "asyncio":
            raise ConfigError('a daemon serves faults natively: use fault_path="native"')
        placement, features = int(hello["placement"]), int(hello["features"])
        if placement not in range(3) or not 0 <= features < 1 << 64:
            raise ConfigError("hello: numbers out of range")
        service = ClientService(
            client.number,
            uffd,
            {
                "pid": client.credentials.pid,
                "fault_path": "native",
                "placement": placement,
                "mover": hello["mover"],
                "features": features,
                "canary": 0,
            },
            self.opened_stores,
        )
        try:
            check(lib.us_client_distrust(service.native, uid != os.geteuid()))
        except OSError:
            lib.us_client_destroy(service.native)
            raise
        return service

    def handed_out(self, service: ClientService) -> list[int]:
        return [*service.descriptors()[1:], self._pidfd]

    def check_agent(self, client: Connection, staging: int, thread: int) -> None:
        if not 0 < staging < ADDRESS_MAX or staging % PAGE:
            raise ConfigError(f"agent: staging at {staging:#x}")
        if not os.path.isdir(f"/proc/{client.credentials.pid}/task/{thread:d}"):
            raise ConfigError(f"agent: {thread} is no thread of process {client.credentials.pid}")

    async def open(
        self, client: Connection, service: ClientService, request: Message
    ) -> tuple[Message, list[int]]:
        self._refuse_when_draining()
        seat = self._seat(client, request)
        try:
            self.budget.open(client.number, seat, seat.cap)
        except BudgetError as refusal:
            raise ResidentError(f"the pager's budget: {refusal}") from None
        self.seats.append(seat)
        try:
            self.settle()
            granted = self.budget.account(client.number, seat).limit
            answer, _ = await service.open({**request, "limit": granted})
        except BaseException:
            self._leave(seat)
            raise
        seat.number = int(answer["region"])
        seat.region = service.regions[seat.number]
        self._apply(seat)
        return answer, []

    def _seat(self, client: Connection, request: Message) -> Seat:
        """What a client asks for, looked at; raises ConfigError, UserswapError."""
        start, pages, cap = (int(request[key]) for key in ("start", "pages", "limit"))
        size = pages * PAGE
        if pages <= 0 or start <= 0 or cap <= 0 or start + size > ADDRESS_MAX:
            raise ConfigError(f"a region of {pages} pages at {start:#x} with {cap} bytes")
        store = str(request["store"])
        if store not in self.stores:
            raise ConfigError(unknown_name("store of this pager", store, self.stores))
        name = request.get("name")
        if name is not None and not (isinstance(name, str) and name.isprintable()):
            raise ConfigError("a name is printable text")
        uid = client.credentials.uid
        mine = [seat for seat in self.seats if seat.client.credentials.uid == uid]
        if len(mine) >= self.limits.regions:
            raise UserswapError(f"user {uid} has {len(mine)} regions here, the most one may have")
        held = sum(seat.pages for seat in mine) * PAGE
        if held + size > self.limits.bytes:
            raise UserswapError(
                f"user {uid} has regions of {format_size(held)} here, and may have "
                f"{format_size(self.limits.bytes)}: {format_size(size)} more are too many"
            )
        return Seat(client, pages, min(cap, max(size, FLOOR)))

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise UserswapError("this pager is ending: it takes no new clients and no new regions")

    async def close(
        self, client: Connection, service: ClientService, number: int, unmapped: bool
    ) -> None:
        await service.close(number, unmapped=unmapped)
        self._leave(self.seat_of(client, number))

    async def visit(self, visitor: Connection, operation: str, request: Message) -> Message:
        return await self.desk.answer(visitor, operation, request)

    def limit(self, client: Connection, region: OpenRegion, number: int, limit: int) -> None:
        self.resize(self.seat_of(client, number), limit)

    # --- what the desk shows and changes ---

    def about(self) -> Message:
        return {
            "kind": "daemon",
            "pid": os.getpid(),
            "resident": self.budget.total,
            "granted": sum(account.limit for _, _, account in self.budget.accounts()),
            "stores": list(self.stores),
            "ending": self.draining,
        }

    def connections(self) -> list[Connection]:
        return list(self.clients.values())

    def grants(self, client: Connection, number: int) -> Message:
        if not number:
            holder = self.budget.standing(client.number)
            return {"min": holder.minimum, "weight": holder.weight}
        seat = self.seat_of(client, number)
        account = self.budget.account(client.number, seat)
        return {"resident": account.cap, "weight": account.weight, "min": account.floor}

    def change(self, client: Connection, number: int, what: str, value: int | float) -> None:
        seat = self.seat_of(client, number) if number else None
        try:
            if what == "resident":
                if seat is None:
                    raise ConfigError("resident= is a region's: use CLIENT/REGION")
                self.resize(seat, int(value))
            elif what == "weight":
                self.budget.weigh(client.number, seat, float(value))
            else:
                self.budget.promise(client.number, seat, int(value))
        except BudgetError as refusal:
            raise ResidentError(f"the pager's budget: {refusal}") from None
        self.settle()

    # --- the budget ---

    def seat_of(self, client: Connection, number: int) -> Seat:
        for seat in self.seats:
            if seat.client is client and seat.number == number:
                return seat
        raise ConfigError(f"no region {number}")

    def resize(self, seat: Seat, cap: int) -> None:
        """Another upper limit; raises ResidentError."""
        try:
            self.budget.resize(seat.client.number, seat, min(cap, max(seat.pages * PAGE, FLOOR)))
        except BudgetError as refusal:
            raise ResidentError(f"the pager's budget: {refusal}") from None
        seat.cap = self.budget.account(seat.client.number, seat).cap
        self.settle()

    def restore_limit(self, seat: Seat) -> None:
        """The region is the budget's again."""
        self._apply(seat)

    def left(self, seat: Seat) -> None:
        """The region went back to its program."""
        self._leave(seat)

    def _leave(self, seat: Seat) -> None:
        if seat in self.seats:
            self.seats.remove(seat)
            self.budget.close(seat.client.number, seat)

    def settle(self) -> None:
        """Look at what regions hold, and apply the limits that follow."""
        for seat in self.seats:
            region = seat.region
            if region is not None and region.closing:
                continue
            if region is not None:
                self._observe(seat, region)
        for _, changed, _ in self.budget.settle():
            assert isinstance(changed, Seat)
            self._apply(changed)

    def _observe(self, seat: Seat, region: OpenRegion) -> None:
        report = self._report
        lib.us_region_report(region.handle, report)
        faults, parked = report.zero + report.load + report.awaited, report.parked
        account = self.budget.account(seat.client.number, seat)
        near = report.charged >= account.limit - account.limit // 8
        pressed = parked > seat.parked or (near and faults - seat.faults >= PRESSED_FAULTS)
        seat.faults, seat.parked = faults, parked
        self.budget.observe(seat.client.number, seat, report.charged, pressed)

    def _apply(self, seat: Seat) -> None:
        if seat.region is not None and not seat.region.closing and not seat.releasing:
            limit = self.budget.account(seat.client.number, seat).limit
            lib.us_region_limit(seat.region.handle, limit)

    async def _look_after_budget(self) -> None:
        while True:
            began = time.monotonic()
            if self.seats:
                self.settle()
            await asyncio.sleep(max(TICK_S, (time.monotonic() - began) * TICK_SHARE))
