"""Clients for the tests that stop and end processes, each function in one of its own (proof.py)."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path

from exercise import PAGE, Region, Writers, address_of, expect
from proof import SLOW, soon
from rawcalls import in_memory
from scenarios import LEAST, MIB, copy_out, fill, stamp, stored_pages
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


def fault_beside_a_blocked_store(*, how: str, beside: str, faults: int) -> None:
    """While a read of one region's store does not end, another region's faults are served."""
    report = os.environ["USERSWAP_TEST_REPORT"]
    end = Path(f"{report}.end")
    url = f"trial:?block={how}&until={end}&report={report}"
    with (
        Region(4 * MIB, resident=LEAST, store=url, prefetch="none", name="blocked") as blocked,
        Region(4 * MIB, resident=LEAST, store=beside, prefetch="none", name="served") as served,
    ):
        fill(blocked)
        fill(served)
        page, found = stored_pages(blocked)[0], list[bytes]()
        reader = threading.Thread(target=lambda: found.append(copy_out(blocked, page)), daemon=True)
        reader.start()
        expect(soon(lambda: "blocked" in _read(report), 20), "the store was never asked")
        choice, turns = random.Random(1), 0
        before = _faults(served)
        while _faults(served) - before < faults:
            for other in choice.sample(range(served.size // PAGE), 64):
                expect(copy_out(served, other) == stamp(other, 0), f"page {other} is lost")
            turns += 64
        expect(reader.is_alive() and not found, "the store's read has ended")
        end.touch()
        reader.join(20 * SLOW)
        expect(found == [stamp(page, 0)], f"page {page} did not come")
        print(f"{faults} faults of {turns} reads, {how} beside {beside}")


def _faults(region: Region) -> int:
    stats = region.stats()
    return stats.faults_native + stats.faults_awaited


def _read(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


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
        expect(max(waits) < 20 * SLOW, f"an answer took {max(waits):.1f} s")


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
