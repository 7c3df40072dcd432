"""Which pages of a tier are in its fast store, and the work that moves them behind the callers.

Responsible for: that every page is in one place that counts, whatever fails or is cancelled.
Must not know: what callers ask for, but for the traffic that they make.

Invariants: a page that is `kept` is read from the fast store, any other from the slow one. A kept
page that is not dirty is the same in both. It is made dirty before either store may change, and
clean when the slow store has taken it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator
from itertools import islice

from userswap.backends.filters.traffic import Traffic
from userswap.backends.store import PageLostError, Run, Store, StoreError

log = logging.getLogger("userswap.tier")

BATCH_BYTES = 256 * 1024
PROMOTIONS_MAX = 64


class Placement:
    """The pages of `slow` of which at most `limit` are kept in `fast`."""

    def __init__(self, fast: Store, slow: Store, limit: int) -> None:
        self._fast = fast
        self._slow = slow
        self._limit = limit
        self._batch = max(1, BATCH_BYTES // slow.page_size)
        self.kept: OrderedDict[int, bool] = OrderedDict()
        """The pages in the fast store, those used last at the end, and whether each is dirty."""
        self._coming = 0
        """Pages on their way into it."""
        self.traffic = Traffic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None

    def takes(self, new: int) -> bool:
        """Whether there is room for so many more pages."""
        return len(self.kept) + self._coming + new <= self._limit

    @contextlib.contextmanager
    def coming(self, new: int) -> Iterator[None]:
        """Hold room for pages that are being written to the fast store."""
        self._coming += new
        try:
            yield
        finally:
            self._coming -= new

    def dirty(self, pages: Iterable[int]) -> None:
        """Pages are in the fast store alone, and were used last."""
        for page in pages:
            self.kept[page] = True
            self.kept.move_to_end(page)

    async def forget(self, pages: Iterable[int]) -> None:
        """The slow store has what these pages are: they leave the fast one."""
        gone = list(pages)
        for page in gone:
            self.kept.pop(page, None)
        # What is not kept is not read: that it takes room for longer does no other harm.
        with contextlib.suppress(StoreError):
            for page in gone:
                await self._fast.discard(page, 1)

    async def settled(self) -> None:
        """Return when nothing is under way behind the callers."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self.settled()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def promote(self, page: int, content: memoryview) -> None:
        """Copy a page that was just read from the slow store to the fast one, if it can be now."""
        at_most = len(self._tasks) < PROMOTIONS_MAX
        if at_most and self.takes(1) and page not in self.kept and self.traffic.may_copy(page):
            self._coming += 1
            end = self.traffic.begin([page])  # here: the task has not begun when we return
            self._start(self._promote(page, bytes(content))).add_done_callback(end)

    async def _promote(self, page: int, content: bytes) -> None:
        try:
            with contextlib.suppress(StoreError):
                await self._fast.write([Run(page, memoryview(content))])
                self.kept[page] = False
        finally:
            self._coming -= 1
        self.make_room()

    def make_room(self, *, full: bool = False) -> None:
        """Have pages leave the fast store where it is nearly, or by its own word, full."""
        most = len(self.kept) if full else self._limit * 15 // 16
        running = self._keeper is not None and not self._keeper.done()
        if len(self.kept) >= max(1, most) and not running:
            self._keeper = self._start(self._keep(most - max(1, most // 16)))

    async def _keep(self, target: int) -> None:
        for _ in range(len(self.kept) // self._batch + 1):
            surplus = min(self._batch, len(self.kept) - target)
            idle = list(islice(filter(self.traffic.may_move, self.kept), max(0, surplus)))
            error = await self._save([page for page in idle if self.kept[page]])
            if error is not None and not isinstance(error, PageLostError):
                log.warning("pages cannot be written back: %s", error)
                return
            clean = [page for page in idle if not self.kept.get(page, True)]
            gone = [page for page in clean if self.traffic.may_move(page)]
            end = self.traffic.begin(gone)
            try:
                await self.forget(gone)
            finally:
                end()
            await asyncio.sleep(0)

    async def save_all(self) -> StoreError | None:
        """Write back what is dirty now; returns an error about pages that are lost."""
        lost = None
        pending = sorted(page for page, dirty in self.kept.items() if dirty)
        while pending:
            busy: list[int] = []
            for at in range(0, len(pending), self._batch):
                part = [page for page in pending[at : at + self._batch] if self.kept.get(page)]
                ready = [page for page in part if self.traffic.may_copy(page)]
                busy += [page for page in part if page not in ready]
                error = await self._save(ready)
                if error is not None and not isinstance(error, PageLostError):
                    raise error
                lost = lost or error
            if len(busy) == len(pending):
                await self.traffic.something_ended()
            pending = busy
        return lost

    async def _save(self, pages: list[int]) -> StoreError | None:
        """Write pages back on which no work is under way: together, or else each that can be."""
        if not pages:
            return None
        error = await self._copy(sorted(pages))
        lost = None
        for page in pages if error else ():
            if self.kept.get(page) and self.traffic.may_copy(page):
                error = await self._copy([page])
                if isinstance(error, PageLostError):
                    lost = error
                    self.kept.move_to_end(page)
                elif error:
                    return error
        return lost

    async def _copy(self, pages: list[int]) -> StoreError | None:
        size = self._slow.page_size
        buffer = memoryview(bytearray(len(pages) * size))
        runs, start = [], 0
        for at in range(1, len(pages) + 1):
            if at == len(pages) or pages[at] != pages[at - 1] + 1:
                runs.append(Run(pages[start], buffer[start * size : at * size]))
                start = at
        end = self.traffic.begin(pages)
        try:
            await self._fast.read(runs)
            await self._slow.write(runs)
        except StoreError as error:
            return error
        else:
            self.kept.update(dict.fromkeys(pages, False))
            return None
        finally:
            end()
