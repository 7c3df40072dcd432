"""An extent of a volume as a store of its own: what works on one cannot touch what is beside it.

Responsible for: that. Must not know: who uses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from userswap.backends.store import Run, Store, StoreError, pages_between, pages_of
from userswap.backends.volume import Extent, Volume


class Window(Store):
    """The pages of `extent`, from 0, or the first `pages` of them. Closing it closes the volume,
    which keeps the extent."""

    def __init__(self, volume: Volume, extent: Extent, pages: int | None = None) -> None:
        inner = volume.store
        self.page_size, self.page_count = inner.page_size, pages or extent.pages
        self.durable, self.space = inner.durable, inner.space
        self.checked, self.encrypted = inner.checked, inner.encrypted
        self.volume = volume
        self.extent = extent

    async def read(self, runs: Sequence[Run]) -> None:
        moved = [self._moved(run) for run in runs]
        with self._named():
            await self.volume.store.read(moved)

    async def write(self, runs: Sequence[Run]) -> None:
        moved = [self._moved(run) for run in runs]
        with self._named():
            await self.volume.store.write(moved)

    async def discard(self, index: int, count: int) -> None:
        pages_between(self, index, count)
        with self._named():
            await self.volume.store.discard(self.extent.base + index, count)

    async def flush(self) -> None:
        await self.volume.store.flush()

    async def aclose(self) -> None:
        await self.volume.aclose()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name pages of this store."""
        try:
            yield
        except StoreError as error:
            if error.page is not None:
                error.page -= self.extent.base
            raise

    def _moved(self, run: Run) -> Run:
        return Run(self.extent.base + pages_of(self, run).start, run.buffer)
