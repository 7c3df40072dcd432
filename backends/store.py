"""The one interface that everything meets at: a sparse array of pages behind five coroutines.

Responsible for: the contract of a store, and the errors by which a store tells its user what to do.
Must not know: any store, any engine; standard library only.

The contract:
 1. A page is named by its index, 0 to page_count - 1; bytes are not addressable. A run is a buffer
    of one or more whole pages, and the index of its first. Anything else is a bug of the caller,
    for which stores assert.
 2. A page that was never written, or was discarded, reads as zeros.
 3. A write is visible to reads that begin after it returned. When it fails, every page of it is old
    or new, whole; other pages are untouched.
 4. A buffer belongs to the store until the await ends, and not a moment longer, also when the await
    ends by an exception or by cancellation.
 5. Operations on disjoint pages may run at the same time and end in any order; callers never let
    two operations overlap of which one writes or discards. Flush covers returned writes only.
 6. Only StoreErrors come out. After `aclose`, which is idempotent, every other call raises
    StoreFailedError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PAGE_SIZE = 4096
PAGE_SIZE_MAX = 2 * 1024**2
PAGES_MAX = 1 << 32
"""Of a store that has no size of its own: 16 TiB of pages of 4 KiB, of which few are ever used."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is asked of a store that is opened: pages of which size, and how many.

    `page_count` None asks for as many as the medium holds, or PAGES_MAX where it has no size.
    `existing` is for who only looks: a medium that is not there is not made.
    """

    page_count: int | None = None
    page_size: int = PAGE_SIZE
    existing: bool = False

    def __post_init__(self) -> None:
        size = self.page_size
        if not PAGE_SIZE <= size <= PAGE_SIZE_MAX or size & (size - 1):
            raise ValueError(f"pages of {size} bytes: a power of two from 4KiB to 2MiB is possible")
        if self.page_count is not None and not 0 < self.page_count <= PAGES_MAX:
            raise ValueError(f"{self.page_count} pages: 1 to {PAGES_MAX} are possible")

    @property
    def bytes(self) -> int | None:
        """All pages together, where their number is given."""
        return None if self.page_count is None else self.page_count * self.page_size


@dataclass(slots=True)
class Run:
    """Adjacent pages: the index of the first, and their bytes (n * page_size of them).

    Nobody changes one. It is not frozen: every fault makes one, and that would take twice as long.
    """

    index: int
    buffer: memoryview


@dataclass(frozen=True)
class NativePool:
    """What lets the native fault server serve a store by itself: its compressed pages in memory.

    Whoever takes it keeps the handles of the pages, and leaves the store's awaited methods alone
    but for `aclose`, which ends the pool.
    """

    pool: Any
    """struct us_pool *, as native/pool.h has it"""
    fd: int
    """the pool's memfd; the store's, to be duplicated and not closed"""
    description: str


class Store(ABC):
    """A sparse array of `page_count` pages of `page_size` bytes.

    All methods are abstract, without defaults: a filter cannot forget to pass one on.
    """

    page_size: int
    page_count: int
    durable: bool
    """What `flush` confirmed survives the end of this process and of the machine's power."""
    checked: bool = False
    """A page that was damaged is a PageLostError, never wrong bytes."""
    encrypted: bool = False
    """The medium never sees what the pages hold."""
    space: str = ""
    """A few words: where pages go, and what bounds the room they take."""
    native: NativePool | None = None
    """None where the store is awaited."""

    @abstractmethod
    async def read(self, runs: Sequence[Run]) -> None:
        """Fill the buffers."""

    def read_now(self, runs: Sequence[Run]) -> bool:
        """Fill the buffers at once, as `read` would, if that needs no waiting and takes a few
        microseconds a page; False: nothing was promised, await `read`. For stores that have pages
        at hand: it saves a fault what a task costs. A filter may leave it as it is."""
        return False

    @abstractmethod
    async def write(self, runs: Sequence[Run]) -> None:
        """Keep what the buffers hold; they are the caller's again on return."""

    @abstractmethod
    async def discard(self, index: int, count: int) -> None:
        """Forget pages; they read as zeros then."""

    @abstractmethod
    async def flush(self) -> None:
        """Returned writes and discards now survive a crash, where `durable`."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release what the store holds, even if that raises; later calls do nothing."""


class Below(Protocol):
    """What a filter is given to open the store under it."""

    async def open(self, geometry: Geometry) -> Store:
        """The next layer; a filter that keeps bytes per page asks for more pages than it offers."""

    async def open_url(self, url: str, geometry: Geometry) -> Store:
        """Another stack, which an option of the filter names."""


def pages_between(store: Store, index: int, count: int) -> range:
    """The indexes of `count` pages; asserts that the store has them."""
    assert 0 <= index <= index + count <= store.page_count, f"pages {index} + {count}"
    return range(index, index + count)


def pages_of(store: Store, run: Run) -> range:
    """The indexes that a run covers; asserts that it is whole pages, which the store has."""
    assert run.buffer.nbytes % store.page_size == 0, f"a run of {run.buffer.nbytes} bytes"
    return pages_between(store, run.index, run.buffer.nbytes // store.page_size)


class StoreError(Exception):
    """A store could not do what it was asked; subclasses say what follows from it.

    `store` names the layer that raised it, `page` the first page concerned, where there is one.
    """

    def __init__(self, message: str, *, store: str, page: int | None = None) -> None:
        super().__init__(message)
        self.store = store
        self.page = page

    def __str__(self) -> str:
        where = self.store if self.page is None else f"{self.store}: page {self.page}"
        return f"{where}: {self.args[0]}"


class TransientError(StoreError):
    """May work when it is tried again."""


class PageLostError(StoreError):
    """The content of `page` is gone for good; other pages are not."""


class StoreFullError(StoreError):
    """No room for this write; what was there before still is."""


class StoreFailedError(StoreError):
    """The store is of no use any more; every later call raises this too."""
