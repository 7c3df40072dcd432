"""Bytes per page, kept in the last pages of a store: what checksums and nonces live in.

Behind its own `pages` the inner store has leaves, which are pages full of records, and one label
that says whose they are. All zeros is the record of a page that was never written.

Responsible for: where records are, a bounded cache of leaves, and leaves that several operations
change at once: each change is made in memory without an await, and written by whoever comes first
for all who wait. `put` returns when its records are written; what is `settle`d is written with the
next change of its leaf, at a flush, or when the leaf leaves the cache, so a crash may undo it.
Must not know: what records mean. Invariants: a leaf in use or unwritten stays in the cache; no leaf
is written twice at once; nothing is written to a medium whose label is somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from userswap.backends.store import PageLostError, Run, Store, StoreError, StoreFailedError

CACHE_BYTES = 8 * 1024**2
_LABEL = struct.Struct("<16s16sIIQ16s16s")
_MAGIC = b"userswap records"
_CRC = struct.Struct("<I")


@dataclass(slots=True)
class _Leaf:
    content: bytearray | None = None
    users: int = 0
    changes: int = 0
    written: int = 0
    """The number of changes that are in the inner store."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Tail:
    """The records of `pages` pages; `inner` has `pages_needed` more."""

    def __init__(self, inner: Store, pages: int, bytes_per_page: int) -> None:
        self._inner = inner
        self._pages = pages
        self._size = bytes_per_page
        self._per_leaf = inner.page_size // bytes_per_page
        self._label_page = pages + -(-pages // self._per_leaf)
        self._room = max(4, CACHE_BYTES // inner.page_size)
        self._leaves: OrderedDict[int, _Leaf] = OrderedDict()
        self._unwritten: set[int] = set()
        self._urgent: set[int] = set()
        """What somebody waits for; the others of `_unwritten` can wait themselves."""
        self._writing = asyncio.Lock()
        self._label = b""
        self._labelled = False
        self.foreign = False
        """There is something else where the label should be."""

    @staticmethod
    def pages_needed(pages: int, bytes_per_page: int, page_size: int) -> int:
        """The pages behind `pages` that their records and the label take."""
        return -(-pages // (page_size // bytes_per_page)) + 1

    @staticmethod
    def fitting(total_pages: int, bytes_per_page: int, page_size: int) -> int:
        """How many of `total_pages` can have records in the rest; 0 where there is no room."""
        per_leaf = page_size // bytes_per_page
        leaves = -(-max(0, total_pages - 1) // (per_leaf + 1))
        return max(0, total_pages - 1 - leaves)

    async def open(self, kind: str, check: Callable[[bytes], bytes], refused: str) -> None:
        """Compare the label, which is written before the first record. `check` makes 16 bytes of
        16 random ones; `refused` says what it means that the label has others."""
        page = bytearray(self._inner.page_size)
        await self._inner.read([Run(self._label_page, memoryview(page))])
        layout = (kind.encode(), self._inner.page_size, self._size, self._pages)
        magic, kept, size, record, pages, salt, checked = _LABEL.unpack_from(page)
        crc = _CRC.unpack_from(page, _LABEL.size)[0]
        if magic != _MAGIC or crc != zlib.crc32(page[: _LABEL.size]):
            self.foreign = any(page)
            salt = os.urandom(16)
            label = _LABEL.pack(_MAGIC, *layout, salt, check(salt))
            self._label = label + _CRC.pack(zlib.crc32(label))
            return
        whose = kept.rstrip(b"\0")
        if (whose, size, record, pages) != layout:
            written = f"{whose.decode('ascii', 'replace')}, {pages} pages of {size} bytes"
            asked = f"{kind}, {self._pages} pages of {self._inner.page_size}"
            raise StoreFailedError(
                f"the medium was written by {written}; this is {asked}", store=kind
            )
        if checked != check(salt):
            raise StoreFailedError(refused, store=kind)
        self._labelled = True

    async def take(self) -> None:
        """Forget everything on a medium that is somebody else's."""
        await self._inner.discard(0, self._label_page + 1)
        self.foreign = False

    async def hold(self, pages: Sequence[range], *, changing: bool = False) -> list[int]:
        """Bring the leaves of `pages` into memory, to stay until `release` is given the result.

        For who is `changing` them, a leaf that is lost begins anew: its records are then those of
        pages that were never written.
        """
        first: dict[int, int] = {}  # leaf -> the first page asked for in it
        for asked in pages:
            for number in self._numbers(asked.start, len(asked)):
                first.setdefault(number, max(asked.start, number * self._per_leaf))
        held = list(first)
        for number in held:
            self._leaves.setdefault(number, _Leaf()).users += 1
            self._leaves.move_to_end(number)
        try:
            for number, page in first.items():
                if self._leaves[number].content is None:
                    await self._load(number, page, changing)
            if len(self._leaves) > self._room:
                await self._shrink(write=changing)
        except BaseException:
            self.release(held)
            raise
        return held

    def release(self, held: Sequence[int]) -> None:
        for number in held:
            self._leaves[number].users -= 1

    def at_hand(self, pages: range) -> bytes | None:
        """The records of pages, without waiting; None where that cannot be."""
        number, start = divmod(pages.start, self._per_leaf)
        stop, leaf = start + len(pages), self._leaves.get(number)
        if leaf is None or leaf.content is None or stop > self._per_leaf:
            return None
        self._leaves.move_to_end(number)
        return bytes(leaf.content[start * self._size : stop * self._size])

    def get(self, index: int, count: int) -> bytes:
        """The records of pages that are held."""
        return b"".join(bytes(part) for _, part in self._parts(index, count))

    def settle(self, index: int, records: bytes) -> None:
        """Change records of pages that are held, in memory for now."""
        done = 0
        for number, part in self._parts(index, len(records) // self._size):
            part[:] = records[done : done + len(part)]
            done += len(part)
            self._leaves[number].changes += 1
            self._unwritten.add(number)

    async def put(self, changes: Sequence[tuple[int, bytes]]) -> None:
        """Change records of pages that are held, and return when they are written."""
        numbers: set[int] = set()
        for index, records in changes:
            self.settle(index, records)
            numbers.update(self._numbers(index, len(records) // self._size))
        self._urgent |= numbers
        await self._write(numbers)

    async def flush(self) -> None:
        """Write every change there is."""
        await self._write(self._unwritten)

    def _numbers(self, index: int, count: int) -> range:
        return range(index // self._per_leaf, -(-(index + count) // self._per_leaf))

    def _parts(self, index: int, count: int) -> Iterator[tuple[int, memoryview]]:
        """The records of `count` pages, leaf by leaf."""
        while count > 0:
            number, start = divmod(index, self._per_leaf)
            here = min(count, self._per_leaf - start)
            content = self._leaves[number].content
            assert content is not None, f"the records of page {index} are not held"
            yield number, memoryview(content)[start * self._size : (start + here) * self._size]
            index, count = index + here, count - here

    async def _load(self, number: int, page: int, changing: bool) -> None:
        leaf = self._leaves[number]
        async with leaf.loading:
            if leaf.content is not None:
                return
            content = bytearray(self._inner.page_size)
            try:
                await self._inner.read([Run(self._pages + number, memoryview(content))])
            except PageLostError as error:
                if not changing:
                    raise PageLostError(
                        "its record is lost", store=error.store, page=page
                    ) from error
                content = bytearray(self._inner.page_size)
            leaf.content = content

    async def _write(self, numbers: Iterable[int]) -> None:
        """Write leaves as they are now or later; and at once what others wait for."""
        due = [(n, self._leaves[n], self._leaves[n].changes) for n in numbers]
        if not due:
            return
        async with self._writing:
            late = {number for number, leaf, least in due if leaf.written < least}
            if not late:
                return
            if not self._labelled:
                label = memoryview(self._label.ljust(self._inner.page_size, b"\0"))
                await self._inner.write([Run(self._label_page, label)])
                self._labelled = True
            taken = []
            for number in sorted(late | self._urgent):
                leaf = self._leaves[number]
                taken.append((number, leaf, leaf.changes, bytes(leaf.content or b"")))
            self._urgent.clear()
            filled = [(number, content) for number, _, _, content in taken if content.strip(b"\0")]
            await self._inner.write([Run(self._pages + n, memoryview(c)) for n, c in filled])
            for number in {number for number, *_ in taken} - dict(filled).keys():
                await self._inner.discard(self._pages + number, 1)
            for number, leaf, changes, _ in taken:
                leaf.written = changes
                if leaf.changes == changes:
                    self._unwritten.discard(number)

    async def _shrink(self, *, write: bool) -> None:
        """Forget leaves that were not used for long. A reader writes none, nor does it fail because
        another's cannot be written; the cache is larger than it should be then, for a while."""
        surplus = len(self._leaves) - self._room * 7 // 8
        idle = [number for number, leaf in self._leaves.items() if not leaf.users][:surplus]
        if write:
            with contextlib.suppress(StoreError):
                await self._write(self._unwritten.intersection(idle))
        for number in idle:
            leaf = self._leaves.get(number)
            if leaf and not leaf.users and leaf.written == leaf.changes:
                del self._leaves[number]
