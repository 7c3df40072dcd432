"""Clients for the tests that stop and end processes, each function in one of its own (proof.py)."""

from __future__ import annotations

import os
import random
import sys
import threading
import time

from exercise import PAGE, Region, Writers, address_of, expect
from proof import SLOW
from rawcalls import in_memory
from scenarios import LEAST, MIB, copy_out, fill, stamp
from userswap.engine.cli import main


def foreign_thread() -> int:
    """The one thread of this process that Python does not know: the agent."""
    known = {thread.native_id for thread in threading.enumerate()}
    found = {int(name) for name in os.listdir("/proc/self/task")} - known
    expect(len(found) == 1, f"{len(found)} threads could be the agent")
    return found.pop()


def read_for_ever(
    *, seed: int, store: str, path: str = "native", death: str = "abort", sleeps: bool = False
) -> None:
    """Read pages that come and go, with the interpreter lock held; what is wrong ends the process.

    `sleeps`: touch nothing after the start.
    """
    choice = random.Random(seed)
    with Region(
        4 * MIB, resident=LEAST, store=store, fault_path=path, on_pager_death=death
    ) as region:
        fill(region)
        print("ready", region.stats().pager_pid, foreign_thread(), flush=True)
        turn = 0
        while sleeps:
            time.sleep(1)
        while True:
            page = choice.randrange(region.size // PAGE)
            found = region.memory[page * PAGE + 8 : page * PAGE + 16]
            expect(found == stamp(page, 0)[:8], f"page {page} holds {found.hex()}")
            turn += 1
            if turn % 64 == 0:
                print("turn", turn, flush=True)


def count_for_ever(*, seed: int, store: str, path: str = "native") -> None:
    """Count, until the report file appears or a signal comes."""
    with Region(4 * MIB, resident=LEAST, store=store, fault_path=path) as region:
        writers = Writers(region, seed=seed, steps=1 << 40, threads=2, burst=4).start()
        print("ready", region.stats().pager_pid, foreign_thread(), flush=True)
        stop = os.environ["USERSWAP_TEST_REPORT"]
        try:
            while not os.path.exists(stop):
                writers.watch(0.05)
        finally:
            writers.stop()
            print("counted", writers.finish(), region.stats().lost_pages, flush=True)


def keep_a_budget(*, seed: int, seconds: float) -> None:
    """Count for so long, and be within the budget at the end."""
    with Region(4 * MIB, resident=LEAST, store="ram:lz4") as region:
        writers = Writers(region, seed=seed, steps=1 << 40, threads=1).start()
        print("ready", region.stats().pager_pid, foreign_thread(), flush=True)
        before, most = writers.done, 0.0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            writers.watch(0.02)
            most = max(most, region.stats().resident_bytes / LEAST)
        writers.stop()
        print("steps", writers.finish() - before, flush=True)
        region.resize_resident(LEAST)
        expect(most > 1, "it was never over its budget")
        print("was at", round(most, 2), flush=True)


def measure_beside_a_blocked_store(*, hog: str, beside: str) -> None:
    """Faults do not wait for another region's store, nor what memory answers for the
    interpreter."""
    with (
        Region(4 * MIB, resident=LEAST, store=hog, prefetch="none", name="awaited") as awaited,
        Region(4 * MIB, resident=LEAST, store=beside, prefetch="none", name="native") as native,
    ):
        fill(awaited)
        fill(native)
        stop = threading.Event()

        def hold_up() -> None:
            while not stop.is_set():
                copy_out(awaited, choice.randrange(awaited.size // PAGE))

        choice = random.Random(1)
        holder = threading.Thread(target=hold_up, daemon=True)
        holder.start()
        waits = []
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            page = choice.randrange(native.size // PAGE)
            start = time.monotonic()
            found = copy_out(native, page)
            waits.append(time.monotonic() - start)
            expect(found == stamp(page, 0), f"page {page} is lost")
        stop.set()
        holder.join(30 * SLOW)
        waits.sort()
        long = sum(wait > 0.05 for wait in waits)
        print(f"{len(waits)} faults, median {waits[len(waits) // 2] * 1e6:.0f} us,", end=" ")
        print(f"longest {waits[-1] * 1e3:.1f} ms, {long} above 50 ms", flush=True)
        expect(len(waits) > 1000, f"only {len(waits)} faults were served")
        expect(long <= len(waits) // 200, f"{long} of {len(waits)} faults waited for the loop")


def fault_steadily(*, seed: int, store: str) -> None:
    """A stream of faults through the asyncio loop: requests have their turn all the same."""
    with Region(4 * MIB, resident=LEAST, store=store, fault_path="asyncio") as region:
        writers = Writers(region, seed=seed, steps=1 << 40, threads=3).start()
        print("ready", region.stats().pager_pid, foreign_thread(), flush=True)
        waits = []
        for _ in range(40):
            start = time.monotonic()
            region.stats()
            waits.append(time.monotonic() - start)
            writers.watch(0.03)
        writers.stop()
        writers.finish()
        print(f"answers took up to {max(waits) * 1e3:.0f} ms", flush=True)
        expect(max(waits) < 1.0 * SLOW, f"an answer took {max(waits):.1f} s")


def live_in_a_group(*, size: int, resident: int) -> None:
    """Wait to be moved into a control group, then page more than it allows."""
    print("ready", flush=True)
    sys.stdin.readline()
    with Region(size, resident=resident, store="ram:lz4") as region:
        for turn in range(2):
            for page in range(size // PAGE):
                start = page * PAGE
                wanted = stamp(page, turn - 1) if turn else bytes(PAGE)
                expect(region.memory[start : start + PAGE] == wanted, f"page {page} is lost")
                region.memory[start : start + PAGE] = stamp(page, turn)
        present = sum(in_memory(address_of(region), size // PAGE))
        expect(present * PAGE <= resident, f"{present} pages are in memory")
        print("paged", size // PAGE, flush=True)


def demonstrate(*, size: str) -> None:
    """`userswap demo`."""
    sys.exit(main(["demo", "--size", size]))
