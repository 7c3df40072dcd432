"""`delay::` makes a store slower, for tests and experiments.

Responsible for: waiting before each operation, which then takes place as it would; one that is
cancelled while it waits has done nothing. With `jitter=on` a wait is a random share of its time, so
that operations overtake each other.
Must not know: the store's own time, which comes on top.

Options: `read=1ms`, `write=`, `discard=`, `flush=` (none by default), `jitter=on|off`, `seed=N`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from userswap.backends.filters import Filter
from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import Below, Geometry, Run, Store

OPERATIONS = ("read", "write", "discard", "flush")


class DelayFilter(Filter):
    """See `Store` for the contract."""

    def __init__(
        self, inner: Store, delays: dict[str, float], *, jitter: bool = False, seed: int = 1
    ) -> None:
        super().__init__(inner)
        self._delays = delays
        self._jitter = jitter
        self._random = random.Random(seed)

    async def read(self, runs: Sequence[Run]) -> None:
        await self._wait("read")
        await self._inner.read(runs)

    async def write(self, runs: Sequence[Run]) -> None:
        await self._wait("write")
        await self._inner.write(runs)

    async def discard(self, index: int, count: int) -> None:
        await self._wait("discard")
        await self._inner.discard(index, count)

    async def flush(self) -> None:
        await self._wait("flush")
        await self._inner.flush()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _wait(self, operation: str) -> None:
        delay = self._delays.get(operation, 0.0)
        if delay:
            await asyncio.sleep(delay * self._random.random() if self._jitter else delay)


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    options = Options(layer)
    delays = {name: options.duration(name, 0.0) for name in OPERATIONS}
    jitter = options.boolean("jitter", False)
    seed = options.integer("seed", 1, low=0, high=1 << 40)
    options.finish()
    return DelayFilter(await below.open(geometry), delays, jitter=jitter, seed=seed)
