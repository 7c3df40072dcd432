"""The way to a namespace, which lasts longer than any connection.

Responsible for: sending requests through the association that there is; keeping those that an
association did not answer, and sending them again through the next; trying again what a controller
says may work then; and giving up for good.
Invariants:
 1. A request that was taken ends once: answered, or failed because everything has.
 2. No request of the users' is sent before the association was `restored`: whoever uses the path
    first sees that it leads to what it led to before, and brings back what may have been lost.
 3. A namespace that is gone, changed, or cannot be reached behind the controller is a way that is
    lost: there is one way back.
Must not know: pages, what requests do.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import Command, Status, code_of, retryable, status_name
from userswap.backends.nvme_tcp.controller import Settings
from userswap.backends.nvme_tcp.host import HostController, IoQueue, Request, open_controller
from userswap.backends.nvme_tcp.pdu import Buffer, ConnectionLostError, ProtocolError
from userswap.backends.store import StoreFailedError

log = logging.getLogger("userswap.nvme")

NAME = "nvme+tcp"
TRIES = 6
SILENCE_S = 30.0
"""After which a controller that knows no keep-alive is believed to have forgotten us."""
AGAIN_S = 0.01
"""Before a command is tried for the second time; doubled each time."""
LASTING = {Status.INTERRUPTED, Status.TRANSIENT_TRANSPORT}
"""What says nothing about the blocks: it is tried again as long as it takes."""
_NO_WAY = {Status.INVALID_NAMESPACE, Status.NAMESPACE_NOT_READY}


@dataclass(slots=True)
class Counters:
    """What happened on the way."""

    lost: int = 0
    """associations"""
    reconnected: int = 0
    attempts: int = 0
    """to connect again"""
    requeued: int = 0
    """commands that an association did not answer, sent through the next"""
    retried: int = 0
    """commands that a controller wanted to be tried again"""
    rewritten: int = 0
    """commands that were answered, and sent once more because no flush had confirmed them"""

    def __str__(self) -> str:
        return (
            f"lost {self.lost} times, back {self.reconnected} times in {self.attempts} attempts; "
            f"{self.requeued} commands sent again, {self.retried} tried again, "
            f"{self.rewritten} written again"
        )


@dataclass(frozen=True, slots=True)
class Patience:
    loss_tmo: float | None
    """how long everybody waits for a way back; None: for ever"""
    delay: float
    """between the beginnings of two attempts"""


class CommandError(ProtocolError):
    """A command that `Path.must` sent was answered with an error."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: {status_name(status)}")
        self.status = status


class _Call:
    """The owner of one request, which awaits it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def ended(self, request: Request, status: int) -> None:
        if not self.answer.done():
            self.answer.set_result(status)

    def failed(self, request: Request, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Path:
    """See the module. `restore` is awaited with each association before users' requests go.

    `left` is told of the commands that a lost association may still obey, and for how long.
    """

    def __init__(
        self,
        address: tuple[str, int],
        settings: Settings,
        patience: Patience,
        *,
        name: str,
        restore: Callable[[HostController], Awaitable[None]],
        left: Callable[[list[Request], float], None],
    ) -> None:
        self.counters = Counters()
        self.association: HostController | None = None
        self.error: StoreFailedError | None = None
        """why nothing goes any more"""
        self._address = address
        self._settings = settings
        self._patience = patience
        self._name = name
        self._restore = restore
        self._left = left
        self._is_restored = False
        self._urgent: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._resting: dict[Request, asyncio.TimerHandle] = {}
        self._reconnecting: asyncio.Task[None] | None = None
        self._back: asyncio.Future[None] | None = None
        self._last_attempt = float("-inf")
        self._loop = asyncio.get_running_loop()

    # --- for the user ---

    async def open(self) -> None:
        """The first association; what hinders it is not waited out."""
        self._last_attempt = self._loop.time()
        try:
            await self._connect()
        except ProtocolError as error:
            raise self._failure(str(error)) from error

    def send(self, requests: Iterable[Request]) -> None:
        """Take requests; their owners learn how they end."""
        if self.error is not None:
            raise self.error
        self._waiting.extend(requests)
        self._pump()

    @property
    def is_near(self) -> bool:
        """What `send_one` is given now will very likely have been answered when it returns."""
        association = self.association
        if association is None or not self._is_restored or self._waiting or self._urgent:
            return False
        return _emptiest(association.queues).connection.is_near

    def send_one(self, request: Request) -> None:
        """The same for one request, and quicker where nothing is in its way: it may have ended
        already when this returns."""
        association = self.association
        if association is not None and self._is_restored and not (self._waiting or self._urgent):
            queue = _emptiest(association.queues)
            if queue.pair.room:
                now = self._loop.time()
                queue.submit(request, now)
                queue.connection.ask(now)
                return
        self.send([request])

    async def must(
        self,
        what: str,
        command: Command,
        *,
        data: Buffer | None = None,
        into: memoryview | None = None,
        units: range = range(0),
    ) -> None:
        """Send one command before all others, while restoring too. An association that is lost
        meanwhile, or not there, is a ProtocolError, and so is an answer that is no success."""
        if self.error is not None:
            raise self.error
        if self.association is None:
            raise ConnectionLostError("there is no connection")
        call = _Call()
        request = Request(command, call, data=data, into=into, unit=units.start, units=len(units))
        self._urgent.append(request)
        self._pump()
        try:
            status = await call.answer
        except asyncio.CancelledError:
            self.abandon(request)
            raise
        if status:
            raise CommandError(what, status)

    async def wait(self) -> None:
        """Return when there is a way; raise when there will be none."""
        while not self._is_restored and self.error is None:
            self._back = self._back or self._loop.create_future()
            await asyncio.wait([self._back])
        if self.error is not None:
            raise self.error

    def abandon(self, request: Request) -> None:
        """Take its buffer away from a request that nobody waits for any more. What was to be
        written still is, from a copy, and its owner still learns of it; a read is forgotten."""
        if request.data is None:
            request.owner = None
        else:
            request.data = bytes(request.data)
        if request.queue is not None:
            request.queue.pair.abandon(request.cid)
        request.into = None

    async def aclose(self) -> None:
        """Leave. Whatever still waits fails."""
        if self.counters.lost:
            log.warning("%s: %s", self._name, self.counters)
        association = self._end(StoreFailedError("is closed", store=NAME))
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])
        if association is not None:
            await association.aclose()

    # --- for the association ---

    def completed(self, request: Request, status: int) -> None:
        if status:
            self._not_well(request, status)
        elif request.owner is not None:
            request.owner.ended(request, 0)
        if self._waiting or self._urgent:
            self._pump()

    def lost(self, error: ProtocolError, unfinished: list[Request]) -> None:
        """Nothing of it is there any more; everybody waits."""
        if self.association is not None and not self.association.was_closed:
            # A controller that cannot tell us that it has ended notices our silence in this time.
            quiet = 2 * self._settings.keep_alive_tmo or SILENCE_S
            self._left(unfinished, quiet)
        was_restored, self._is_restored = self._is_restored, False
        self.association = None
        # Those that `must` sent are for this association only; whoever restores begins anew.
        for request in [*unfinished, *self._urgent, *self._resting]:
            if isinstance(request.owner, _Call):
                request.owner.failed(request, error)
                request.owner = None
        self._urgent.clear()
        again = [r for r in unfinished if r.owner and not isinstance(r.owner, _Call)]
        self._waiting.extendleft(reversed(again))
        self.counters.requeued += len(again)
        if was_restored and self.error is None:
            self.counters.lost += 1
            log.warning("%s: lost (%s); %d commands wait", self._name, error, len(self._waiting))
            self._reconnecting = self._loop.create_task(self._reconnect())

    def namespace_changed(self, namespace: identify.Namespace | None) -> None:
        """Gone, or another one perhaps: whoever restores the way has a look."""
        if self.association is not None:
            word = "is gone" if namespace is None else "has changed"
            self.association.lose(ConnectionLostError(f"the namespace {word}"))

    # --- inside ---

    def _pump(self) -> None:
        """Send what waits, as far as there is room in the queues."""
        association = self.association
        if association is None:
            return
        now = self._loop.time()
        touched = set()
        queues = association.queues
        while source := self._urgent or (self._waiting if self._is_restored else None):
            queue = _emptiest(queues)
            if not queue.pair.room:
                break
            request = source.popleft()
            if request.owner is not None:
                queue.submit(request, now)
                touched.add(queue)
        for queue in touched:
            queue.connection.transmit()

    def _not_well(self, request: Request, status: int) -> None:
        if request.owner is None:
            return
        code = code_of(status)
        if code >> 8 == 3 or code in _NO_WAY:
            self._waiting.appendleft(request)
            if isinstance(request.owner, _Call):
                self._waiting.popleft()
                request.owner.ended(request, status)
            if self.association is not None:
                self.association.lose(ConnectionLostError(f"the namespace: {status_name(status)}"))
        elif retryable(status) and self._try_again(request, code):
            self.counters.retried += 1
        else:
            request.owner.ended(request, status)

    def _try_again(self, request: Request, code: int) -> bool:
        """Unless it was tried often, or for long, already."""
        request.since = request.since or self._loop.time()
        most = self._patience.loss_tmo
        lasts = most is None or self._loop.time() < request.since + most
        if not (lasts if code in LASTING else request.tries < TRIES - 1):
            return False
        delay = min(AGAIN_S * 2 ** min(request.tries, 20), max(self._patience.delay, AGAIN_S))
        request.tries += 1
        self._resting[request] = self._loop.call_later(delay, self._again, request)
        return True

    def _again(self, request: Request) -> None:
        del self._resting[request]
        if request.owner is None:
            return
        if isinstance(request.owner, _Call):
            self._urgent.append(request)
        else:
            self._waiting.appendleft(request)
        self._pump()

    async def _connect(self) -> None:
        association = await open_controller(self._address, self._settings, self)
        self.association = association
        try:
            await self._restore(association)
            if association.error is not None:
                raise association.error
        except BaseException:
            association.lose(ConnectionLostError("it could not be restored"))
            raise
        self._is_restored = True
        self._wake()
        self._pump()

    def _wake(self) -> None:
        if self._back is not None:
            self._back.set_result(None)
            self._back = None

    async def _reconnect(self) -> None:
        patience, began = self._patience, self._loop.time()
        end = None if patience.loss_tmo is None else began + patience.loss_tmo
        why, rewritten = "no answer", self.counters.rewritten
        try:
            while self.error is None and (hindrance := await self._attempt(end)) is not None:
                if hindrance and hindrance != why:
                    why = hindrance
                    log.warning("%s: no way back yet (%s)", self._name, why)
                if end is not None and self._loop.time() >= end:
                    over = f"{why}; ctrl_loss_tmo={patience.loss_tmo:g}s is over"
                    self.fail(self._failure(over))
        except StoreFailedError as error:
            self.fail(error)
        except Exception as error:
            # A mistake of ours is not to leave everybody waiting for ever.
            log.exception("%s: reconnecting", self._name)
            self.fail(self._failure(f"cannot be reached again: {error!r}"))
        self._reconnecting = None
        if self.error is None:
            self.counters.reconnected += 1
            lasted = self._loop.time() - began
            again = self.counters.rewritten - rewritten
            log.warning("%s: back after %.2f s; %d rewritten", self._name, lasted, again)

    async def _attempt(self, end: float | None) -> str | None:
        """Try once, not too soon after the last time: None when it worked, or else why it did not,
        which is nothing where the time was up."""
        rest = self._last_attempt + self._patience.delay - self._loop.time()
        try:
            async with asyncio.timeout_at(end):
                await asyncio.sleep(max(rest, 0))
                self._last_attempt = self._loop.time()
                self.counters.attempts += 1
                await self._connect()
        except TimeoutError:
            return ""
        except ProtocolError as error:
            return str(error)
        return None

    def fail(self, error: StoreFailedError) -> None:
        """For good."""
        if self.error is not None:
            return
        log.error("%s", error)
        association = self._end(error)
        if association is not None:
            association.drop()

    def _end(self, error: StoreFailedError) -> HostController | None:
        """Everything fails from here on; the association, whose I/O queues have ended."""
        self.error = self.error or error
        self._wake()
        association, self.association = self.association, None
        queues = association.queues if association is not None else []
        unfinished = [request for queue in queues for request in queue.outstanding.values()]
        for queue in queues:
            queue.outstanding.clear()
            queue.connection.drop()
        requests = [*unfinished, *self._urgent, *self._waiting, *self._resting]
        for timer in self._resting.values():
            timer.cancel()
        for waiting in (self._urgent, self._waiting, self._resting):
            waiting.clear()
        for request in requests:
            request.queue = None
            if request.owner is not None:
                request.owner.failed(request, error)
        return association

    def _failure(self, why: str) -> StoreFailedError:
        return StoreFailedError(f"{self._name}: {why}", store=NAME)


def _emptiest(queues: Sequence[IoQueue]) -> IoQueue:
    best = queues[0]
    for queue in queues:
        if len(queue.outstanding) < len(best.outstanding):
            best = queue
    return best
