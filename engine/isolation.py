"""Somebody else's store, on a thread and an event loop of its own.

A store that blocks, spins or hangs then holds up what is paged to it, and nothing else: the
pager's loop only waits for messages from that thread. The price is the way there and back, and a
copy of each page: the store works on buffers of its own, so that an await can be given up while
the store still writes to them.

What is not a StoreError is turned into one here, and its traceback logged once.

Must not know: which store it is, faults, batches.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from userswap.backends.store import Run, Store, StoreError, StoreFailedError
from userswap.native import lib

log = logging.getLogger("userswap.pager")

CLOSE_TIMEOUT_S = 5.0

T = TypeVar("T")


class _Thread:
    """An event loop that runs on a thread until it is stopped, or the process ends."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        lib.us_place_freely()
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine over there; a cancellation is passed on and not waited for."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


class IsolatedStore(Store):
    """A store that lives on a thread of its own; see `Store` for the contract."""

    def __init__(self, thread: _Thread, inner: Store, name: str) -> None:
        self._thread = thread
        self._inner = inner
        self._name = name
        self._closed = False
        self._told = False
        self.page_size = inner.page_size
        self.page_count = inner.page_count
        self.durable = inner.durable
        self.checked = inner.checked
        self.encrypted = inner.encrypted
        self.space = inner.space

    async def read(self, runs: Sequence[Run]) -> None:
        copies = [Run(run.index, memoryview(bytearray(run.buffer.nbytes))) for run in runs]
        await self._run(self._inner.read, copies)
        for run, copy in zip(runs, copies, strict=True):
            run.buffer.cast("B")[:] = copy.buffer

    async def write(self, runs: Sequence[Run]) -> None:
        copies = [Run(run.index, memoryview(bytes(run.buffer))) for run in runs]
        await self._run(self._inner.write, copies)

    async def discard(self, index: int, count: int) -> None:
        await self._run(self._inner.discard, index, count)

    async def flush(self) -> None:
        await self._run(self._inner.flush)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        closing = self._thread.run(_call(self._inner.aclose))
        try:
            await asyncio.wait_for(closing, CLOSE_TIMEOUT_S)
        except TimeoutError:
            log.warning("store %s: does not close; it is left behind", self._name)
            return
        self._thread.stop()

    async def _run(self, operation: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=self._name)
        try:
            await self._thread.run(_call(operation, *arguments))
        except StoreError:
            raise
        except Exception as error:
            if not self._told:
                self._told = True
                log.exception("store %s broke its contract", self._name)
            raise StoreFailedError(f"broke its contract: {error!r}", store=self._name) from error


async def _call(operation: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    return await operation(*arguments)


async def open_isolated(name: str, opener: Callable[[], Awaitable[Store]]) -> Store:
    """Open a store on a new thread.

    Parameters: `name` for messages; `opener` is called and awaited on that thread. Raises what it
    raises; a store that is native cannot be isolated, and is a StoreFailedError.
    """
    thread = _Thread(f"store {name}")
    try:
        inner = await thread.run(_call(opener))
    except BaseException:
        thread.stop()
        raise
    store = IsolatedStore(thread, inner, name)
    if inner.native is not None:
        try:
            await store.aclose()
        except StoreError as error:
            log.warning("store %s: %s", name, error)
        raise StoreFailedError("is served natively and cannot be somebody else's", store=name)
    return store
