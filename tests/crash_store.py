"""A store that loses what was not flushed, and tears single pages, as a medium without power does.

The medium outlives its stores: a test opens a store on it, crashes it, and opens the next one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from userswap.backends.store import (
    PAGE_SIZE,
    Run,
    Store,
    StoreFailedError,
    TransientError,
    pages_between,
    pages_of,
)

SECTOR = 512


class Medium:
    """Pages that are safe, and for each page what was written since the last flush."""

    def __init__(self, rng: random.Random, page_count: int, page_size: int = PAGE_SIZE) -> None:
        self.rng = rng
        self.page_count = page_count
        self.page_size = page_size
        self.safe: dict[int, bytes] = {}
        self.pending: dict[int, list[bytes]] = {}

    def page(self, index: int) -> bytes:
        if index in self.pending:
            return self.pending[index][-1]
        return self.safe.get(index, bytes(self.page_size))

    def put(self, index: int, content: bytes) -> None:
        self.pending.setdefault(index, []).append(content)

    def flush(self) -> None:
        self.safe.update({index: contents[-1] for index, contents in self.pending.items()})
        self.pending.clear()

    def lose_power(self) -> None:
        """Of each unflushed page: some write of it, none, or a mixture of two."""
        for index, contents in self.pending.items():
            versions = [self.safe.get(index, bytes(self.page_size)), *contents]
            how = self.rng.randrange(3)
            if how == 0:
                self.safe[index] = self.rng.choice(versions)
            elif how == 1:
                self.safe[index] = self._torn(versions)
        self.pending.clear()

    def _torn(self, versions: list[bytes]) -> bytes:
        if self.rng.randrange(2):
            old, new = self.rng.choice(versions), self.rng.choice(versions)
            cut = self.rng.randrange(self.page_size)
            return new[:cut] + old[cut:]
        sectors = range(0, self.page_size, SECTOR)
        return b"".join(self.rng.choice(versions)[at : at + SECTOR] for at in sectors)


class CrashStore(Store):
    """Works for so many operations, then for none; see `Medium` for what is left. A share `flaky`
    of them fails, before or after they did what they were asked."""

    durable = True

    def __init__(self, medium: Medium, operations: int) -> None:
        self.page_size = medium.page_size
        self.page_count = medium.page_count
        self.medium = medium
        self._left = operations
        self.flaky = 0.0
        self.discarded: list[tuple[int, int]] = []
        self.writes = 0
        self.flushes = 0

    async def _operation(self, *, last: bool = False) -> None:
        """Others get their turn, before and while it is under way."""
        for _ in range(self.medium.rng.randrange(3)):
            await asyncio.sleep(0)
        self._left -= 1
        if self._left < 0 or (last and self._left == 0):
            raise StoreFailedError("has crashed", store="crash")
        if self.medium.rng.random() < self.flaky:
            raise TransientError("not now", store="crash")

    async def read(self, runs: Sequence[Run]) -> None:
        await self._operation()
        for run in runs:
            content = b"".join(self.medium.page(index) for index in pages_of(self, run))
            run.buffer.cast("B")[:] = content

    async def write(self, runs: Sequence[Run]) -> None:
        await self._operation()
        self.writes += 1
        for run in runs:
            for place, index in enumerate(pages_of(self, run)):
                at = place * self.page_size
                self.medium.put(index, bytes(run.buffer[at : at + self.page_size]))
        await self._operation(last=True)

    async def discard(self, index: int, count: int) -> None:
        await self._operation()
        self.discarded.append((index, count))
        known = {*self.medium.safe, *self.medium.pending}
        for page in known.intersection(pages_between(self, index, count)):
            self.medium.put(page, bytes(self.page_size))

    async def flush(self) -> None:
        await self._operation()
        self.medium.flush()
        self.flushes += 1
        await self._operation(last=True)

    async def aclose(self) -> None:
        self._left = 0
