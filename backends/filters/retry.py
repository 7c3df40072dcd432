"""`retry::` tries again what the store under it says may work when it is tried again.

Responsible for: TransientErrors alone; after the last try the error goes up. Delays double from
`first` to `most`, and each is taken at random from its upper half, so that those who failed at once
do not come again at once. Every operation may be repeated as it is: a run that was written in part
is written once more.
Must not know: why the store failed.

Options: `tries=5` in all, `first=2ms`, `most=1s`, `seed=N` (the same delays every time).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from userswap.backends.filters import Filter
from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import Below, Geometry, Run, Store, TransientError


class RetryFilter(Filter):
    """See `Store` for the contract. A native pool has no transient errors: it is passed on."""

    def __init__(
        self, inner: Store, *, tries: int, first: float, most: float, seed: int | None = None
    ) -> None:
        super().__init__(inner)
        self.native = inner.native
        self.retried = 0
        self._tries = tries
        self._first = first
        self._most = most
        self._random = random.Random(seed)

    async def read(self, runs: Sequence[Run]) -> None:
        await self._try(lambda: self._inner.read(runs))

    async def write(self, runs: Sequence[Run]) -> None:
        await self._try(lambda: self._inner.write(runs))

    async def discard(self, index: int, count: int) -> None:
        await self._try(lambda: self._inner.discard(index, count))

    async def flush(self) -> None:
        await self._try(self._inner.flush)

    async def aclose(self) -> None:
        self.native = None
        await self._inner.aclose()

    async def _try(self, call: Callable[[], Awaitable[None]]) -> None:
        delay = self._first
        for _ in range(self._tries - 1):
            try:
                return await call()
            except TransientError:
                self.retried += 1
            await asyncio.sleep(self._random.uniform(delay / 2, delay))
            delay = min(delay * 2, self._most)
        return await call()


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    options = Options(layer)
    tries = options.integer("tries", 5, low=1, high=1000)
    first = options.duration("first", 0.002)
    most = options.duration("most", 1.0)
    seed = options.integer("seed", None, low=0, high=1 << 40)
    options.finish()
    if first > most:
        raise layer.error("the first delay is longer than the longest", "first")
    inner = await below.open(geometry)
    return RetryFilter(inner, tries=tries, first=first, most=most, seed=seed)
