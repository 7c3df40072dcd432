"""The one transition table, as the architecture states it; and where regions lie in a table."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from userswap.engine.page_table import (
    SLOTS_PER_TABLE_PAGE,
    TABLE_SLOTS,
    Extents,
    State,
    transitions,
)
from userswap.native import lib

ZERO, FILLING, CLEAN, UNPROTECTING, DIRTY, MOVING, LEAVING, DROPPING, STORED, POISONED = State

ALLOWED = {
    # A fault on what has no content; nothing else happens to it.
    ZERO: {FILLING},
    # Read or write; or given up, so that it is what it was; or lost.
    FILLING: {CLEAN, DIRTY, ZERO, STORED, POISONED},
    # Written; moved out all the same; dropped.
    CLEAN: {UNPROTECTING, MOVING, DROPPING},
    UNPROTECTING: {DIRTY, CLEAN},
    # Never to CLEAN: that arises only by installing with write protection.
    DIRTY: {UNPROTECTING, MOVING, DROPPING},
    # Out; refused; there was nothing.
    MOVING: {LEAVING, DIRTY, ZERO},
    # Rescued; stored; discarded.
    LEAVING: {FILLING, STORED, ZERO},
    # Dropped; discarded; or the agent could not drop it.
    DROPPING: {STORED, ZERO, CLEAN, DIRTY},
    STORED: {FILLING, ZERO},
    # Only a discard ends it.
    POISONED: {DROPPING},
}


def test_the_native_table_is_the_documented_one() -> None:
    assert transitions() == {state: frozenset(next_) for state, next_ in ALLOWED.items()}
    assert lib.us_transitions_from(len(State)) == 0


def test_what_the_table_must_never_allow() -> None:
    table = transitions()
    # Memory is given up only after the store has it, and by one who has won the word.
    assert not any(STORED in table[state] for state in (CLEAN, DIRTY, UNPROTECTING, MOVING, ZERO))
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
    return -(-count // SLOTS_PER_TABLE_PAGE) * SLOTS_PER_TABLE_PAGE


COUNTS = st.integers(1, 40 * SLOTS_PER_TABLE_PAGE)


@given(st.lists(st.tuples(st.booleans(), COUNTS, st.integers(0, 99)), max_size=80))
def test_extents_never_overlap_and_come_back(steps: list[tuple[bool, int, int]]) -> None:
    slots = 64 * SLOTS_PER_TABLE_PAGE
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
            assert first % SLOTS_PER_TABLE_PAGE == 0
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
    assert extents.allocate(1) == SLOTS_PER_TABLE_PAGE
