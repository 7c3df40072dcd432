"""Misses that find the loop's queue full: their pages go back to what they were, discards and all.

No client's memory is involved: the words of a region's pages are set by hand, in the table's memfd.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from userswap.engine.page_table import EXTENT_SLOTS, State
from userswap.native import check, ffi, lib

QUEUE = 8192
"""Misses that fit."""
PAGES = lib.US_LEAF_PAGES
"""One leaf of pages beyond."""
STORED = struct.pack(f"<{PAGES}Q", *[State.STORED] * PAGES)
BUSY = 1 << 5
SECONDS = 1.5


class Table:
    """A client with one region of stored pages, whose queue of misses is full."""

    def __init__(self) -> None:
        out, region = ffi.new("struct us_client **"), ffi.new("struct us_region **")
        check(lib.us_client_create(out, -1, 1, 0, 0, 0))
        self.client = out[0]
        start, limit, none = 1 << 40, 1 << 40, lib.us_prefetch_find(b"none")
        size = QUEUE + PAGES
        check(lib.us_region_open(self.client, start, size, 0, limit, ffi.NULL, 0, none, region))
        self.region: Any = region[0]
        self._fd = lib.us_client_descriptors(self.client, 0)
        for first in range(0, size, PAGES):
            lib.us_discard_end(self.region, first, 1)  # it makes the leaf
            self.set(first, STORED)
        assert lib.us_region_prefetch(self.region, 0, QUEUE) == QUEUE

    def _place(self, first: int) -> int:
        """Where a leaf's words are, by what the memfd says of itself."""
        _, _, _, root, nodes, leaf, branch, _, node = struct.unpack(
            "<5Q4I", os.pread(self._fd, 56, 0)
        )
        at = nodes + (self._entry(root + first // EXTENT_SLOTS * 4) - 1) * node
        return int(nodes + (self._entry(at + first // leaf % branch * 4) - 1) * node)

    def _entry(self, at: int) -> int:
        return int.from_bytes(os.pread(self._fd, 4, at), "little")

    def set(self, first: int, words: bytes) -> None:
        os.pwrite(self._fd, words, self._place(first))

    def words(self, first: int) -> tuple[int, ...]:
        return struct.unpack(f"<{PAGES}Q", os.pread(self._fd, 8 * PAGES, self._place(first)))

    def ask(self) -> None:
        """Ask for pages for which the queue has no room."""
        assert lib.us_region_prefetch(self.region, QUEUE, PAGES) == PAGES

    def close(self) -> None:
        lib.us_client_destroy(self.client)


@pytest.fixture
def table() -> Iterator[Table]:
    opened = Table()
    yield opened
    opened.close()


def states(words: tuple[int, ...]) -> set[int]:
    return {word & 15 for word in words}


def test_they_are_stored_pages_as_before(table: Table) -> None:
    table.ask()
    words = table.words(QUEUE)
    assert states(words) == {State.STORED}
    assert not any(word & BUSY for word in words)
    out = ffi.new("struct us_miss[]", 1)
    assert lib.us_take_misses(table.client, out, 1) == 1
    assert states(table.words(0)) == {State.FILLING}


def test_a_discard_at_that_moment_leaves_no_page_busy(table: Table) -> None:
    """BUSY for ever would keep a page in memory for ever. The fault server is one thread, whoever
    discards another; before one swap ended such a fill, it took a few hundred rounds of this."""
    gate, mark = threading.Barrier(2), ffi.new("uint32_t[]", PAGES)

    def discard() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            while True:
                gate.wait()
                lib.us_region_discard(table.region, QUEUE, PAGES, mark)
                gate.wait()

    other = threading.Thread(target=discard)
    other.start()
    rounds, busy, end = 0, 0, time.monotonic() + SECONDS
    try:
        while time.monotonic() < end and not busy:
            table.set(QUEUE, STORED)
            ffi.memmove(mark, bytes(4 * PAGES), 4 * PAGES)
            gate.wait()
            for _ in range(8):
                table.ask()
            gate.wait()
            words = table.words(QUEUE)
            busy = sum(bool(word & BUSY) for word in words)
            rounds += 1
    finally:
        gate.abort()
        other.join()
    print(f"{rounds} rounds")
    assert not busy, f"{busy} pages after {rounds} rounds"
    assert states(words) <= {State.STORED, State.ZERO}
