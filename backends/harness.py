"""What the conformance suite opens stores with, and how it is run without a test framework.

Responsible for: fresh media, opening them again, a process that is killed while it writes, and
stores that fail under filters. Must not know: what is checked; pytest.

A URL may hold `{dir}`, which becomes an empty directory, and `{name}`, which becomes a word that
nobody else uses: each fresh medium gets its own. `Harness` opens what a URL names; whoever opens
stores in another way overrides `open_at`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from userswap.backends.registry import open_stack, parse
from userswap.backends.store import (
    PAGE_SIZE,
    PAGE_SIZE_MAX,
    Geometry,
    Run,
    Store,
    StoreError,
    TransientError,
)

PAGES = 600
PAGE_SIZES = (PAGE_SIZE, 65536, PAGE_SIZE_MAX)
SAFE_PAGES = 64
"""Written and flushed by the process that is then killed."""
CHILD_SECONDS = 30
CHECK_SECONDS = 120


class ConformanceError(AssertionError):
    """A store does not keep the contract; the message says in what."""


class NotApplicableError(Exception):
    """A check that says nothing about this store; the message says why."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise ConformanceError(message)


def content(seed: int, index: int, page_size: int) -> bytes:
    """What a page shall hold: some noise and some zeros, the same in every process."""
    rng = random.Random(f"{seed} {index}")
    noise = rng.randbytes(rng.randrange(1, page_size + 1))
    return noise.ljust(page_size, b"\0")


async def read(store: Store, index: int, pages: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (pages * store.page_size))
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes | bytearray) -> None:
    await store.write([Run(index, memoryview(data))])


Check = Callable[["Harness"], Awaitable[None]]


class Harness:
    """Opens the stores of one check, and closes and removes what it leaves behind.

    `limited` is a URL of the same kind of store with room for some MiB at most. `forgets` tells of
    a store that keeps nothing, as `null:` does: every page reads as zeros.
    """

    def __init__(
        self,
        url: str,
        *,
        limited: str | None = None,
        page_sizes: Sequence[int] = PAGE_SIZES,
        forgets: bool = False,
        seed: int = 1,
    ) -> None:
        self.url = url
        self.limited = limited
        self.page_sizes = page_sizes
        self.forgets = forgets
        self.seed = seed
        self._place = ""
        self._media = 0
        self._folder = ""
        self._opened: list[Store] = []

    async def __aenter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="userswap-conformance-")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for store in self._opened:
            with contextlib.suppress(StoreError):
                await store.aclose()
        self._opened.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def geometry(self) -> Geometry:
        """What most checks ask for."""
        return Geometry(PAGES, self.page_sizes[0])

    async def open(self, geometry: Geometry | None = None) -> Store:
        """A store on a medium that was never used."""
        self._place = self.fresh(self.url)
        return await self.reopen(geometry)

    async def reopen(self, geometry: Geometry | None = None) -> Store:
        """A store on the medium of the last `open`."""
        return await self._keep(self.open_at(self._place, geometry or self.geometry))

    async def open_limited(self) -> Store:
        """A store that is soon full."""
        if self.limited is None:
            raise NotApplicableError("no limited store was named")
        place = self.fresh(self.limited)
        return await self._keep(self.open_at(place, Geometry(1 << 14, self.page_sizes[0])))

    async def open_over(self, wrap: Callable[[Store], Store]) -> Store:
        """Filters on a fresh medium, with something between them and the store."""
        if not parse(self.url).filters:
            raise NotApplicableError("there is no store under it")
        return await self._keep(open_stack(self.fresh(self.url), self.geometry, wrap=wrap))

    async def open_at(self, place: str, geometry: Geometry) -> Store:
        return await open_stack(place, geometry)

    def fresh(self, url: str) -> str:
        self._media += 1
        folder = Path(self._folder, str(self._media))
        folder.mkdir()
        return url.replace("{dir}", str(folder)).replace("{name}", f"userswap-{uuid4().hex}")

    async def _keep(self, opening: Awaitable[Store]) -> Store:
        store = await opening
        self._opened.append(store)
        return store

    def expected(self, data: bytes) -> bytes:
        """What reading gives where `data` was written."""
        return bytes(len(data)) if self.forgets else data

    def page(self, index: int, generation: int = 0) -> bytes:
        return content(self.seed + generation, index, self.page_sizes[0])

    async def write_and_kill(self) -> None:
        """Another process writes the first pages of the medium of the last `open`, flushes them,
        goes on with others, and is killed."""
        code = self.child_code(self._place, self.geometry)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env=_child_environment()
        )
        assert child.stdout is not None
        try:
            said = await asyncio.wait_for(child.stdout.readline(), CHILD_SECONDS)
            require(said == b"flushed\n", "a process that writes and flushes ended by an error")
            await asyncio.sleep(0.02)  # it is in the middle of other writes then
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    def child_code(self, place: str, geometry: Geometry) -> str:
        return (
            f"from {__name__} import Harness, write_until_killed\n"
            "from userswap.backends.store import Geometry\n"
            f"write_until_killed(Harness({place!r}), {geometry!r}, {self.seed})"
        )


def write_until_killed(harness: Harness, geometry: Geometry, seed: int) -> None:
    """The killed process's part; see `Harness.write_and_kill`."""

    async def work() -> None:
        store = await harness.open_at(harness.url, geometry)
        for index in range(SAFE_PAGES):
            await write(store, index, content(seed, index, store.page_size))
        await store.discard(SAFE_PAGES // 2, 4)
        await store.flush()
        print("flushed", flush=True)
        for round_ in range(1 << 30):
            index = SAFE_PAGES + round_ % (store.page_count - SAFE_PAGES)
            await write(store, index, content(seed, index, store.page_size))

    asyncio.run(work())


def _child_environment() -> dict[str, str]:
    """The child shall find what this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class FailingStore(Store):
    """Passes calls on, but for some that fail; `fails(n)` says whether the n-th one does."""

    def __init__(self, inner: Store, fails: Callable[[int], bool]) -> None:
        self.page_size, self.page_count = inner.page_size, inner.page_count
        self.durable, self.space = inner.durable, inner.space
        self.checked, self.encrypted = inner.checked, inner.encrypted
        self.calls = 0
        self.failed = 0
        self.fails = fails
        self._inner = inner

    def _count(self) -> None:
        self.calls += 1
        if self.fails(self.calls):
            self.failed += 1
            raise TransientError("fails because it was told to", store="failing")

    async def read(self, runs: Sequence[Run]) -> None:
        self._count()
        await self._inner.read(runs)

    async def write(self, runs: Sequence[Run]) -> None:
        self._count()
        await self._inner.write(runs)

    async def discard(self, index: int, count: int) -> None:
        self._count()
        await self._inner.discard(index, count)

    async def flush(self) -> None:
        self._count()
        await self._inner.flush()

    async def aclose(self) -> None:
        await self._inner.aclose()


async def perform(check: Check, harness: Harness) -> str:
    """Run one check: returns why it does not apply, or nothing where it passed. What is wrong is
    a ConformanceError, or whatever came out of the store."""
    try:
        async with harness:
            await asyncio.wait_for(check(harness), CHECK_SECONDS)
    except NotApplicableError as reason:
        return str(reason)
    except TimeoutError:
        raise ConformanceError(f"does not end within {CHECK_SECONDS} s") from None
    return ""


def run(
    check: Check,
    url: str,
    *,
    limited: str | None = None,
    page_sizes: Sequence[int] = PAGE_SIZES,
    forgets: bool = False,
    seed: int = 1,
) -> str:
    """`perform` for who has no event loop."""
    harness = Harness(url, limited=limited, page_sizes=page_sizes, forgets=forgets, seed=seed)
    return asyncio.run(perform(check, harness))


def against(url: str, *, limited: str | None = None) -> Callable[[Check], None]:
    """A test function that takes a check; a test framework calls it with each."""

    def test(check: Check) -> None:
        run(check, url, limited=limited)

    return test
