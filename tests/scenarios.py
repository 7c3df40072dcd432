"""What the loss tests do with paged memory, each function in a process of its own (proof.py)."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from typing import Any

import userswap
from exercise import PAGE, Region, Writers, address_of, expect, fail
from proof import SLOW, STUCK, fewer
from rawcalls import in_memory

MIB = 1 << 20
LEAST = 352 * PAGE
"""A budget that holds with the threads of these scenarios."""


def stamp(page: int, version: int) -> bytes:
    """What a page holds: of its own in every 8 bytes, and never zeros."""
    return (page << 32 | version << 1 | 1).to_bytes(8, "little") * (PAGE // 8)


def fill(region: userswap.Region, version: int = 0) -> None:
    for page in range(region.size // PAGE):
        region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, version)


def copy_out(region: userswap.Region, page: int) -> bytes:
    """A page's content by way of a system call, which reads it without the interpreter lock."""
    memfd = os.memfd_create("copy")
    try:
        os.pwrite(memfd, region.memory[page * PAGE : (page + 1) * PAGE], 0)
        return os.pread(memfd, PAGE, 0)
    finally:
        os.close(memfd)


def stored_pages(region: userswap.Region, first: int = 0) -> list[int]:
    """Pages that are not in memory, at least some."""
    present = in_memory(address_of(region), region.size // PAGE)
    absent = [page for page, here in enumerate(present) if page >= first and not here]
    expect(bool(absent), "nothing was evicted")
    return absent


def count(
    *,
    seed: int,
    store: str,
    path: str = "native",
    size: int = 6 * MIB,
    resident: int = 2 * MIB,
    steps: int,
    **how: Any,
) -> None:
    """Threads increment counters in pages that come and go: not one may be lost."""
    with Region(size, resident=resident, store=store, fault_path=path) as region:
        done = Writers(region, seed=seed, steps=steps, **how).start().finish()
        stats = region.stats()
        expect(stats.evicted_pages + stats.dropped_pages > 0, "nothing was evicted")
        expect(stats.lost_pages == 0, "pages were lost")
        print(f"{done} steps, {stats.evicted_pages} moved, {stats.dropped_pages} dropped,", end=" ")
        print(stats.faults)


def touch_with_the_lock(*, seed: int, store: str, path: str) -> None:
    """Pure Python touches from several threads: each sleeps in its fault with the lock held."""
    with Region(4 * MIB, resident=LEAST, store=store, fault_path=path) as region:
        fill(region)
        pages = region.size // PAGE
        turns = [0] * 4

        def touch(number: int) -> None:
            choice = random.Random(seed + number)
            mine = range(number, pages, len(turns))
            version = dict.fromkeys(mine, 0)
            memory = region.memory
            for turn in range(700):
                page = choice.choice(mine)
                start = page * PAGE
                if memory[start + 8 : start + 16] != stamp(page, version[page])[:8]:
                    expect(False, f"lost in page {page}")
                version[page] = turn
                memory[start : start + PAGE] = stamp(page, turn)
                turns[number] += 1
                if turn % 100 == 0:
                    gc.collect()

        threads = [
            threading.Thread(target=touch, args=(n,), daemon=True) for n in range(len(turns))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30 * SLOW)
        expect(sum(turns) == 700 * len(turns), f"only {turns} turns")


def discard_what_is_on_its_way(*, store: str, ahead: bool) -> None:
    """A page is discarded while its content comes from the store: zeros, and nobody sleeps on."""
    with Region(4 * MIB, resident=LEAST, store=store, prefetch="none") as region:
        fill(region)
        region.flush()
        pages = stored_pages(region)[:6]
        for page in pages[:4]:
            start = page * PAGE

            def touch(start: int = start) -> None:
                if ahead:
                    region.prefetch(start, PAGE)
                else:  # this sleeps in its fault without the interpreter lock
                    copy_out(region, start // PAGE)

            toucher = threading.Thread(target=touch, daemon=True)
            toucher.start()
            time.sleep(0.05)
            region.discard(start, PAGE)
            toucher.join(3 * SLOW)
            if toucher.is_alive():
                fail(STUCK, f"who waited for page {page} sleeps on after its discard")
            expect(copy_out(region, page) == bytes(PAGE), f"page {page} came back")
            time.sleep(0.2)
            expect(copy_out(region, page) == bytes(PAGE), f"page {page} came back late")
            region.memory[start : start + PAGE] = stamp(page, 9)
        for page in pages:
            version = 9 if page in pages[:4] else 0
            expect(copy_out(region, page) == stamp(page, version), f"page {page} is lost")


def change_the_budget(*, seed: int, store: str, path: str) -> None:
    """The budget shrinks and grows while threads write; each new one holds."""
    with Region(8 * MIB, resident=4 * MIB, store=store, fault_path=path) as region:
        writers = Writers(region, seed=seed, steps=1 << 40, threads=2, burst=8).start()
        choice = random.Random(seed)
        for _ in range(12):
            writers.watch(0.08)
            budget = choice.randrange(LEAST // PAGE, 4 * MIB // PAGE) * PAGE
            region.resize_resident(budget)
            stats = region.stats()
            expect(stats.resident_limit == budget, f"{stats.resident_limit} is not {budget}")
        writers.stop()
        print(f"{writers.finish()} steps")


def writers_in_a_signal_storm(*, seed: int, store: str, path: str, steps: int = 20_000) -> None:
    """SIGALRM every millisecond, in threads that fault and in system calls that do."""
    alarms = [0]

    def alarmed(number: int, frame: object) -> None:
        alarms[0] += 1

    signal.signal(signal.SIGALRM, alarmed)
    with Region(6 * MIB, resident=LEAST, store=store, fault_path=path) as region:
        half = region.size // PAGE // 2
        for page in range(half, 2 * half):
            region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, 0)
        writers = Writers(region, seed=seed, steps=steps, threads=2, pages=half).start()
        choice = random.Random(seed)
        signal.setitimer(signal.ITIMER_REAL, 0.001 * SLOW, 0.001 * SLOW)
        turns = 0
        while writers.alive():
            for thread in writers.threads:
                with contextlib.suppress(ProcessLookupError):
                    signal.pthread_kill(thread.ident or 0, signal.SIGALRM)
            page = choice.randrange(half, 2 * half)
            expect(copy_out(region, page) == stamp(page, 0), f"page {page} is lost")
            turns += 1
            writers.look()
        writers.finish()
        signal.setitimer(signal.ITIMER_REAL, 0)
        expect(alarms[0] > 20, f"only {alarms[0]} signals")
        print(f"{turns} system calls, {alarms[0]} signals")


def discard_under_eviction(*, seed: int, store: str, turns: int) -> None:
    """Discard what is about to leave, and write it anew at once: what is new stays, and the budget
    counts what is in memory."""
    choice = random.Random(seed)
    pages = 2048
    version: dict[int, int | None] = dict.fromkeys(range(pages), 0)
    with Region(pages * PAGE, resident=LEAST, store=store, name="discards") as region:
        fill(region)
        for turn in range(1, fewer(turns, 20)):
            first = choice.randrange(pages - 256)
            for page in range(first, first + 256):  # it presses the evictor
                version[page] = turn
                region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, turn)
            start = first + choice.randrange(128)
            region.discard(start * PAGE, 128 * PAGE)
            for page in range(start, start + 128, 2):
                version[page] = -turn
                region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, pages + turn)
            version.update(dict.fromkeys(range(start + 1, start + 128, 2)))
        for page, wanted in version.items():
            found = copy_out(region, page)
            if wanted is None:
                expect(found == bytes(PAGE), f"page {page} holds {found[:8].hex()}, discarded")
            else:
                number = wanted if wanted >= 0 else pages - wanted
                expect(found == stamp(page, number), f"page {page} holds {found[:8].hex()}")
        _balance(region)


def touch_after_much_was_discarded(*, mover: str) -> None:
    """What was discarded without ever being pressed costs no fault a wait: each entry that it left
    in the queue is passed over at once."""
    pages, chunk = 160_000, 2048
    with Region(2 * pages * PAGE, resident=16 * MIB, store="ram:lz4", mover=mover) as region:
        for first in range(0, pages, chunk):
            for page in range(first, first + chunk):
                region.memory[page * PAGE] = 1
            region.discard(first * PAGE, chunk * PAGE)
        worst = 0.0
        for page in range(pages + chunk, pages + 5 * chunk):
            since = time.monotonic()
            region.memory[page * PAGE] = 1
            worst = max(worst, time.monotonic() - since)
        expect(region.stats().faults["parked"] > 0, "no fault waited for room")
        expect(worst < 0.8, f"a fault took {worst:.2f} s")


def _balance(region: userswap.Region) -> None:
    """Once nothing is under way, what is counted as resident is what is resident."""
    here = ("CLEAN", "DIRTY", "PROTECTED")
    for _ in range(200):
        stats = region.stats()
        resident = sum(stats.pages[s] for s in here) * PAGE
        still = sum(stats.pages[s] for s in (*here, "ZERO", "STORED"))
        if still * PAGE == region.size and stats.resident_bytes == resident:
            return
        time.sleep(0.02)
    fail(1, f"{resident} bytes are resident, and {stats.resident_bytes} counted: {stats.pages}")


def model(*, seed: int, store: str, path: str, turns: int) -> None:
    """Random touches, discards, budgets and prefetches, beside threads that count."""
    choice = random.Random(seed)
    pages = 768
    expected: dict[int, bytes] = {}
    history: list[str] = []
    with Region(
        2 * pages * PAGE, resident=LEAST, store=store, fault_path=path, name="model"
    ) as region:
        beside = Writers(region, seed=seed, steps=1 << 40, threads=1, first=pages).start()

        def verify(first: int, length: int) -> None:
            for page in range(first, first + length):
                found = bytes(region.memory[page * PAGE : (page + 1) * PAGE])
                if found != expected.get(page, bytes(PAGE)):
                    print("\n".join(history[-30:]))
                    expect(False, f"page {page} holds {found[:8].hex()} after turn {turn}")

        for turn in range(fewer(turns)):
            first = choice.randrange(pages)
            length = min(choice.choice((1, 1, 2, 8, 40)), pages - first)
            what = choice.choice(("write", "write", "read", "read", "discard", "prefetch", "rest"))
            history.append(f"{turn}: {what} {first}+{length}")
            start, end = first * PAGE, (first + length) * PAGE
            if what == "write":
                for page in range(first, first + length):
                    expected[page] = stamp(page, turn)
                region.memory[start:end] = b"".join(
                    stamp(p, turn) for p in range(first, first + length)
                )
            elif what == "read":
                verify(first, length)
            elif what == "discard":
                region.discard(start, end - start)
                for page in range(first, first + length):
                    expected.pop(page, None)
                verify(first, min(length, 2))
            elif what == "prefetch":
                region.prefetch(start, end - start)
            elif turn % 8 == 0:
                region.resize_resident(choice.randrange(LEAST // PAGE, 2 * LEAST // PAGE) * PAGE)
            elif turn % 8 == 1:
                region.flush()
            if turn % 16 == 0:
                beside.watch(0.0)
                beside.look()
        verify(0, pages)
        beside.stop()
        beside.finish()
        stats = region.stats()
        expect(stats.lost_pages == 0, "pages were lost")
        print(stats.faults, stats.evicted_pages, stats.dropped_pages, beside.done)
