"""`null:` forgets every page it is given: all of them read as zeros, always.

Responsible for: being no store at all, for data that may be discarded, and for measuring what
everything but the store costs. Must not know: anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import (
    PAGES_MAX,
    Geometry,
    Run,
    Store,
    StoreFailedError,
    pages_between,
    pages_of,
)

NAME = "null"


class NullStore(Store):
    """Zeros; of the contract of `Store` it breaks that what was written is read."""

    durable = False
    space = "nowhere: every page is forgotten and reads as zeros"

    def __init__(self, page_count: int, page_size: int) -> None:
        self.page_size = page_size
        self.page_count = page_count
        self._closed = False

    async def read(self, runs: Sequence[Run]) -> None:
        self._check_open()
        for run in runs:
            pages = pages_of(self, run)
            with run.buffer.cast("B") as place:
                place[:] = bytes(len(pages) * self.page_size)

    async def write(self, runs: Sequence[Run]) -> None:
        self._check_open()
        for run in runs:
            pages_of(self, run)

    async def discard(self, index: int, count: int) -> None:
        self._check_open()
        pages_between(self, index, count)

    async def flush(self) -> None:
        self._check_open()

    async def aclose(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=NAME)


def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    if layer.target:
        raise layer.error(f"takes no target, not '{layer.target}'")
    Options(layer).finish()
    return NullStore(geometry.page_count or PAGES_MAX, geometry.page_size)
