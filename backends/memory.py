"""`memory:` keeps pages as they are in this process's memory, and is always awaited.

Responsible for: being the simplest store there can be: the reference for tests, and the example for
who writes a store. Must not know: compression, files, the engine.

Options: `limit=SIZE`, of the pages kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import (
    PAGE_SIZE,
    PAGES_MAX,
    Geometry,
    Run,
    Store,
    StoreFailedError,
    StoreFullError,
    pages_between,
    pages_of,
)

NAME = "memory"


class MemoryStore(Store):
    """A dict of pages; see `Store` for the contract."""

    durable = False

    def __init__(
        self, page_count: int, *, page_size: int = PAGE_SIZE, limit: int | None = None
    ) -> None:
        self.page_size = page_size
        self.page_count = page_count
        self._pages_max = page_count if limit is None else limit // page_size
        self._pages: dict[int, bytes] = {}
        self._zeros = bytes(page_size)
        self._closed = False
        self.space = f"this process's memory, {self._pages_max} pages at most"

    async def read(self, runs: Sequence[Run]) -> None:
        self.read_now(runs)

    def read_now(self, runs: Sequence[Run]) -> bool:
        self._check_open()
        for run in runs:
            content = [self._pages.get(index, self._zeros) for index in pages_of(self, run)]
            run.buffer.cast("B")[:] = content[0] if len(content) == 1 else b"".join(content)
        return True

    async def write(self, runs: Sequence[Run]) -> None:
        self._check_open()
        for run in runs:
            source = run.buffer.cast("B")
            for place, index in enumerate(pages_of(self, run)):
                if index not in self._pages and len(self._pages) >= self._pages_max:
                    raise StoreFullError(
                        f"holds {len(self._pages)} pages, which is its limit",
                        store=NAME,
                        page=index,
                    )
                start = place * self.page_size
                self._pages[index] = bytes(source[start : start + self.page_size])

    async def discard(self, index: int, count: int) -> None:
        self._check_open()
        pages = pages_between(self, index, count)
        few = [page for page in self._pages if page in pages] if len(self._pages) < count else pages
        for page in few:
            self._pages.pop(page, None)

    async def flush(self) -> None:
        self._check_open()

    async def aclose(self) -> None:
        self._pages.clear()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=NAME)


def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    if layer.target:
        raise layer.error(f"takes no target, not '{layer.target}'")
    page_count = geometry.page_count or PAGES_MAX
    options = Options(layer)
    limit = options.size("limit", default=None, whole=page_count * geometry.page_size)
    options.finish()
    return MemoryStore(page_count, page_size=geometry.page_size, limit=limit)
