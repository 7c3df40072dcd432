"""Clients of test_restart.py, each function in a process of its own (proof.py)."""

from __future__ import annotations

import json
import random
import sys

from exercise import PAGE, Region, expect
from scenarios import LEAST, copy_out, stored_pages

SIZE = 640 * PAGE
NAMES = ("one", "two")


def noise(name: str, page: int) -> bytes:
    """What a page of a region holds: nobody else's is like it, and no codec changes it."""
    return random.Random(f"{name} {page}").randbytes(PAGE)


def page_and_wait(*, url: str) -> None:
    """Two regions on one store, most of them out; then wait for an end."""
    with (
        Region(SIZE, resident=LEAST, store=url, name="one", prefetch="none") as one,
        Region(SIZE, resident=LEAST, store=url, name="two", prefetch="none") as two,
    ):
        for region in (one, two):
            for page in range(SIZE // PAGE):
                region.memory[page * PAGE : (page + 1) * PAGE] = noise(region.name, page)
        for region in (one, two):
            region.flush()
        stored = {region.name: stored_pages(region) for region in (one, two)}
        print("stored", json.dumps(stored), flush=True)
        print("pager", one.stats().pager_pid, flush=True)
        sys.stdin.read()


def page_anew(*, url: str) -> None:
    """Another region there: zeros at first, whatever was there before, and then what it wrote."""
    with Region(SIZE, resident=LEAST, store=url, name="new") as region:
        region.prefetch(0, SIZE)
        for page in range(SIZE // PAGE):
            expect(not any(copy_out(region, page)), f"page {page} is somebody else's")
            region.memory[page * PAGE : (page + 1) * PAGE] = noise("new", page)
        for page in range(SIZE // PAGE):
            expect(copy_out(region, page) == noise("new", page), f"page {page} is lost")
