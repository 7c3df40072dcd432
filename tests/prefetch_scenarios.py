"""Prefetches beside faults and evictions, each function in a process of its own (proof.py)."""

from __future__ import annotations

import asyncio
import ctypes
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from exercise import PAGE, Region, address_of, expect
from scenarios import MIB, copy_out, fill, stamp, stored_pages
from userswap.backends.memory import MemoryStore
from userswap.backends.store import Run
from userswap.engine.policies.prefetch import names


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
                time.sleep(0.01)  # faster than pages leave, a fault would wait for room, and for us
            region.resize_resident(8 * MIB)
            region.prefetch(pages[0] * PAGE, PAGE)
            expect(region.stats().staging_bytes > 0, "what was on its way out has arrived")
            expect(pages[0] not in stored_pages(region), "the page did not come")
            held.unlink()


def by_every_policy(*, store: str, seed: int) -> None:
    """Whatever a policy names, the pages are the ones that were written."""
    draw = random.Random(seed)
    for policy in names():
        with Region(5 * MIB // 2, resident=5 * MIB // 4, store=store, prefetch=policy) as region:
            pages = list(range(region.size // PAGE))
            versions = dict.fromkeys(pages, 0)
            fill(region)
            irregular = draw.sample(pages, len(pages))
            for order in (pages, irregular, irregular, pages[::-3]):
                for page in order:
                    found = bytes(region.memory[page * PAGE : (page + 1) * PAGE])
                    expect(found == stamp(page, versions[page]), f"{policy}: page {page} is wrong")
                    if draw.random() < 0.1:
                        versions[page] += 1
                        region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, versions[page])
            read = region.stats().readahead_pages
            expect((read > 0) == (policy not in ("none", "replay")), f"{policy} read {read} ahead")


def beside_regions_whose_store_hangs() -> None:
    """They have more on its way out than there are batches for; another region pages on."""
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "held"
        store = Held(held)
        hanging = [Region(12 * MIB, resident=8 * MIB, store=store) for _ in range(9)]
        with Region(8 * MIB, resident=2 * MIB, store="memory:") as region:
            fill(region)
            held.touch()
            threads = []
            for other in hanging:  # memset, unlike the interpreter, lets others run while it waits
                job = (address_of(other), 1, other.size)
                threads.append(threading.Thread(target=ctypes.memset, args=job, daemon=True))
                threads[-1].start()
            while not all(other.stats().faults["parked"] for other in hanging):
                time.sleep(0.02)
            for version in (1, 2):
                fill(region, version)
                for page in range(region.size // PAGE):
                    expect(copy_out(region, page) == stamp(page, version), f"page {page} is lost")
            expect(all(thread.is_alive() for thread in threads), "the store did not hang")
            held.unlink()
            for thread in threads:
                thread.join()
        for other in hanging:
            expect(set(other.memory[:: 64 * PAGE]) == {1}, "pages are lost")
            other.close()
