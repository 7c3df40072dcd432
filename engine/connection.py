"""A client's control connection, as every pager has it, and the terms on which it is served.

Requests are answered each by its own task. What comes with a message and is not taken is closed.
The terms say what differs: an embedded pager trusts its own process, a daemon trusts nobody.

Must not know: listening, budgets, which stores there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable

from userswap.backends.store import StoreError
from userswap.engine.control import (
    Message,
    close_all,
    credentials,
    open_peer,
    receive,
    send,
)
from userswap.engine.errors import ConfigError, PagerError, ReleasedError, UserswapError
from userswap.engine.served import ClientService, OpenRegion
from userswap.engine.stores import Stores
from userswap.native import lib

log = logging.getLogger("userswap.pager")

FULL_FIRST_S = 0.001
FULL_MAX_S = 0.05
"""Between two looks whether a client has read what it was sent."""


class Terms:
    """What a pager grants; these are an embedded pager's, whose client is its own process."""

    requests_max: int | None = None
    """Requests of one client under way; more are not read."""
    patience_s: float | None = None
    """How long an answer may lie unread before the connection ends."""

    def begin(self, client: Connection, hello: Message, uffd: int) -> ClientService:
        """A new client's service, which owns the userfaultfd from then on."""
        return ClientService(client.number, uffd, hello, Stores())

    def handed_out(self, service: ClientService) -> list[int]:
        """Descriptors of the pager's that the client gets copies of."""
        return service.descriptors()

    def check_agent(self, client: Connection, staging: int, thread: int) -> None:
        """Raises UserswapError where a client names an agent that is not its own."""

    async def open(
        self, client: Connection, service: ClientService, request: Message
    ) -> tuple[Message, list[int]]:
        return await service.open(request)

    async def close(
        self, client: Connection, service: ClientService, number: int, unmapped: bool
    ) -> None:
        await service.close(number, unmapped=unmapped)

    def limit(self, client: Connection, region: OpenRegion, number: int, limit: int) -> None:
        """The client asks for another budget."""
        lib.us_region_limit(region.handle, limit)

    async def visit(self, visitor: Connection, operation: str, request: Message) -> Message:
        """A request without hello: of whoever looks at the pager, or changes what it grants."""
        raise UserswapError("hello comes first")


class Connection:
    """One client's control connection, or a visitor's."""

    def __init__(
        self, connection: socket.socket, terms: Terms | None = None, number: int = 1
    ) -> None:
        connection.setblocking(False)
        self.number = number
        """Of this connection in its pager, from 1."""
        self.credentials = credentials(connection)
        self.service: ClientService | None = None
        self.introduced = asyncio.Event()
        """Set by the hello, and by the end."""
        self.ended = asyncio.Event()
        self.leaving: dict[int, asyncio.Event] = {}
        """Regions that are being released; set when that has ended, either way."""
        self.released: set[int] = set()
        self._socket = connection
        self._terms = terms or Terms()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unclaimed: set[int] = set()
        """Descriptors that came and that no operation has taken."""
        self._pidfd = -1
        self._reads = False

    def open(self) -> None:
        self._reads = True
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _pause(self) -> None:
        if self._reads:
            self._reads = False
            asyncio.get_running_loop().remove_reader(self._socket.fileno())

    def _readable(self) -> None:
        try:
            message, descriptors = receive(self._socket)
        except BlockingIOError:
            return
        except (OSError, PagerError) as error:
            log.warning("control connection of process %d: %s", self.credentials.pid, error)
            self._end()
            return
        if message is None:
            self._end()
            return
        self._unclaimed.update(descriptors)
        task = asyncio.get_running_loop().create_task(self._answer(message, descriptors))
        self._tasks.add(task)
        task.add_done_callback(self._answered)
        most = self._terms.requests_max
        if most is not None and len(self._tasks) >= most:
            self._pause()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._reads and not self.ended.is_set():
            self.open()

    def _end(self) -> None:
        self._pause()  # an end that is not read would be told again and again
        self.introduced.set()
        self.ended.set()

    async def _answer(self, request: Message, descriptors: list[int]) -> None:
        answer: Message = {"id": request.get("id"), "ok": True}
        outgoing: list[int] = []
        try:
            if request.get("op") != "hello":
                self._refuse(descriptors)
            result, outgoing = await self._perform(str(request.get("op")), request, descriptors)
            answer.update(result)
        except UserswapError as error:
            answer.update(ok=False, kind=error.kind, error=str(error))
        except (OSError, StoreError) as error:
            answer.update(ok=False, kind="error", error=f"{request.get('op')}: {error}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            answer.update(
                ok=False, kind="config", error=f"{request.get('op')}: bad request ({error})"
            )
        except Exception as error:
            log.exception("%s", request.get("op"))
            answer.update(ok=False, kind="error", error=f"{request.get('op')}: {error!r}")
        finally:
            self._refuse(descriptors)
        await self.tell(answer, outgoing)

    async def tell(self, message: Message, descriptors: Iterable[int] = ()) -> None:
        """Send a message, also to a client that does not read at the moment."""
        patience, delay = self._terms.patience_s, FULL_FIRST_S
        since = time.monotonic()
        while not self.ended.is_set():
            try:
                send(self._socket, message, [*descriptors])
                return
            except BlockingIOError:
                if patience is not None and time.monotonic() - since > patience:
                    log.warning("process %d does not read its answers", self.credentials.pid)
                    self._end()
                    return
                await asyncio.sleep(delay)
                delay = min(delay * 2, FULL_MAX_S)
            except PagerError as error:  # longer than a message may be
                log.warning("process %d: %s", self.credentials.pid, error)
                message = {"id": message.get("id"), "ok": False, "kind": "error"}
                message["error"] = str(error)
            except OSError:
                self._end()

    async def _perform(
        self, operation: str, request: Message, descriptors: list[int]
    ) -> tuple[Message, list[int]]:
        if operation == "hello":
            return self._hello(request, descriptors)
        service = self.service
        if service is None:
            return await self._terms.visit(self, operation, request), []
        if operation == "agent":
            staging, thread = int(request["staging"]), int(request["tid"])
            self._terms.check_agent(self, staging, thread)
            service.start(staging, thread, self._end)
            return {}, []
        if operation == "quiet":
            await service.quiet()
            return {}, []
        if operation == "open":
            return await self._terms.open(self, service, request)
        return await self._on_region(service, operation, request), []

    async def _on_region(self, service: ClientService, operation: str, request: Message) -> Message:
        number = await self._settled(request)
        region = service.region(request)
        match operation:
            case "stats":
                return {"stats": await service.stats_of(region)}
            case "limit":
                limit = int(request["limit"])
                if limit <= 0:
                    raise ConfigError(f"a budget of {limit} bytes")
                self._terms.limit(self, region, number, limit)
            case "prefetch" | "discard" | "flush":
                return await self._over_time(service, region, operation, request)
            case "quiesce":
                with service.telling("closing", region.name, region.url):
                    await service.quiesce(region)
            case "resume":
                region.closing = False
                lib.us_region_resume(region.handle)
            case "close":
                await self._terms.close(self, service, number, bool(request["unmapped"]))
            case _:
                raise UserswapError(f"no operation {operation!r}")
        return {}

    async def _settled(self, request: Message) -> int:
        """The number of a region of this client's, once it is not being released any more."""
        number = int(request["region"])
        while number in self.leaving:
            await self.leaving[number].wait()
        if number in self.released:
            raise ReleasedError(f"region {number} was released: its memory is ordinary memory now")
        return number

    async def _over_time(
        self, service: ClientService, region: OpenRegion, operation: str, request: Message
    ) -> Message:
        """An operation that a close has to wait for."""
        region.operations.begin()
        try:
            if operation == "flush":
                await service.flush(region)
                return {}
            first, count = int(request["first"]), int(request["count"])
            if operation == "discard":
                await service.discard(region, first, count)
                return {}
            return {"pages": await service.prefetch(region, first, count)}
        finally:
            region.operations.end()

    def _hello(self, request: Message, descriptors: list[int]) -> tuple[Message, list[int]]:
        if self.service is not None or len(descriptors) != 1:
            raise UserswapError("hello comes once, with one userfaultfd")
        pid = self.credentials.pid
        if request["pid"] != pid:
            # Memory is read, and the client's end is seen, by this number.
            raise UserswapError(f"hello: this is process {pid}, not {request['pid']!r}")
        # A child of the client may hold its socket open: only the pidfd tells that it has ended.
        pidfd = open_peer(self._socket, pid)
        try:
            self.service = self._terms.begin(self, request, descriptors[0])
        except BaseException:
            os.close(pidfd)
            raise
        self._unclaimed.difference_update(descriptors)
        self._pidfd = pidfd
        self.introduced.set()
        asyncio.get_running_loop().add_reader(self._pidfd, self._gone)
        return {"pid": os.getpid()}, self._terms.handed_out(self.service)

    def _gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._end()

    def _refuse(self, descriptors: Iterable[int]) -> None:
        """Close those that no operation has taken."""
        unclaimed = self._unclaimed.intersection(descriptors)
        self._unclaimed -= unclaimed
        close_all(unclaimed)

    async def close(self) -> None:
        """Let go of the client, whatever it does, and of all that was its own."""
        loop = asyncio.get_running_loop()
        self._end()
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for released in list(self.leaving.values()):
            await released.wait()  # the drain is about to let a region go
        self._refuse(self._unclaimed)  # of tasks that were cancelled before they began
        if self.service is not None:
            await self.service.end()
        self._socket.close()
