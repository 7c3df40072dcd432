"""Prefetches beside faults and evictions, each function in a process of its own (proof.py)."""

from __future__ import annotations

import threading
import time

from exercise import PAGE, Region, expect
from scenarios import MIB, copy_out, fill, stored_pages


def beside_faults() -> None:
    """Others fault all the time, and each of their reads takes long."""
    store = "trial:?read_delay=300ms&strict=on"
    with Region(8 * MIB, resident=6 * MIB, store=store, prefetch="none") as region:
        fill(region)
        region.flush()
        pages = stored_pages(region)
        threads, turns = [], 6

        def touch(mine: list[int]) -> None:
            for page in mine:
                copy_out(region, page)

        for number in range(3):
            mine = pages[number * turns : (number + 1) * turns]
            threads.append(threading.Thread(target=touch, args=[mine], daemon=True))
            threads[-1].start()
            time.sleep(0.1)
        start = time.monotonic()
        region.prefetch(pages[40] * PAGE, PAGE)
        took = time.monotonic() - start
        expect(0.2 < took < 0.9, f"the prefetch of one page took {took:.2f} s")
        expect(pages[40] not in stored_pages(region), "the page did not come")
        for thread in threads:
            thread.join(10)


def beside_evictions() -> None:
    """Pages are on their way to a store that takes its time."""
    store = "trial:?write_delay=1500ms&strict=on"
    with Region(8 * MIB, resident=6 * MIB, store=store, prefetch="none") as region:
        fill(region)
        region.flush()
        pages = stored_pages(region)
        while not region.stats().staging_bytes:
            page = pages.pop()
            region.memory[page * PAGE] = 1
        start = time.monotonic()
        region.prefetch(pages[0] * PAGE, PAGE)
        took = time.monotonic() - start
        expect(took < 0.7, f"the prefetch of one page took {took:.2f} s")
        expect(pages[0] not in stored_pages(region), "the page did not come")
