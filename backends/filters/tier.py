"""`tier::` keeps pages in use in a fast store, the others in a slow one: zswap before a disk.

Responsible for: which store is asked. What is written goes to the fast store. When that is nearly
full, what was idle longest is written back and leaves it; while there is no room, pages go to the
slow store at once. A page that was read from the slow store twice lately is copied to the fast one.
A flush writes everything back, so the stack is as durable as its slow store; what the fast store
holds when it is opened is not looked at.
Must not know: which stores they are, how pages move (placement.py).

Options: `fast=URL` (`?`, `&` and `%` in it are percent-encoded), `limit=SIZE` of the pages in it
as they are before any compression, one page at least; without it, what the fast store takes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from userswap.backends.filters import Filter
from userswap.backends.filters.placement import Placement
from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import (
    PAGES_MAX,
    Below,
    Geometry,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    StoreFullError,
    pages_between,
    pages_of,
)

log = logging.getLogger("userswap.tier")

NAME = "tier"
SEEN_MAX = 1 << 16


class TierFilter(Filter):
    """`fast` over `slow`, with at most `limit` pages in `fast`; see `Store` for the contract."""

    def __init__(self, fast: Store, slow: Store, limit: int) -> None:
        super().__init__(slow)
        self.checked = fast.checked and slow.checked
        self.encrypted = fast.encrypted and slow.encrypted
        self.space = f"{fast.space}; over {slow.space}"
        self._fast = fast
        self._placed = Placement(fast, slow, limit)
        self._seen: OrderedDict[int, None] = OrderedDict()
        """Pages that were read from the slow store once."""
        self._seen_most = min(limit, SEEN_MAX)
        self._told = False
        self._closed = False

    async def read(self, runs: Sequence[Run]) -> None:
        self._check_open()
        indexes = [pages_of(self, run) for run in runs]
        with self._placed.traffic.reading(indexes):
            near, far = self._split(runs, indexes)
            try:
                if near:
                    await self._fast.read(near)
            except StoreError:
                if any(self._placed.kept[page] for run in near for page in pages_of(self, run)):
                    raise
                await self._inner.read(near)
            if far:
                await self._inner.read(far)
            for run in near:
                for page in pages_of(self, run):
                    self._placed.kept.move_to_end(page)
            for run in far:
                self._seen_again(run)

    async def write(self, runs: Sequence[Run]) -> None:
        self._check_open()
        indexes = [pages_of(self, run) for run in runs]
        pages = [page for some in indexes for page in some]
        async with self._placed.traffic.changing(indexes):
            self._placed.dirty(page for page in pages if page in self._placed.kept)
            if await self._taken(runs, pages):
                self._placed.dirty(pages)
            else:
                await self._inner.write(runs)
                await self._placed.forget(page for page in pages if page in self._placed.kept)
        self._placed.make_room()

    async def discard(self, index: int, count: int) -> None:
        self._check_open()
        pages = pages_between(self, index, count)
        async with self._placed.traffic.changing([pages]):
            fewer = pages if count < len(self._placed.kept) else self._placed.kept
            here = [page for page in fewer if page in pages and page in self._placed.kept]
            for page in here:
                self._placed.kept[page] = True
            await self._inner.discard(index, count)
            await self._placed.forget(here)

    async def flush(self) -> None:
        self._check_open()
        lost = await self._placed.save_all()
        await self._inner.flush()
        if lost:
            raise lost

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._placed.stop()
            if self.durable:
                await self._placed.save_all()
        finally:
            try:
                await self._fast.aclose()
            finally:
                await self._inner.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=NAME)

    def _split(self, runs: Sequence[Run], indexes: Sequence[range]) -> tuple[list[Run], list[Run]]:
        """The parts of runs that are in the fast store, and those in the slow one."""
        found: tuple[list[Run], list[Run]] = ([], [])
        size = self.page_size
        for run, pages in zip(runs, indexes, strict=True):
            whole, start = run.buffer.cast("B"), 0
            for at in range(1, len(pages) + 1):
                here = pages[start] in self._placed.kept
                if at == len(pages) or (pages[at] in self._placed.kept) != here:
                    part = Run(pages[start], whole[start * size : at * size])
                    found[not here].append(part)
                    start = at
        return found

    async def _taken(self, runs: Sequence[Run], pages: Sequence[int]) -> bool:
        """Write to the fast store; False where it has no room, or does not do it."""
        new = len({page for page in pages if page not in self._placed.kept})
        if not self._placed.takes(new):
            return False
        try:
            with self._placed.coming(new):
                await self._fast.write(runs)
        except StoreFullError:
            self._placed.make_room(full=True)
            return False
        except StoreError as error:
            if not self._told:
                self._told = True
                log.warning("the fast store did not take pages: %s", error)
            return False
        return True

    def _seen_again(self, run: Run) -> None:
        """Copy pages to the fast store that were read from the slow one before."""
        whole, size = run.buffer.cast("B"), self.page_size
        for place, page in enumerate(pages_of(self, run)):
            if page not in self._seen:
                self._seen[page] = None
                if len(self._seen) > self._seen_most:
                    self._seen.popitem(last=False)
            else:
                del self._seen[page]
                self._placed.promote(page, whole[place * size : (place + 1) * size])


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    options = Options(layer)
    url = options.text("fast", "")
    pages = geometry.page_count or PAGES_MAX
    limit = options.size("limit", None, whole=pages * geometry.page_size)
    options.finish()
    if not url:
        raise layer.error("needs fast=URL, the store that the other is slower than")
    slow = await below.open(geometry)
    try:
        fast = await below.open_url(url, replace(geometry, page_count=slow.page_count))
    except BaseException:
        await slow.aclose()
        raise
    most = slow.page_count if limit is None else max(1, limit // slow.page_size)
    return TierFilter(fast, slow, most)
