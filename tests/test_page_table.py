"""The one transition table, as the architecture states it; where regions lie, and the layout."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userswap.engine.page_table import (
    EXTENT_SLOTS,
    TABLE_SLOTS,
    Extents,
    State,
    transitions,
)
from userswap.native import check, ffi, lib

ZERO, FILLING, CLEAN, UNPROTECTING, DIRTY, MOVING, LEAVING, DROPPING, STORED, POISONED = list(
    State
)[:10]
PROTECTED = State.PROTECTED

ALLOWED = {
    # A fault on what has no content; nothing else happens to it.
    ZERO: {FILLING},
    # Read or write; or given up, so that it is what it was; or lost.
    FILLING: {CLEAN, DIRTY, ZERO, STORED, POISONED},
    # Written; moved out all the same; dropped.
    CLEAN: {UNPROTECTING, MOVING, DROPPING, PROTECTED},
    UNPROTECTING: {DIRTY, CLEAN},
    # Never to CLEAN: that arises only by installing with write protection.
    DIRTY: {UNPROTECTING, MOVING, DROPPING, PROTECTED},
    # Out; refused; there was nothing.
    MOVING: {LEAVING, DIRTY, ZERO},
    # Rescued; stored; discarded.
    LEAVING: {FILLING, STORED, ZERO},
    # Dropped; discarded; or the agent could not drop it.
    DROPPING: {STORED, ZERO, CLEAN, DIRTY},
    STORED: {FILLING, ZERO},
    # Only a discard ends it.
    POISONED: {DROPPING},
    # Written; dropped; given up. Never to CLEAN, nor to STORED past the one who drops it.
    PROTECTED: {UNPROTECTING, DROPPING, DIRTY},
}


def test_the_native_table_is_the_documented_one() -> None:
    assert transitions() == {state: frozenset(next_) for state, next_ in ALLOWED.items()}
    assert lib.us_transitions_from(len(State)) == 0


def test_what_the_table_must_never_allow() -> None:
    table = transitions()
    # Memory is given up only after the store has it, and by one who has won the word.
    assert not any(
        STORED in table[state] for state in (CLEAN, DIRTY, PROTECTED, UNPROTECTING, MOVING, ZERO)
    )
    # A rescue is a copy through FILLING: nothing comes back from LEAVING as resident by itself.
    assert not table[LEAVING] & {CLEAN, DIRTY}
    # A writer that is being let through is never a victim.
    assert table[UNPROTECTING] <= {CLEAN, DIRTY}
    # CLEAN comes by installing, or stays CLEAN; never from DIRTY by protecting it.
    assert {state for state in State if CLEAN in table[state]} == {
        FILLING,
        UNPROTECTING,
        DROPPING,
    }
    # Every state can be left, and a discard reaches ZERO from each.
    for state in State:
        seen = {state}
        while more := {next_ for at in seen for next_ in table[at]} - seen:
            seen |= more
        assert seen == set(State)


def rounded(count: int) -> int:
    return -(-count // EXTENT_SLOTS) * EXTENT_SLOTS


COUNTS = st.integers(1, 40 * EXTENT_SLOTS)


@given(st.lists(st.tuples(st.booleans(), COUNTS, st.integers(0, 99)), max_size=80))
def test_extents_never_overlap_and_come_back(steps: list[tuple[bool, int, int]]) -> None:
    slots = 64 * EXTENT_SLOTS
    extents, held = Extents(slots), dict[int, int]()
    for allocates, count, which in steps:
        if allocates or not held:
            try:
                first = extents.allocate(count)
            except MemoryError:
                ends = sorted((start, start + rounded(size)) for start, size in held.items())
                gaps = zip(
                    [0, *(end for _, end in ends)], [*(s for s, _ in ends), slots], strict=True
                )
                assert max(high - low for low, high in gaps) < rounded(count)
                continue
            assert first % EXTENT_SLOTS == 0
            assert first + rounded(count) <= slots
            assert all(
                first + rounded(count) <= start or start + rounded(size) <= first
                for start, size in held.items()
            )
            held[first] = count
        else:
            first = sorted(held)[which % len(held)]
            extents.release(first, held.pop(first))
    for first, count in held.items():
        extents.release(first, count)
    assert extents.allocate(slots) == 0


def test_a_table_holds_the_largest_region() -> None:
    extents = Extents()
    assert extents.allocate(TABLE_SLOTS) == 0
    extents.release(0, TABLE_SLOTS)
    assert extents.allocate(1) == 0
    assert extents.allocate(1) == EXTENT_SLOTS


# --- the table in memory ---

LEAF, NODE, PAGE = lib.US_LEAF_PAGES, lib.US_NODE_BYTES, 4096
BRANCH_LEAVES = EXTENT_SLOTS // LEAF


class Table:
    """A table of its own, with the extents that a test opens."""

    def __init__(self) -> None:
        self.native = ffi.new("struct us_table *")
        check(lib.us_table_open(self.native))
        self.opened: list[Any] = []

    def extent(self, base: int, pages: int) -> Any:
        extent = ffi.new("struct us_extent *")
        check(lib.us_extent_open(extent, self.native, base, pages))
        self.opened.append(extent)
        return extent

    def bytes(self) -> int:
        return int(lib.us_table_bytes(self.native))

    def close(self) -> None:
        lib.us_table_close(self.native)


@pytest.fixture
def table() -> Iterator[Table]:
    opened = Table()
    yield opened
    opened.close()


def word(extent: Any, index: int) -> Any:
    return ffi.cast("uint64_t *", lib.us_extent_make(extent, index))


def leaves_of(extent: Any, pages: int) -> list[int]:
    """The first page of every leaf that a walk meets."""
    found, at = [], 0
    while (at := lib.us_extent_from(extent, at)) < pages:
        found.append(at)
        at = (at // LEAF + 1) * LEAF
    return found


@given(st.lists(st.integers(0, 40 * EXTENT_SLOTS - 6), max_size=60), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_walk_meets_every_leaf_and_nothing_else(touched: list[int], at: int) -> None:
    table, pages = Table(), 40 * EXTENT_SLOTS - 5
    extent, neighbour = table.extent(at * EXTENT_SLOTS, pages), table.extent(50 * EXTENT_SLOTS, 9)
    word(neighbour, 8)[0] = 77
    for number, index in enumerate(touched):
        word(extent, index)[0] = number + 1
    last = {index: number + 1 for number, index in enumerate(touched)}
    assert all(word(extent, index)[0] == number for index, number in last.items())
    leaves = {index // LEAF * LEAF for index in touched}
    assert leaves_of(extent, pages) == sorted(leaves)
    branches = {index // EXTENT_SLOTS for index in touched}
    assert lib.us_extent_made(extent) == len(leaves) + len(branches)
    lib.us_extent_close(extent)
    # Its successor at the same place finds zeros, the neighbour keeps its words.
    again = table.extent(at * EXTENT_SLOTS, pages)
    assert leaves_of(again, pages) == []
    assert all(word(again, index)[0] == 0 for index in touched)
    assert word(neighbour, 8)[0] == 77
    assert leaves_of(neighbour, 9) == [0]
    table.close()


def test_scattered_touches_share_pages_of_the_table(table: Table) -> None:
    pages, touches = 1 << 28, 4000
    extent = table.extent(0, pages)
    step = pages // touches
    for number in range(touches):
        word(extent, number * step)[0] = 1
    # A leaf and a branch each, and the root's pages: not a page of 4096 bytes for each.
    nodes = 2 * touches * NODE
    assert lib.us_extent_made(extent) == 2 * touches
    assert nodes <= table.bytes() <= nodes + (pages // EXTENT_SLOTS * 4) + 4 * PAGE
    before = table.bytes()
    lib.us_extent_prepare(extent)
    assert before < table.bytes() <= before + nodes // 8 + PAGE  # what is ready counts, too
    assert len(leaves_of(extent, pages)) == touches
    lib.us_extent_close(extent)
    assert table.bytes() <= 3 * PAGE


def test_dense_pages_cost_eight_bytes(table: Table) -> None:
    pages = 8 * EXTENT_SLOTS
    extent = table.extent(0, pages)
    for index in range(0, pages, LEAF):
        word(extent, index)[0] = 1
    lib.us_extent_prepare(extent)  # no more than is set aside
    assert 8 <= table.bytes() / pages <= 8.7
    assert lib.us_extent_made(extent) == 8 * (BRANCH_LEAVES + 1)


def test_threads_that_want_one_leaf_get_one(table: Table) -> None:
    threads, leaves = 4, 3000
    extent = table.extent(0, leaves * LEAF)
    gate = threading.Barrier(threads)
    got: list[list[int]] = [[] for _ in range(threads)]

    def touch(number: int) -> None:
        gate.wait()
        for leaf in range(leaves):
            made = lib.us_extent_make(extent, leaf * LEAF + number)
            got[number].append(int(ffi.cast("uintptr_t", made)) - 8 * number)

    workers = [threading.Thread(target=touch, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(seen == got[0] for seen in got)
    assert len(set(got[0])) == leaves
    assert lib.us_extent_made(extent) == leaves + -(-leaves // BRANCH_LEAVES)


def test_the_memfd_tells_what_it_is(table: Table) -> None:
    magic, size, slots, root, nodes, leaf, branch, a_branch, node = struct.unpack(
        "<5Q4I", os.pread(table.native.fd, 56, 0)
    )
    assert magic.to_bytes(8, "little") == b"uswtab01"
    assert (size, slots) == (os.fstat(table.native.fd).st_size, TABLE_SLOTS)
    assert (leaf, branch, node) == (LEAF, BRANCH_LEAVES, NODE)
    # With that alone a word is found.
    base, index = 3 * EXTENT_SLOTS, 2 * EXTENT_SLOTS + 5 * LEAF + 7
    extent = table.extent(base, 4 * EXTENT_SLOTS)
    word(extent, 0)
    word(extent, index)[0] = 4242
    slot, fd = base + index, table.native.fd
    entry = int.from_bytes(os.pread(fd, 4, root + slot // EXTENT_SLOTS * 4), "little")
    assert 3 * a_branch < entry <= 7 * a_branch
    at = nodes + (entry - 1) * node + slot // LEAF % branch * 4
    at = nodes + (int.from_bytes(os.pread(fd, 4, at), "little") - 1) * node + slot % LEAF * 8
    assert int.from_bytes(os.pread(fd, 8, at), "little") == 4242


def test_an_extent_lies_on_its_own_branches_and_inside(table: Table) -> None:
    for base, pages in ((1, 5), (EXTENT_SLOTS // 2, 5), (0, 0), (TABLE_SLOTS, 1)):
        with pytest.raises(OSError, match="nvalid"):
            table.extent(base, pages)
    last = table.extent(TABLE_SLOTS - EXTENT_SLOTS, EXTENT_SLOTS)
    word(last, EXTENT_SLOTS - 1)[0] = 5
    assert lib.us_extent_from(last, 0) == EXTENT_SLOTS - LEAF
    lib.us_extent_close(last)
