"""Stores that do not keep the contract, each wrong in one way: what the conformance suite is for.

`WRONG` names the check that has to catch each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from userswap.backends.harness import Harness
from userswap.backends.memory import MemoryStore
from userswap.backends.store import (
    Geometry,
    Run,
    Store,
    StoreError,
    StoreFullError,
    pages_of,
)


class NotBlank(MemoryStore):
    """Shows what was there before."""

    async def read(self, runs: Sequence[Run]) -> None:
        await super().read(runs)
        for run in runs:
            if not any(index in self._pages for index in pages_of(self, run)):
                run.buffer[:] = b"\xaa" * run.buffer.nbytes


class WritesOnce(MemoryStore):
    """Keeps the first content of a page for ever."""

    async def write(self, runs: Sequence[Run]) -> None:
        old = dict(self._pages)
        await super().write(runs)
        self._pages.update(old)


class ForgetsTails(MemoryStore):
    """Writes the first page of a run."""

    async def write(self, runs: Sequence[Run]) -> None:
        await super().write([Run(run.index, run.buffer[: self.page_size]) for run in runs])


class ReadsOneRun(MemoryStore):
    async def read(self, runs: Sequence[Run]) -> None:
        await super().read(runs[:1])


class KeepsAll(MemoryStore):
    """Discards nothing."""

    async def discard(self, index: int, count: int) -> None:
        self._check_open()


class WrapsRound(MemoryStore):
    """Takes the last page for the first."""

    async def write(self, runs: Sequence[Run]) -> None:
        await super().write(runs)
        if self.page_count - 1 in self._pages:
            self._pages[0] = self._pages[self.page_count - 1]


class AssertsNothing(MemoryStore):
    """Takes pages that it does not have."""

    async def write(self, runs: Sequence[Run]) -> None:
        self._check_open()
        for run in runs:
            self._pages[run.index] = bytes(run.buffer)


class SmallPages(MemoryStore):
    """Cuts off what is more than 4 KiB of a page."""

    async def write(self, runs: Sequence[Run]) -> None:
        await super().write(runs)
        for run in runs:
            for index in pages_of(self, run):
                self._pages[index] = self._pages[index][:4096].ljust(self.page_size, b"\0")


class OneAtATime(MemoryStore):
    """Mixes up operations that run at once."""

    async def write(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        await asyncio.sleep(0)
        await super().write(self._runs)


class Lazy(MemoryStore):
    """Copies a buffer when the next call comes."""

    _waiting: Sequence[Run] = ()

    async def read(self, runs: Sequence[Run]) -> None:
        await super().write(self._waiting)
        self._waiting = ()
        await super().read(runs)

    async def write(self, runs: Sequence[Run]) -> None:
        self._waiting = [*self._waiting, *runs]


class GoesOn(MemoryStore):
    """Does not notice that it was cancelled."""

    async def read(self, runs: Sequence[Run]) -> None:
        await asyncio.shield(self._read_later(runs))

    async def _read_later(self, runs: Sequence[Run]) -> None:
        await asyncio.sleep(0.001)
        await super().read(runs)


class NeverClosed(MemoryStore):
    def _check_open(self) -> None:
        pass


class Stumbles(MemoryStore):
    """Lets anything out when it is closed while it works."""

    async def read(self, runs: Sequence[Run]) -> None:
        self._check_open()
        await asyncio.sleep(0.001)
        if self._closed:
            raise RuntimeError("read of closed file")
        await super().read(runs)


class Evicts(MemoryStore):
    """Makes room by forgetting."""

    async def write(self, runs: Sequence[Run]) -> None:
        try:
            await super().write(runs)
        except StoreFullError:
            self._pages.pop(next(iter(self._pages)))
            raise


class Durable(MemoryStore):
    """Calls itself durable, and has what is in this process's memory."""

    durable = True
    media: dict[str, dict[int, bytes]] = {}  # noqa: RUF012
    users: set[str] = set()  # noqa: RUF012
    locks = True

    def put_on(self, place: str) -> None:
        if place in self.users and self.locks:
            raise StoreError("is in use", store="durable")
        self.place = place
        self.users.add(place)
        self._pages = self.media.setdefault(place, {})

    async def aclose(self) -> None:
        self.users.discard(self.place)
        self._closed = True


class Shared(Durable):
    locks = False


class Tired(MemoryStore):
    """Gets one page in hundred wrong."""

    _writes = 0

    async def write(self, runs: Sequence[Run]) -> None:
        await super().write(runs)
        self._writes += 1
        if self._writes % 100 == 0:
            self._pages[runs[0].index] = bytes(self.page_size)


class Hasty(MemoryStore):
    """Has at hand what a page was when it was last read."""

    def __init__(self, page_count: int, **options: Any) -> None:
        super().__init__(page_count, **options)
        self._seen: dict[int, bytes] = {}

    async def read(self, runs: Sequence[Run]) -> None:
        self._check_open()
        super().read_now(runs)
        for run in runs:
            for at, page in enumerate(pages_of(self, run)):
                start = at * self.page_size
                self._seen[page] = bytes(run.buffer[start : start + self.page_size])

    def read_now(self, runs: Sequence[Run]) -> bool:
        if not all(page in self._seen for run in runs for page in pages_of(self, run)):
            return False
        for run in runs:
            run.buffer[:] = b"".join(self._seen[page] for page in pages_of(self, run))
        return True


class Filter(Store):
    """Passes everything on; the base of filters that are wrong."""

    durable = False

    def __init__(self, inner: Store) -> None:
        self.page_size, self.page_count = inner.page_size, inner.page_count
        self.inner = inner

    async def read(self, runs: Sequence[Run]) -> None:
        await self.inner.read(runs)

    async def write(self, runs: Sequence[Run]) -> None:
        await self.inner.write(runs)

    async def discard(self, index: int, count: int) -> None:
        await self.inner.discard(index, count)

    async def flush(self) -> None:
        await self.inner.flush()

    async def aclose(self) -> None:
        await self.inner.aclose()


class Swallows(Filter):
    """Says nothing of a write that failed."""

    async def write(self, runs: Sequence[Run]) -> None:
        try:
            await self.inner.write(runs)
        except StoreError:
            return


class Half(Filter):
    """Leaves a page half old and half new when a write fails."""

    async def write(self, runs: Sequence[Run]) -> None:
        try:
            await self.inner.write(runs)
        except StoreError:
            half = bytes(runs[0].buffer[: self.page_size // 2]).ljust(self.page_size, b"\xff")
            await self.inner.write([Run(runs[0].index, memoryview(half))])
            raise


class Translates(Filter):
    """Lets another exception out."""

    async def flush(self) -> None:
        try:
            await self.inner.flush()
        except StoreError as error:
            raise OSError("input/output error") from error


WRONG: dict[type[Store], str] = {
    NotBlank: "check_zeros_before_the_first_write",
    WritesOnce: "check_what_was_written_is_read",
    ForgetsTails: "check_runs_equal_singles",
    ReadsOneRun: "check_vectored_equals_one_by_one",
    KeepsAll: "check_discarded_pages_read_as_zeros",
    WrapsRound: "check_the_first_and_the_last_page",
    AssertsNothing: "check_pages_that_do_not_exist",
    SmallPages: "check_every_page_size",
    OneAtATime: "check_concurrent_operations",
    Lazy: "check_buffers_after_return",
    GoesOn: "check_buffers_after_cancellation",
    NeverClosed: "check_closed_twice_and_used_after",
    Stumbles: "check_closed_while_it_works",
    Evicts: "check_a_full_store_keeps_what_it_has",
    Durable: "check_what_was_flushed_survives",
    Shared: "check_opened_by_one_at_a_time",
    Tired: "check_a_history_equals_a_dict",
    Hasty: "check_what_is_read_at_once",
    Swallows: "check_failures_of_the_store_below",
    Half: "check_failures_of_the_store_below",
    Translates: "check_failures_of_the_store_below",
}


class HarnessOf(Harness):
    """Opens stores of a class, as whoever has store objects and no URL does."""

    def __init__(self, kind: type[Store]) -> None:
        super().__init__("{name}:", limited="limit=1MiB")
        self.kind = kind

    async def open_at(self, place: str, geometry: Geometry) -> Store:
        assert geometry.page_count
        limit = 1 << 20 if place == self.limited else None
        kind = self.kind if issubclass(self.kind, MemoryStore) else MemoryStore
        store = kind(geometry.page_count, page_size=geometry.page_size, limit=limit)
        if isinstance(store, Durable):
            store.put_on(place)
        return store

    async def open_over(self, wrap: Callable[[Store], Store]) -> Store:
        kind = self.kind if issubclass(self.kind, Filter) else Filter
        return kind(wrap(await self.open_at("", self.geometry)))

    def child_code(self, place: str, geometry: Geometry) -> str:
        return (
            "from userswap.backends.harness import write_until_killed\n"
            "from userswap.backends.store import Geometry\n"
            f"from {__name__} import HarnessOf, {self.kind.__name__}\n"
            f"write_until_killed(HarnessOf({self.kind.__name__}), {geometry!r}, {self.seed})"
        )
