"""A filter that keeps a record of every page, by which it tells the page from anything else.

Responsible for: the order of writes. A page's record is a pair: of what the page was and of what it
is becoming. Before the page is written, its leaf says (old, new), and a read takes either. Once the
write has returned, the pair becomes (new, new): in memory at first (see tail.py), in the inner
store at the latest when a flush returns. So
 - a write that failed, was cancelled or was cut off by a kill leaves the page old or new, whole;
 - a completed flush survives, and after it nothing but what was flushed is taken;
 - where power fails and the medium reorders what was not flushed, a page that was being overwritten
   may match neither. It is lost then, as any damaged page is, and never wrong.
A page without a record reads as zeros only where the inner store has zeros: what else is there is
not ours. Nor is a medium that has something else in place of our label: its pages are lost, and it
is left as it is until it is discarded as a whole.
Must not know: what a record is made of.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from userswap.backends.filters import Filter
from userswap.backends.filters.tail import Tail
from userswap.backends.store import (
    Below,
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

DISCARD_PAGES = 1 << 14
"""Whose records are in memory at a time."""


FOREIGN = "the medium holds something else; `userswap store format --force` takes it"


class Sealed(Filter):
    """The first `pages` pages of `inner`, each with a record in the last ones."""

    def __init__(self, inner: Store, pages: int, name: str, record_bytes: int) -> None:
        super().__init__(inner)
        self.page_count = pages
        self.checked = True
        self._name = name
        self._size = record_bytes
        self._never = bytes(record_bytes)
        self._zeros = bytes(inner.page_size)
        self._closed = False
        self.tail = Tail(inner, pages, 2 * record_bytes)

    @abstractmethod
    def seal(self, index: int, pages: memoryview) -> tuple[memoryview, list[bytes]]:
        """What the inner store gets for pages, and each one's record, which is not all zeros."""

    @abstractmethod
    def unseal(self, index: int, page: memoryview, record: bytes) -> bool:
        """Make the page, in place, of what the inner store had; False, and nothing changed, where
        the record is not of it."""

    async def read(self, runs: Sequence[Run]) -> None:
        self._check_open()
        indexes = [pages_of(self, run) for run in runs]
        if self.tail.foreign and indexes:
            raise PageLostError(FOREIGN, store=self._name, page=indexes[0].start)
        records = [self.tail.at_hand(pages) for pages in indexes]
        if None in records:
            held = await self.tail.hold(indexes)
            records = [self.tail.get(pages.start, len(pages)) for pages in indexes]
            self.tail.release(held)
        await self._inner.read(runs)
        for run, pages, kept in zip(runs, indexes, records, strict=True):
            pairs = self._pairs(kept or b"")
            for page, view, pair in zip(pages, self._single(run.buffer), pairs, strict=True):
                if self._matching(page, view, pair) is None:
                    reason = "what the store has is not what was written"
                    raise PageLostError(reason, store=self._name, page=page)

    async def write(self, runs: Sequence[Run]) -> None:
        self._check_open()
        indexes = [pages_of(self, run) for run in runs]
        if self.tail.foreign:
            raise StoreFailedError(FOREIGN, store=self._name)
        held = await self.tail.hold(indexes, changing=True)
        try:
            sealed = [self.seal(run.index, run.buffer.cast("B")) for run in runs]
            news = [records for _, records in sealed]
            becoming = [
                (pages.start, _pairs(await self._present(pages, new), new))
                for pages, new in zip(indexes, news, strict=True)
            ]
            await self.tail.put(becoming)
            await self._inner.write(
                [Run(run.index, stored) for run, (stored, _) in zip(runs, sealed, strict=True)]
            )
            for pages, new in zip(indexes, news, strict=True):
                self.tail.settle(pages.start, _pairs(new, new))
        finally:
            self.tail.release(held)

    async def discard(self, index: int, count: int) -> None:
        self._check_open()
        whole = pages_between(self, index, count)
        if self.tail.foreign:
            if count < self.page_count:
                raise StoreFailedError(FOREIGN, store=self._name)
            await self.tail.take()
            return
        cleared: list[range] = []
        for at in range(0, count, DISCARD_PAGES):
            pages = whole[at : at + DISCARD_PAGES]
            held = await self.tail.hold([pages], changing=True)
            try:
                if self.tail.get(pages.start, len(pages)).strip(b"\0"):
                    never = [self._never] * len(pages)
                    present = await self._present(pages, never)
                    # No room for records must not keep one from making room: a kill before the
                    # next flush may then leave pages lost that should be zeros.
                    with contextlib.suppress(StoreFullError):
                        await self.tail.put([(pages.start, _pairs(present, never))])
                    cleared.append(pages)
            finally:
                self.tail.release(held)
        await self._inner.discard(index, count)
        for pages in cleared:
            held = await self.tail.hold([pages], changing=True)
            self.tail.settle(pages.start, bytes(2 * self._size * len(pages)))
            self.tail.release(held)

    async def flush(self) -> None:
        self._check_open()
        await self.tail.flush()
        await self._inner.flush()

    async def aclose(self) -> None:
        try:
            if not self._closed:
                self._closed = True
                # What cannot be written now says (old, new) where it could say (new, new).
                with contextlib.suppress(StoreError):
                    await self.tail.flush()
        finally:
            await self._inner.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=self._name)

    def _single(self, buffer: memoryview) -> list[memoryview]:
        whole, size = buffer.cast("B"), self.page_size
        return [whole[start : start + size] for start in range(0, len(whole), size)]

    def _pairs(self, kept: bytes) -> list[tuple[bytes, bytes]]:
        size = self._size
        return [
            (kept[at : at + size], kept[at + size : at + 2 * size])
            for at in range(0, len(kept), 2 * size)
        ]

    def _matching(self, page: int, view: memoryview, pair: tuple[bytes, bytes]) -> bytes | None:
        """The record that what was read belongs to; None where the page is lost."""
        old, new = pair
        for record in (new,) if old == new else (new, old):
            if record == self._never:
                if bytes(view) == self._zeros:
                    return record
            elif self.unseal(page, view, record):
                return record
        return None

    async def _present(self, pages: range, without: list[bytes]) -> list[bytes]:
        """The records of what pages are now. Where a pair does not say, the page does; where that
        is lost, it is as though what is `without` had been."""
        present = []
        pairs = self._pairs(self.tail.get(pages.start, len(pages)))
        for page, pair, other in zip(pages, pairs, without, strict=True):
            record: bytes | None = pair[0]
            if pair[0] != pair[1]:
                view = memoryview(bytearray(self.page_size))
                record = None
                with contextlib.suppress(PageLostError):
                    await self._inner.read([Run(page, view)])
                    record = self._matching(page, view, pair)
            present.append(other if record is None else record)
        return present


def _pairs(old: list[bytes], new: list[bytes]) -> bytes:
    return b"".join(old_one + new_one for old_one, new_one in zip(old, new, strict=True))


async def open_below(
    name: str, record_bytes: int, geometry: Geometry, below: Below
) -> tuple[Store, int]:
    """The store under a filter whose records take so many bytes, and the pages left to offer."""
    size, pair, pages = geometry.page_size, 2 * record_bytes, geometry.page_count
    if pages is None:
        inner = await below.open(geometry)
        pages = Tail.fitting(inner.page_count, pair, size)
        if not pages:
            await inner.aclose()
            raise StoreFailedError(f"{inner.page_count} pages are no room for records", store=name)
        return inner, pages
    try:
        wider = replace(geometry, page_count=pages + Tail.pages_needed(pages, pair, size))
    except ValueError as error:
        raise StoreFailedError(f"no room for records: {error}", store=name) from error
    return await below.open(wider), pages
