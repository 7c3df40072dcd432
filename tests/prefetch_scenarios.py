"""Prefetches beside faults and evictions, each function in a process of its own (proof.py)."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from exercise import PAGE, Region, expect
from scenarios import MIB, copy_out, fill, stored_pages
from userswap.backends.memory import MemoryStore
from userswap.backends.store import Run


def beside_faults() -> None:
    """Others fault all the time, and each of their reads takes long."""
    store = "trial:?read_delay=300ms&strict=on"
    with Region(8 * MIB, resident=6 * MIB, store=store, prefetch="none") as region:
        fill(region)
        region.flush()
        pages = stored_pages(region)
        threads, turns = [], 8

        def touch(mine: list[int]) -> None:
            for page in mine:
                copy_out(region, page)

        for number in range(3):
            mine = pages[number * turns : (number + 1) * turns]
            threads.append(threading.Thread(target=touch, args=[mine], daemon=True))
            threads[-1].start()
            time.sleep(0.1)
        region.prefetch(pages[40] * PAGE, PAGE)
        expect(all(thread.is_alive() for thread in threads), "it waited for the others' pages")
        expect(pages[40] not in stored_pages(region), "the page did not come")
        for thread in threads:
            thread.join(10)


class Held(MemoryStore):
    """Writes wait for as long as a file is there."""

    def __init__(self, held: Path) -> None:
        super().__init__(1 << 16)
        self._held = held

    async def write(self, runs: Sequence[Run]) -> None:
        while self._held.exists():  # noqa: ASYNC110 - another process makes and removes it
            await asyncio.sleep(0.01)
        await super().write(runs)


def beside_evictions() -> None:
    """Pages are on their way to a store that does not take them yet."""
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "held"
        with Region(8 * MIB, resident=6 * MIB, store=Held(held), prefetch="none") as region:
            fill(region)
            region.flush()
            pages = stored_pages(region)
            held.touch()
            while not region.stats().staging_bytes:
                region.memory[pages.pop() * PAGE] = 1
            region.resize_resident(8 * MIB)
            region.prefetch(pages[0] * PAGE, PAGE)
            expect(region.stats().staging_bytes > 0, "what was on its way out has arrived")
            expect(pages[0] not in stored_pages(region), "the page did not come")
            held.unlink()
