"""`trial:` is a store for tests: it fails, waits, reorders and blocks as its options say.

The pager is another process, so a test cannot hand it an object: this module is found through an
entry point, as a third party's would be (see `proof.Child`).

    fail=N        the N-th call fails, counted over the operations that `on` names
    on, how       which operations (read, write, discard, flush or any), and with which error
    sticky        every later one fails too
    lost          a page that can never be read
    flip          the N-th page that is written in a run of eight or more has one wrong bit since
    read_delay, write_delay
                  each call takes a random share of that time: a write lands late, a read returns
                  what was there when it began. Later calls overtake earlier ones.
    block, until  each read stops its thread until a file appears, in one of three ways: sleep,
                  spin (keep the interpreter busy), collect (garbage, without a break)
    strict        two operations on one page at a time, of which one writes, end the pager
    report        a file that gets one line of JSON about every failure, and one at the end

The volume's own pages, and whatever comes before the first write of another page, are not on trial.
Pages are counted from the volume's first.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import (
    PAGES_MAX,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreFailedError,
    StoreFullError,
    TransientError,
    pages_of,
)

NAME = "trial"
PAGE = 4096
OPERATIONS = ("read", "write", "discard", "flush")
FIRST = 4232
"""The first page that a volume hands out on a store of PAGES_MAX pages."""
FAILURES = ("transient", "full", "lost", "failed", "bug")


class TrialStore(Store):
    """A dict of pages behind a trial."""

    durable = False
    page_size = PAGE

    def __init__(self, layer: LayerSpec, page_count: int) -> None:
        options = Options(layer)
        self.page_count = page_count
        self._fail = options.integer("fail", 0, low=0, high=1 << 40)
        self._on = options.choice("on", "any", (*OPERATIONS, "any"))
        self._how = options.choice("how", "transient", FAILURES)
        self._sticky = options.boolean("sticky", False)
        self._lost = options.integer("lost", -1, low=0, high=page_count - 1)
        self._flip = options.integer("flip", 0, low=0, high=1 << 40)
        self._flipped = -1
        self._read_delay = options.duration("read_delay", 0.0)
        self._write_delay = options.duration("write_delay", 0.0)
        self._rare = options.integer("rare", 1, low=1, high=1 << 20)
        self._until = options.text("until", "")
        self._how_blocked = options.choice("block", "sleep", ("sleep", "spin", "collect"))
        self._strict = options.boolean("strict", False)
        self._report = options.text("report", "")
        self._random = random.Random(options.integer("seed", 1, low=0, high=1 << 40))
        options.finish()
        self._pages: dict[int, bytes] = {}
        self._calls: Counter[str] = Counter()
        self._reading: Counter[int] = Counter()
        self._changing: set[int] = set()
        self._armed = False

    async def read(self, runs: Sequence[Run]) -> None:
        pages = [page for run in runs for page in pages_of(self, run)]
        with self._alone(pages, changing=False):
            self._count("read", pages)
            self._block(pages)
            if self._lost >= 0 and self._lost + FIRST in pages:
                raise PageLostError("is lost", store=NAME, page=self._lost)
            content = [self._content(page) for page in pages]
            await self._wait(self._read_delay)
            for run in runs:
                length = len(pages_of(self, run))
                run.buffer.cast("B")[:] = b"".join(content[:length])
                del content[:length]

    async def write(self, runs: Sequence[Run]) -> None:
        pages = [page for run in runs for page in pages_of(self, run)]
        with self._alone(pages, changing=True):
            self._count("write", pages)
            content = b"".join(bytes(run.buffer) for run in runs)
            await self._wait(self._write_delay)
            for run in runs:
                written = pages_of(self, run)
                if len(written) >= 8:
                    if 0 < self._flip <= len(written):
                        self._flipped = written[self._flip - 1]
                    self._flip -= len(written)
            for place, page in enumerate(pages):
                self._pages[page] = content[place * PAGE : (place + 1) * PAGE]

    async def discard(self, index: int, count: int) -> None:
        pages = list(range(index, index + count))
        with self._alone(pages, changing=True):
            self._count("discard", pages)
            await self._wait(self._write_delay)
            for page in pages:
                self._pages.pop(page, None)

    async def flush(self) -> None:
        self._count("flush", [])

    async def aclose(self) -> None:
        self._tell(calls=dict(self._calls))
        self._pages.clear()

    def _content(self, page: int) -> bytes:
        found = bytearray(self._pages.get(page, bytes(PAGE)))
        if page == self._flipped and page in self._pages:
            found[PAGE // 3] ^= 4
        return bytes(found)

    def _count(self, operation: str, pages: list[int]) -> None:
        self._armed = self._armed or (operation == "write" and pages[0] >= FIRST)
        if not self._armed or self._on not in (operation, "any"):
            return
        self._calls[self._on] += 1
        number = self._calls[self._on]
        if number == self._fail or (self._sticky and 0 < self._fail < number):
            self._tell(failed=operation, pages=pages)
            self._raise(pages)

    def _raise(self, pages: list[int]) -> None:
        page = pages[0] if pages else None
        if self._how == "transient":
            raise TransientError("is not in the mood", store=NAME, page=page)
        if self._how == "full":
            raise StoreFullError("has no room", store=NAME, page=page)
        if self._how == "lost":
            raise PageLostError("is lost", store=NAME, page=page)
        if self._how == "failed":
            raise StoreFailedError("has failed", store=NAME, page=page)
        raise RuntimeError("a bug of the store")

    def _block(self, pages: list[int]) -> None:
        if not self._until or not self._armed or pages[0] < FIRST:
            return
        self._tell(blocked=pages)
        while not os.path.exists(self._until):
            if self._how_blocked == "sleep":
                time.sleep(0.05)
            elif self._how_blocked == "spin":
                until = time.monotonic() + 0.2
                while time.monotonic() < until:
                    pass
            else:
                rings: list[list[object]] = [[] for _ in range(300_000)]
                for ring in rings:
                    ring.append(ring)
                del rings
                gc.collect()

    async def _wait(self, delay: float) -> None:
        if delay and self._random.randrange(self._rare) == 0:
            await asyncio.sleep(delay)

    @contextmanager
    def _alone(self, pages: list[int], *, changing: bool) -> Iterator[None]:
        """Holds the engine to the contract: no page has two operations of which one changes it."""
        if self._strict:
            for page in pages:
                if page in self._changing or (changing and self._reading[page]):
                    sys.stderr.write(f"trial: two operations at once on page {page}\n")
                    os._exit(70)
            if changing:
                self._changing.update(pages)
            else:
                self._reading.update(pages)
        try:
            yield
        finally:
            if changing:
                self._changing.difference_update(pages)
            else:
                self._reading.subtract(pages)

    def _tell(self, **what: object) -> None:
        if self._report:
            with open(self._report, "a", encoding="ascii") as file:
                file.write(json.dumps(what) + "\n")


def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    return TrialStore(layer, geometry.page_count or PAGES_MAX)
