"""`stats::` counts what goes through it, and says so when it is closed.

Responsible for: calls, pages, failures and latencies of each operation, in `counts`, for the price
of two looks at the clock a call. Must not know: what the numbers are good for.

A native pool is passed on as it is: who serves it goes round this filter, and counts for itself.
No options.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

from userswap.backends.filters import Filter
from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import Below, Geometry, Run, Store

log = logging.getLogger("userswap.stats")

OPERATIONS = ("read", "write", "discard", "flush")
STEPS = 4
"""Classes of latency in each power of two, in nanoseconds: quantiles are within 25 %."""


@dataclass(slots=True)
class Counts:
    """Of one operation."""

    calls: int = 0
    pages: int = 0
    bytes: int = 0
    nanoseconds: int = 0
    slowest: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """By the name of the error."""
    classes: Counter[int] = field(default_factory=Counter)

    def quantile(self, fraction: float) -> float:
        """Seconds within which this share of the calls ended; the upper end of its class."""
        left = fraction * self.calls
        for number in sorted(self.classes):
            left -= self.classes[number]
            if left <= 0:
                return min(_upper_end(number), self.slowest) / 1e9
        return self.slowest / 1e9

    def __str__(self) -> str:
        p50, p99, most = (f"{self.quantile(part) * 1e6:.1f}" for part in (0.5, 0.99, 1.0))
        failed = "".join(f", {count} {name}" for name, count in self.failed.items())
        latency = f"p50 {p50} us, p99 {p99} us, longest {most} us"
        return f"{self.calls} calls, {self.pages} pages, {self.bytes} bytes, {latency}{failed}"


def _class_of(nanoseconds: int) -> int:
    exponent = max(nanoseconds.bit_length() - 3, 0)
    return exponent * STEPS + (nanoseconds >> exponent)


def _upper_end(number: int) -> int:
    if number < 2 * STEPS:
        return number
    exponent, step = divmod(number, STEPS)
    return ((STEPS + step + 1) << (exponent - 1)) - 1


class StatsFilter(Filter):
    """See `Store` for the contract."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.native = inner.native
        self.counts = {name: Counts() for name in OPERATIONS}
        self._closed = False

    async def read(self, runs: Sequence[Run]) -> None:
        await self._count("read", _bytes(runs), self._inner.read(runs))

    async def write(self, runs: Sequence[Run]) -> None:
        await self._count("write", _bytes(runs), self._inner.write(runs))

    async def discard(self, index: int, count: int) -> None:
        await self._count("discard", count * self.page_size, self._inner.discard(index, count))

    async def flush(self) -> None:
        await self._count("flush", 0, self._inner.flush())

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self.native = None
            for name, counts in self.counts.items():
                if counts.calls:
                    log.info("%s: %s: %s", self.space, name, counts)
        await self._inner.aclose()

    async def _count(self, operation: str, size: int, call: Awaitable[None]) -> None:
        counts = self.counts[operation]
        began = time.perf_counter_ns()
        try:
            await call
        except (Exception, asyncio.CancelledError) as error:
            counts.failed[type(error).__name__] += 1
            raise
        finally:
            taken = time.perf_counter_ns() - began
            counts.calls += 1
            counts.pages += size // self.page_size
            counts.bytes += size
            counts.nanoseconds += taken
            counts.slowest = max(counts.slowest, taken)
            counts.classes[_class_of(taken)] += 1


def _bytes(runs: Sequence[Run]) -> int:
    return sum(run.buffer.nbytes for run in runs)


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    Options(layer).finish()
    return StatsFilter(await below.open(geometry))
