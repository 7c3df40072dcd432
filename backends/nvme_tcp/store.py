"""`nvme+tcp://host:port/NQN` keeps pages in the blocks of a namespace on another machine.

Responsible for: pages as commands on blocks, split as the controller wants it; discarded pages that
read as zeros; and what an answer means for a page. Operations wait, and do not fail, while the
target cannot be reached. The last 4 KiB of a namespace are not pages.

Invariants:
 1. A buffer belongs to its requests until they ended or were abandoned; a cancelled read's is never
    written to again, and a cancelled write goes on from a copy.
 2. Of two operations on a page of which one writes, the second is not sent before the first has
    ended, though its caller was cancelled.

Discard is Write Zeroes, which may also deallocate: Dataset Management promises nothing, not even
where deallocated blocks read as zeros, since a controller may do nothing at all. It is a hint that
follows zeros that were written.

Must not know: connections (reconnect.py), volumes, the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from userswap.backends.grammar import LayerSpec, format_size
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import Status, code_of, status_name
from userswap.backends.nvme_tcp.host import HostController, Request
from userswap.backends.nvme_tcp.pdu import Buffer
from userswap.backends.nvme_tcp.reconnect import NAME, Counters, Path
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
    pages_between,
    pages_of,
)

UNIT = 4096
"""Of what commands are made of, in bytes: pages and transfers are whole multiples."""
TRANSFER_MAX = 1 << 20
ZEROES_MAX = 32 << 20
"""Bytes of one Write Zeroes, which a target may have to write."""
ZEROES_AT_ONCE = 32
BLOCKS_MAX = 1 << 16  # of one command
ONCS_NOT_SUPPORTED = 0x180
_NOT_DONE = {Status.INVALID_OPCODE, Status.INVALID_FIELD, ONCS_NOT_SUPPORTED}
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
    """Requests that are awaited together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[None] = loop.create_future()
        self.requests: list[Request] = []
        self.left = 0
        self.failures: list[tuple[Request, int]] = []
        self.error: Exception | None = None

    def ended(self, request: Request, status: int) -> None:
        if status:
            self.failures.append((request, status))
        else:
            request.into = request.data = None
        self._one_less()

    def failed(self, request: Request, error: Exception) -> None:
        request.into = request.data = None
        self.error = error
        self._one_less()

    def _one_less(self) -> None:
        self.left -= 1
        if not self.left:
            self.requests.clear()
            if not self.future.done():
                self.future.set_result(None)


class NvmeStore(Store):
    """Pages in a namespace; see `Store` for the contract. `open` it on a running loop."""

    durable = True

    def __init__(self, place: Place, geometry: Geometry) -> None:
        self.page_size = geometry.page_size
        self.page_count = geometry.page_count or 0
        self._place = place
        self._nsid = place.settings.nsid
        self._loop = asyncio.get_running_loop()
        self._path = Path(
            place.address, place.settings, place.patience, name=place.name, restore=self._restore
        )
        self._namespace: identify.Namespace | None = None
        self._block = UNIT
        self._transfer = TRANSFER_MAX
        self._zeroes = 0
        """Bytes of one Write Zeroes; 0: zeros are written."""
        self._has_cache = False
        self._unsettled: list[tuple[range, asyncio.Future[None]]] = []
        """Pages that cancelled writes and discards still concern."""
        self._doubtful: set[int] = set()
        """Pages that were not written properly: neither old nor new."""

    async def open(self) -> None:
        try:
            await self._path.open()
        except BaseException:
            await self._path.aclose()
            raise

    @property
    def counters(self) -> Counters:
        return self._path.counters

    async def read(self, runs: Sequence[Run]) -> None:
        spans = [pages_of(self, run) for run in runs]
        await self._ready(spans)
        if self._doubtful:
            self._refuse_doubtful(spans)
        transfer = self._transfer_of(runs, writes=False)
        await self._perform(transfer)
        if transfer.failures:
            await self._singly(transfer)

    async def write(self, runs: Sequence[Run]) -> None:
        spans = [pages_of(self, run) for run in runs]
        await self._ready(spans)
        transfer = self._transfer_of(runs, writes=True)
        await self._perform(transfer, spans)
        if transfer.failures:
            await self._singly(transfer)
        self._clear_doubt(spans)

    async def discard(self, index: int, count: int) -> None:
        pages = pages_between(self, index, count)
        await self._ready([pages])
        per_page = self.page_size // UNIT
        at, end = pages.start * per_page, pages.stop * per_page
        while at < end:
            transfer, stop = self._zeroing(at, end)
            touched = range(at // per_page, -(-stop // per_page))
            await self._perform(transfer, [touched])
            if not transfer.failures:
                at = stop
            elif not self._zero_otherwise(transfer.failures[0][1]):
                raise self._error(*transfer.failures[0])
        self._clear_doubt([pages])

    async def flush(self) -> None:
        await self._ready([])
        if not self._has_cache:
            return
        transfer = _Transfer(self._loop)
        transfer.requests.append(Request(nvme.flush(self._nsid), transfer))
        await self._perform(transfer)
        for _, status in transfer.failures:
            raise StoreFailedError(f"{self._place.name}: flush: {status_name(status)}", store=NAME)

    async def aclose(self) -> None:
        await self._path.aclose()

    # --- inside ---

    async def _ready(self, spans: Sequence[range]) -> None:
        """Return when nothing that was left behind concerns these pages any more."""
        if self._path.error is not None:
            raise StoreFailedError(str(self._path.error.args[0]), store=NAME)
        while unsettled := [
            future
            for pages, future in self._unsettled
            if any(pages.start < span.stop and span.start < pages.stop for span in spans)
        ]:
            await asyncio.wait(unsettled)

    def _transfer_of(self, runs: Sequence[Run], *, writes: bool) -> _Transfer:
        transfer = _Transfer(self._loop)
        for run in runs:
            whole = run.buffer.cast("B")
            first = run.index * (self.page_size // UNIT)
            for at in range(0, len(whole), self._transfer):
                part = whole[at : at + self._transfer]
                transfer.requests.append(self._request(transfer, first + at // UNIT, part, writes))
        return transfer

    def _request(self, transfer: _Transfer, unit: int, part: Buffer, writes: bool) -> Request:
        length = len(part)
        first, blocks = unit * UNIT // self._block, length // self._block
        units = length // UNIT
        if writes:
            write = nvme.write(self._nsid, first, blocks)
            return Request(write, transfer, data=part, unit=unit, units=units)
        assert isinstance(part, memoryview)
        read = nvme.read(self._nsid, first, blocks)
        return Request(read, transfer, into=part, unit=unit, units=units)

    def _zeroing(self, at: int, end: int) -> tuple[_Transfer, int]:
        """Zeros for some of the units up to `end`, and where they stop."""
        transfer = _Transfer(self._loop)
        step = (self._zeroes or self._transfer) // UNIT
        zeros = b"" if self._zeroes else bytes(self._transfer)
        stop = min(at + step * ZEROES_AT_ONCE, end)
        assert self._namespace is not None
        for unit in range(at, stop, step):
            units = min(step, stop - unit)
            if not self._zeroes:
                part = zeros[: units * UNIT]
                transfer.requests.append(self._request(transfer, unit, part, writes=True))
                continue
            first, blocks = unit * UNIT // self._block, units * UNIT // self._block
            deallocate = self._namespace.zeroing
            zero = nvme.write_zeroes(self._nsid, first, blocks, deallocate=deallocate)
            transfer.requests.append(Request(zero, transfer, unit=unit, units=units))
        return transfer, stop

    def _zero_otherwise(self, status: int) -> bool:
        """The controller does not zero blocks so: try smaller parts, then write zeros."""
        if not self._zeroes or code_of(status) not in _NOT_DONE:
            return False
        self._zeroes = self._transfer if self._zeroes > self._transfer else 0
        return True

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
            raise StoreFailedError(str(transfer.error), store=NAME)

    def _leave_behind(self, transfer: _Transfer, spans: Sequence[range]) -> None:
        if not transfer.left:
            return
        transfer.future = self._loop.create_future()
        entries = [(span, transfer.future) for span in spans]
        self._unsettled += entries

        def settled(_: asyncio.Future[None]) -> None:
            for request, _status in transfer.failures:
                self._doubtful.update(self._pages(request))
            self._unsettled = [entry for entry in self._unsettled if entry not in entries]

        transfer.future.add_done_callback(settled)

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
            if len(pages) == 1:
                errors.append(self._error(request, status))
                if writes:
                    self._doubtful.update(pages)
                continue
            for page in pages:
                at = (page - pages.start) * self.page_size
                part = memoryview(buffer)[at : at + self.page_size]
                single = _Transfer(self._loop)
                unit = page * (self.page_size // UNIT)
                single.requests.append(self._request(single, unit, part, writes))
                await self._perform(single, [range(page, page + 1)] if writes else ())
                for again in single.failures:
                    errors.append(self._error(*again))
                    again[0].into = again[0].data = None
                    if writes:
                        self._doubtful.add(page)
        if errors:
            # A page that is lost is told of alone; before it, what concerns all of them.
            raise min(errors, key=lambda error: isinstance(error, PageLostError))

    def _pages(self, request: Request) -> range:
        per_page = self.page_size // UNIT
        return range(request.unit // per_page, -(-(request.unit + request.units) // per_page))

    def _refuse_doubtful(self, spans: Sequence[range]) -> None:
        lost = [page for pages in spans for page in pages if page in self._doubtful]
        if lost:
            raise PageLostError("a write of it failed halfway", store=NAME, page=lost[0])

    def _clear_doubt(self, spans: Sequence[range]) -> None:
        if self._doubtful:
            for pages in spans:
                self._doubtful = {page for page in self._doubtful if page not in pages}

    def _error(self, request: Request, status: int) -> StoreError:
        reads = request.command.opcode == nvme.Io.READ
        page = self._pages(request).start
        code = code_of(status)
        text = f"{self._place.name}: cannot be {'read' if reads else 'written'}"
        text += f": {status_name(status)}"
        if code == Status.CAPACITY_EXCEEDED and not reads:
            return StoreFullError(text, store=NAME, page=page)
        if code in _OF_ALL or code >> 8 == 1:
            return StoreFailedError(text, store=NAME, page=page)
        return PageLostError(text, store=NAME, page=page)

    # --- associations ---

    async def _restore(self, association: HostController) -> None:
        """An association is there: does it lead to what it led to before?"""
        ready = association.ready
        namespace = ready.namespace
        if self._namespace is None:
            self._fit(namespace)
        elif (namespace.nguid, namespace.block_size) != (
            self._namespace.nguid,
            self._namespace.block_size,
        ) or namespace.blocks < self._namespace.blocks:
            raise self._refused("is another one now, or smaller")
        self._namespace = namespace
        controller = ready.controller
        self._block = namespace.block_size
        most = min(controller.transfer or TRANSFER_MAX, TRANSFER_MAX, BLOCKS_MAX * self._block)
        self._transfer = most // UNIT * UNIT
        zeroes = min(ZEROES_MAX, BLOCKS_MAX * self._block)
        knows = controller.optional & identify.ONCS_WRITE_ZEROES
        self._zeroes = zeroes if knows else 0
        self._has_cache = controller.volatile_cache
        self.space = (
            f"{self._place.name}: {format_size(namespace.blocks * self._block)} in blocks of "
            f"{format_size(self._block)}, {ready.queues} queues of {ready.entries}"
        )

    def _fit(self, namespace: identify.Namespace) -> None:
        """Can its blocks hold pages, and as many as are asked for?"""
        if namespace.block_size > UNIT or UNIT % namespace.block_size:
            raise self._refused(f"has blocks of {namespace.block_size} bytes; 512 to 4096 will do")
        if namespace.metadata:
            raise self._refused(
                f"has {namespace.metadata} bytes of metadata with each block: format it without"
            )
        size = namespace.blocks * namespace.block_size // UNIT * UNIT - UNIT
        room = min(size // self.page_size, PAGES_MAX)
        if room < max(self.page_count, 1):
            asked = format_size(self.page_count * self.page_size)
            raise self._refused(f"has room for {format_size(max(size, 0))}, not for {asked}")
        self.page_count = self.page_count or room

    def _refused(self, why: str) -> StoreFailedError:
        return StoreFailedError(f"{self._place.name} {why}", store=NAME)


async def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    store = NvmeStore(parse_place(layer), geometry)
    await store.open()
    return store
