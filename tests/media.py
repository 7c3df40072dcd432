"""A store whose medium a test can cut off, damage and open again; and a model to compare with."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from userswap.backends import registry
from userswap.backends.store import (
    PAGE_SIZE,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    pages_between,
    pages_of,
)

PAGE = PAGE_SIZE


_folder = tempfile.TemporaryDirectory(prefix="userswap-keys-")


def key_file(number: int = 0) -> str:
    """A file with a key of its own."""
    path = os.path.join(_folder.name, str(number))
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(random.Random(number).randbytes(32))
    return path


def completed(stack: str) -> str:
    """A stack as tests write it, with the key that `encrypt::` needs."""
    return stack.replace("encrypt::", f"encrypt?key_file={key_file()}::")


class Killed(BaseException):
    """The process that used the medium is gone."""


@dataclass
class Medium:
    """Pages that outlive the store. After `cut` more of them were written or discarded, the process
    is killed; the call with number `fail` raises `error`, and what it was to do is done by half."""

    pages: dict[int, bytes] = field(default_factory=dict)
    cut: int = -1
    fail: int = -1
    error: type[StoreError] = StoreFailedError
    calls: int = 0
    changes: int = 0
    asked: Geometry | None = None
    pace: Callable[[], int] = lambda: 1
    """How many turns of the event loop the next operation takes."""


class MediumStore(Store):
    """See `Store` for the contract, which it asserts of its caller as well."""

    durable = True
    space = "a test's medium"

    def __init__(self, medium: Medium, geometry: Geometry) -> None:
        self.page_size = geometry.page_size
        self.page_count = geometry.page_count or 1100
        self._medium = medium
        self._closed = False
        self._changing: set[int] = set()
        self._reading: Counter[int] = Counter()

    async def read(self, runs: Sequence[Run]) -> None:
        self._begin()
        asked = [page for run in runs for page in pages_of(self, run)]
        assert not self._changing.intersection(asked), f"some of {asked} are being changed"
        self._reading.update(asked)
        try:
            for run in runs:
                whole = run.buffer.cast("B")
                for place, page in enumerate(pages_of(self, run)):
                    content = self._medium.pages.get(page, bytes(self.page_size))
                    whole[place * self.page_size : (place + 1) * self.page_size] = content
            for _ in range(self._medium.pace()):
                await asyncio.sleep(0)
        finally:
            self._reading.subtract(asked)

    async def write(self, runs: Sequence[Run]) -> None:
        content: dict[int, bytes | None] = {
            page: bytes(run.buffer.cast("B")[place * self.page_size : (place + 1) * self.page_size])
            for run in runs
            for place, page in enumerate(pages_of(self, run))
        }
        await self._change(content)

    async def discard(self, index: int, count: int) -> None:
        await self._change(dict.fromkeys(pages_between(self, index, count)))

    async def _change(self, content: dict[int, bytes | None]) -> None:
        assert not self._changing.intersection(content), f"{list(content)} are being changed"
        assert not any(self._reading[page] for page in content), f"{list(content)} are being read"
        self._check_open()
        self._changing.update(content)
        self._medium.calls += 1
        failing = self._medium.calls == self._medium.fail
        try:
            for _ in range(self._medium.pace()):
                await asyncio.sleep(0)
            for done, (page, data) in enumerate(content.items()):
                if failing and done >= len(content) // 2:
                    break
                if self._medium.changes == self._medium.cut:
                    raise Killed
                self._medium.changes += 1
                if data is None:
                    self._medium.pages.pop(page, None)
                else:
                    self._medium.pages[page] = data
                await asyncio.sleep(0)
            if failing:
                raise self._medium.error("fails now", store="medium")
        finally:
            self._changing.difference_update(content)

    async def flush(self) -> None:
        self._begin()

    async def aclose(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store="medium")

    def _begin(self) -> None:
        self._check_open()
        self._medium.calls += 1
        if self._medium.calls == self._medium.fail:
            raise self._medium.error("fails now", store="medium")


class Under:
    """What a filter is given to open the medium."""

    def __init__(self, medium: Medium) -> None:
        self._medium = medium

    async def open(self, geometry: Geometry) -> Store:
        self._medium.asked = geometry
        return MediumStore(self._medium, geometry)

    async def open_url(self, url: str, geometry: Geometry) -> Store:
        return await registry.open_stack(url, geometry)


async def open_over(medium: Medium, stack: str, geometry: Geometry) -> Store:
    """Open one filter, written as in a URL, over a medium."""
    layer = registry.parse(f"{completed(stack)}memory:").filters[0]
    opened = registry.filters()[layer.name].load()(layer, geometry, Under(medium))
    store = await opened
    assert isinstance(store, Store)
    return store


def content(rng: random.Random, pages: int, size: int = PAGE) -> bytes:
    noise = [rng.randrange(size + 1) for _ in range(pages)]
    return b"".join(rng.randbytes(length) + bytes(size - length) for length in noise)


async def read(store: Store, index: int, pages: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (pages * store.page_size))
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes) -> None:
    await store.write([Run(index, memoryview(data))])


async def lost(store: Store, pages: Sequence[int]) -> list[int]:
    """Those of the pages that are lost; others must be readable."""
    found = []
    for page in pages:
        try:
            await read(store, page)
        except PageLostError as error:
            found.append(page if error.page == page else -1)
    return found


class History:
    """Random operations on a store, and what each page may hold: one content, or one of two where
    an operation did not return."""

    def __init__(self, rng: random.Random, pages: int, size: int = PAGE) -> None:
        self.rng = rng
        self.pages = pages
        self.size = size
        self.may: dict[int, list[bytes]] = {}

    async def step(self, store: Store, *, most: int = 6) -> None:
        """One operation; what fails leaves each of its pages old or new, which is looked at."""
        index = self.rng.randrange(self.pages)
        pages = range(index, min(self.pages, index + self.rng.randrange(1, most + 1)))
        action = self.rng.random()
        if action < 0.5:
            new = content(self.rng, len(pages), self.size)
            await self._change(pages, new, write(store, index, new))
        elif action < 0.65:
            zeros = bytes(len(pages) * self.size)
            await self._change(pages, zeros, store.discard(index, len(pages)))
        elif action < 0.95:
            self.settle(pages, await read(store, index, len(pages)))
        else:
            await store.flush()

    async def _change(self, pages: range, new: bytes, call: object) -> None:
        after = [new[at : at + self.size] for at in range(0, len(new), self.size)]
        for page, one in zip(pages, after, strict=True):
            self.may[page] = [*self.may.get(page, [bytes(self.size)]), one]
        await call  # type: ignore[misc]
        self.may.update((page, [one]) for page, one in zip(pages, after, strict=True))

    def settle(self, pages: range, seen: bytes) -> None:
        """What was read is allowed, and from now on nothing else is."""
        for place, page in enumerate(pages):
            one = seen[place * self.size : (place + 1) * self.size]
            assert one in self.may.get(page, [bytes(self.size)]), f"page {page} is wrong"
            self.may[page] = [one]

    async def check(self, store: Store) -> None:
        """Every page is what it may be; none is lost."""
        for page in range(self.pages):
            self.settle(range(page, page + 1), await read(store, page))
