"""`nvme+tcp://host:port/NQN` keeps pages in the blocks of a namespace on another machine.

Responsible for: pages as commands, split as the controller wants it, and what an answer means for a
page. Operations wait, and do not fail, while the target cannot be reached, for `ctrl_loss_tmo`.
Options: those of userswap.backends.nvme_tcp.url.

Invariants:
 1. A buffer belongs to its requests until they ended or were abandoned; a cancelled read's is never
    written to again, and a cancelled write goes on from a copy.
 2. Of two operations on a page of which one writes, the second is not sent before the first has
    ended, though its caller was cancelled; nor, if it writes, while a connection that was given up
    may still bring the first to the target.

Discard is Write Zeroes, which may deallocate too. Dataset Management alone promises nothing, not
even where deallocated blocks read as zeros: a controller may leave them as they are.

Must not know: connections (reconnect.py), what was lost with them (namespace.py), volumes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from userswap.backends.grammar import LayerSpec, format_size
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp.command import Command, Status, code_of, status_name
from userswap.backends.nvme_tcp.host import Request
from userswap.backends.nvme_tcp.namespace import RemoteNamespace
from userswap.backends.nvme_tcp.pdu import Buffer
from userswap.backends.nvme_tcp.reconnect import LASTING, NAME, Counters
from userswap.backends.nvme_tcp.unflushed import UNIT, Unflushed
from userswap.backends.nvme_tcp.url import Place, parse_place
from userswap.backends.store import (
    PAGES_MAX,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    StoreFullError,
    TransientError,
    pages_between,
    pages_of,
)

UNFLUSHED_MAX = 16 << 20
"""Bytes kept for a target with a volatile cache; from half of it on the store flushes by itself."""
_OF_ALL = {
    Status.NAMESPACE_WRITE_PROTECTED,
    Status.RESERVATION_CONFLICT,
    Status.LBA_OUT_OF_RANGE,
    Status.INVALID_OPCODE,
    Status.INVALID_FIELD,
    Status.SGL_LENGTH_INVALID,
    Status.SGL_TYPE_INVALID,
    Status.SANITIZE_FAILED,
}
"""What is not about the blocks that a command names."""


class _Transfer:
    """Requests that are awaited together. `kept` is where what they write is kept."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        kept: Unflushed | None = None,
        *,
        zeroes: bool = False,
    ) -> None:
        self.kept = kept
        self.zeroes = zeroes
        self.future: asyncio.Future[None] = loop.create_future()
        self.requests: list[Request] = []
        self.left = 0
        self.failures: list[tuple[Request, int]] = []
        self.error: Exception | None = None

    def add(
        self,
        command: Command,
        unit: int,
        units: int,
        *,
        data: Buffer | None = None,
        into: memoryview | None = None,
    ) -> None:
        self.requests.append(Request(command, self, data=data, into=into, unit=unit, units=units))

    def ended(self, request: Request, status: int) -> None:
        if status:
            self.failures.append((request, status))
        else:
            if self.kept is not None:
                self._keep(self.kept, request)
            request.into = request.data = None
        self._one_less()

    def failed(self, request: Request, error: Exception) -> None:
        request.into = request.data = None
        self.error = error
        self._one_less()

    def _keep(self, kept: Unflushed, request: Request) -> None:
        if self.zeroes:
            kept.zeroed(request.unit, request.units)
        elif request.data is not None:
            kept.wrote(request.unit, request.data)

    def _one_less(self) -> None:
        self.left -= 1
        if not self.left:
            self.requests.clear()
            if not self.future.done():
                self.future.set_result(None)


class _Read(asyncio.Future[None]):
    """Waits for one request, which reads."""

    has_failed = False
    """It has to be tried in the way that tells why."""

    def ended(self, request: Request, status: int) -> None:
        self.has_failed = status != 0
        if not self.done():
            self.set_result(None)

    def failed(self, request: Request, error: Exception) -> None:
        self.ended(request, -1)


@dataclass(slots=True, eq=False)
class _Unsettled:
    """Pages that something still concerns that nobody awaits."""

    pages: range
    until: asyncio.Future[None]
    readable: bool
    """they are what they will be, unless they are written to now"""

    def meets(self, spans: Sequence[range]) -> bool:
        pages = self.pages
        return any(span.start < pages.stop and pages.start < span.stop for span in spans)


class NvmeStore(Store):
    """Pages in a namespace; see `Store` for the contract. `open` it on a running loop."""

    durable = True

    def __init__(self, place: Place, geometry: Geometry) -> None:
        self.page_size = geometry.page_size
        self.page_count = geometry.page_count or 0
        self._per_page = self.page_size // UNIT
        self._loop = asyncio.get_running_loop()
        self._namespace = RemoteNamespace(place, self._left_at_target)
        self._path = self._namespace.path
        self._flushing: asyncio.Task[None] | None = None
        self._unsettled: list[_Unsettled] = []
        self._doubtful: set[int] = set()
        """Pages that were not written properly: neither old nor new."""
        self._closed = False

    async def open(self) -> None:
        """What hinders it is not waited out."""
        namespace = self._namespace
        try:
            await self._path.open()
            room = min(namespace.units // self._per_page, PAGES_MAX)
            if room < max(self.page_count, 1):
                asked, has = (size * self.page_size for size in (self.page_count, room))
                why = f"has room for {format_size(has)}, not for {format_size(asked)}"
                raise namespace.refused(why)
            if namespace.lease.is_known:
                await namespace.take()
        except BaseException:
            await self.aclose()
            raise
        self.page_count = self.page_count or room
        size, block = format_size(namespace.units * UNIT), namespace.block
        self.space = f"{namespace.name}: {size} in blocks of {block} bytes, {namespace.queues}"

    @property
    def counters(self) -> Counters:
        return self._path.counters

    async def read(self, runs: Sequence[Run]) -> None:
        if (asked := self._ask(runs)) is not None:
            waiter, request = asked
            try:
                await waiter
            except asyncio.CancelledError:
                self._path.abandon(request)
                raise
            request.into = None
            if not waiter.has_failed:
                return
        spans = [pages_of(self, run) for run in runs]
        self._check_open()
        if self._unsettled:
            await self._settled(spans, writes=False)
        if self._doubtful or self._namespace.lease.is_foreign:
            self._refuse_doubtful(spans)
        transfer = self._transfer_of(runs, writes=False)
        await self._perform(transfer)
        if transfer.failures:
            await self._singly(transfer)

    def read_now(self, runs: Sequence[Run]) -> bool:
        """Where the target is near, for less than a task takes: what does not come is forgotten."""
        if not self._path.is_near or (asked := self._ask(runs)) is None:
            return False
        waiter, request = asked
        if not waiter.done():
            self._path.abandon(request)
            return False
        request.into = None
        return not waiter.has_failed

    async def write(self, runs: Sequence[Run]) -> None:
        spans = [pages_of(self, run) for run in runs]
        await self._ready_to_write(spans)
        transfer = self._transfer_of(runs, writes=True)
        await self._perform(transfer, spans)
        if transfer.failures:
            await self._singly(transfer)
        self._clear_doubt(spans)

    async def discard(self, index: int, count: int) -> None:
        pages = pages_between(self, index, count)
        await self._ready_to_write([pages], everything=count == self.page_count)
        namespace = self._namespace
        at, end = pages.start * self._per_page, pages.stop * self._per_page
        while at < end:
            transfer = _Transfer(self._loop, namespace.unflushed, zeroes=True)
            for unit, units, command, data in namespace.zeros(at, end):
                transfer.add(command, unit, units, data=data)
            stop = transfer.requests[-1].unit + transfer.requests[-1].units
            touched = range(at // self._per_page, -(-stop // self._per_page))
            await self._perform(transfer, [touched])
            if not transfer.failures:
                at = stop
            elif not namespace.zeros_otherwise(transfer.failures[0][1]):
                raise self._error(*transfer.failures[0])
        self._clear_doubt([pages])
        if count and (hint := namespace.hint(pages.start * self._per_page, end)) is not None:
            transfer = _Transfer(self._loop)
            transfer.add(
                hint[0], pages.start * self._per_page, count * self._per_page, data=hint[1]
            )
            await self._perform(transfer, [pages])

    async def flush(self) -> None:
        self._check_open()
        kept = self._namespace.unflushed
        if kept is None:
            return
        mark = kept.seal()
        transfer = _Transfer(self._loop)
        transfer.add(nvme.flush(self._namespace.nsid), 0, 0)
        await self._perform(transfer)
        for _, status in transfer.failures:
            raise self._namespace.refused(f"cannot be flushed: {status_name(status)}")
        kept.confirm(mark)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.wait([self._flushing])
        await self._namespace.aclose()

    # --- whose turn it is ---

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=NAME)
        if self._path.error is not None:
            raise StoreFailedError(str(self._path.error.args[0]), store=NAME)

    async def _ready_to_write(self, spans: Sequence[range], *, everything: bool = False) -> None:
        self._check_open()
        if not self._namespace.lease.is_fresh(self._loop.time()):
            await self._namespace.take(everything=everything)
        kept = self._namespace.unflushed
        while kept is not None and kept.size > UNFLUSHED_MAX // 2:
            if self._flushing is None:
                self._flushing = self._loop.create_task(self._flush_aside())
            if kept.size <= UNFLUSHED_MAX:
                break
            await asyncio.wait([self._flushing])
            self._check_open()
        if self._unsettled:
            await self._settled(spans, writes=True)

    async def _settled(self, spans: Sequence[range], *, writes: bool) -> None:
        """Return when nothing that was left behind concerns these pages any more."""
        while until := [
            each.until
            for each in self._unsettled
            if (writes or not each.readable) and each.meets(spans)
        ]:
            await asyncio.wait(until)

    def _settles(self, entries: list[_Unsettled]) -> None:
        self._unsettled += entries

        def forget(_: asyncio.Future[None]) -> None:
            self._unsettled = [each for each in self._unsettled if each not in entries]

        entries[0].until.add_done_callback(forget)

    def _leave_behind(self, transfer: _Transfer, spans: Sequence[range]) -> None:
        """Whoever awaited what writes these pages is gone."""

        def ended(_: asyncio.Future[None]) -> None:
            for request, _status in transfer.failures:
                self._doubtful.update(self._pages(request))

        if not transfer.left:
            ended(transfer.future)
            return
        transfer.future = self._loop.create_future()
        transfer.future.add_done_callback(ended)
        self._settles([_Unsettled(span, transfer.future, readable=False) for span in spans])

    def _left_at_target(self, requests: list[Request], quiet: float) -> None:
        """What the lost association may still obey must not undo what is written from now on."""
        spans = [self._pages(r) for r in requests if r.units and r.command.opcode != nvme.Io.READ]
        if spans:
            until = self._loop.create_future()
            self._settles([_Unsettled(span, until, readable=True) for span in spans])
            self._loop.call_later(quiet, until.set_result, None)

    async def _flush_aside(self) -> None:
        try:
            await self.flush()
        except StoreError as error:
            self._path.fail(StoreFailedError(str(error.args[0]), store=NAME))
        finally:
            self._flushing = None

    # --- transfers ---

    def _ask(self, runs: Sequence[Run]) -> tuple[_Read, Request] | None:
        """Send what most faults need, without ado; None: it takes more than that."""
        if len(runs) != 1:
            return None
        namespace, run = self._namespace, runs[0]
        size = run.buffer.nbytes
        if (
            size > namespace.transfer
            or not namespace.lease.is_taken
            or self._unsettled
            or self._doubtful
            or self._closed
            or self._path.error is not None
        ):
            return None
        pages_of(self, run)
        waiter = _Read(loop=self._loop)
        unit, units = run.index * self._per_page, size // UNIT
        request = Request(namespace.read(unit, units), waiter, None, run.buffer, unit, units)
        self._path.send_one(request)
        return waiter, request

    def _transfer_of(self, runs: Sequence[Run], *, writes: bool) -> _Transfer:
        transfer = _Transfer(self._loop, self._namespace.unflushed if writes else None)
        for run in runs:
            self._add(transfer, run.index, run.buffer.cast("B"), writes)
        return transfer

    def _add(self, transfer: _Transfer, page: int, data: memoryview, writes: bool) -> None:
        namespace = self._namespace
        unit, most = page * self._per_page, namespace.transfer
        for at in range(0, len(data), most):
            part = data[at : at + most]
            units = len(part) // UNIT
            if writes:
                transfer.add(namespace.write(unit, units), unit, units, data=part)
            else:
                transfer.add(namespace.read(unit, units), unit, units, into=part)
            unit += units

    async def _perform(self, transfer: _Transfer, writes: Sequence[range] = ()) -> None:
        """Send requests and await them; those that write pages go on if this is cancelled."""
        requests = transfer.requests
        if not requests:
            return
        transfer.left = len(requests)
        self._path.send(requests)
        try:
            await transfer.future
        except asyncio.CancelledError:
            for request in requests:
                self._path.abandon(request)
            if writes:
                self._leave_behind(transfer, writes)
            raise
        if transfer.error is not None:
            raise StoreFailedError(str(transfer.error.args[0]), store=NAME)

    async def _singly(self, transfer: _Transfer) -> None:
        """What failed, again page by page, so that one bad page takes no neighbour along; then say
        which."""
        errors: list[StoreError] = []
        for request, status in transfer.failures:
            writes = request.data is not None
            buffer = request.data if request.into is None else request.into
            request.into = request.data = None
            assert buffer is not None
            pages = self._pages(request)
            if request.units <= self._per_page:
                self._failed_to(request, status, writes, errors)
                continue
            if writes:
                self._doubtful.update(pages)
            for page in pages:
                at = (page - pages.start) * self.page_size
                part = memoryview(buffer)[at : at + self.page_size]
                single = _Transfer(self._loop, transfer.kept)
                self._add(single, page, part, writes)
                await self._perform(single, [range(page, page + 1)] if writes else ())
                self._doubtful.discard(page)
                for again, why in single.failures:
                    again.into = again.data = None
                    self._failed_to(again, why, writes, errors)
        if errors:
            # A page that is lost is told of alone; before it, what concerns all of them.
            raise min(errors, key=lambda error: isinstance(error, PageLostError))

    def _failed_to(
        self, request: Request, status: int, writes: bool, errors: list[StoreError]
    ) -> None:
        """A part of one page, or all of it, for good."""
        errors.append(self._error(request, status))
        # Where there was no room for a whole page, or it was not to be yet, the old one is there.
        untouched = code_of(status) in (Status.CAPACITY_EXCEEDED, *LASTING)
        if writes and not (untouched and request.units == self._per_page):
            self._doubtful.update(self._pages(request))

    # --- pages ---

    def _pages(self, request: Request) -> range:
        end = request.unit + request.units
        return range(request.unit // self._per_page, -(-end // self._per_page))

    def _refuse_doubtful(self, spans: Sequence[range]) -> None:
        lost = [page for pages in spans for page in pages if page in self._doubtful]
        if lost:
            raise PageLostError("a write of it failed halfway", store=NAME, page=lost[0])
        # So that whoever looks whether the medium is blank learns that it is not.
        last = self.page_count - 1
        if self._namespace.lease.is_foreign and any(last in pages for pages in spans):
            raise PageLostError("behind it there is something else", store=NAME, page=last)

    def _clear_doubt(self, spans: Sequence[range]) -> None:
        if self._doubtful:
            for pages in spans:
                self._doubtful = {page for page in self._doubtful if page not in pages}

    def _error(self, request: Request, status: int) -> StoreError:
        reads = request.command.opcode == nvme.Io.READ
        page = self._pages(request).start
        code = code_of(status)
        way = "read" if reads else "written"
        text = f"{self._namespace.name}: cannot be {way}: {status_name(status)}"
        if code in LASTING:
            return TransientError(text, store=NAME, page=page)
        if code == Status.CAPACITY_EXCEEDED and not reads:
            return StoreFullError(text, store=NAME, page=page)
        if code in _OF_ALL or code >> 8 == 1:
            return StoreFailedError(text, store=NAME, page=page)
        return PageLostError(text, store=NAME, page=page)


async def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    store = NvmeStore(parse_place(layer), geometry)
    await store.open()
    return store
