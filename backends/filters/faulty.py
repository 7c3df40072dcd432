"""`faulty::` makes a store fail as its options say, for tests and experiments.

Responsible for: failing calls by number or by rate, the same ones every time for the same seed and
calls. Must not know: what is done about it.

Options: `read=`, `write=`, `discard=`, `flush=` say which calls: `n5` the fifth, `n5+` the fifth
and all later ones, `0.01` one in a hundred at random. `how=` says what happens to them:
    transient, lost, full   that error, and nothing is done
    failed                  StoreFailedError, from then on for every call
    flip                    one random bit of what is read, or of what is written, is wrong
    torn                    of a random page, and of those after it, only a part is written
    hang                    the call does not end until it is cancelled
The last three are silent; `flip` concerns reads and writes alone, `torn` writes.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Sequence

from userswap.backends.filters import Filter
from userswap.backends.grammar import GrammarError, LayerSpec, Options
from userswap.backends.store import (
    Below,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreFailedError,
    StoreFullError,
    TransientError,
    pages_between,
    pages_of,
)

NAME = "faulty"
OPERATIONS = ("read", "write", "discard", "flush")
ERRORS = {"transient": TransientError, "lost": PageLostError, "full": StoreFullError}
KINDS = (*ERRORS, "failed", "flip", "torn", "hang")
_NUMBERED = re.compile(r"n([1-9][0-9]{0,17})(\+?)")
_RATE = re.compile(r"[0-9]{1,3}(\.[0-9]{1,17})?")


class Which:
    """Which calls of an operation fail."""

    def __init__(self, text: str) -> None:
        self.first, self.last, self.rate = 0, 0, 0.0
        if match := _NUMBERED.fullmatch(text):
            self.first = int(match[1])
            self.last = 1 << 63 if match[2] else self.first
        elif _RATE.fullmatch(text) and float(text) <= 1:
            self.rate = float(text)
        else:
            raise GrammarError(f"'{text}' says no calls; write n5, n5+ or a rate such as 0.01")

    def has(self, number: int, rng: random.Random) -> bool:
        return self.first <= number <= self.last or (self.rate > 0 and rng.random() < self.rate)


class FaultyFilter(Filter):
    """Keeps the contract of `Store` as far as `how` lets it."""

    def __init__(
        self, inner: Store, which: dict[str, Which], *, how: str = "transient", seed: int = 1
    ) -> None:
        super().__init__(inner)
        self.checked = inner.checked and how not in ("flip", "torn")
        self.calls: Counter[str] = Counter()
        self._which = which
        self._how = how
        self._failed = False
        self._random = random.Random(seed)

    async def read(self, runs: Sequence[Run]) -> None:
        fails = await self._call("read", [page for run in runs for page in pages_of(self, run)])
        await self._inner.read(runs)
        if fails and self._how == "flip":
            self._flip(self._random.choice(runs).buffer.cast("B"))

    async def write(self, runs: Sequence[Run]) -> None:
        fails = await self._call("write", [page for run in runs for page in pages_of(self, run)])
        if fails and self._how == "flip":
            copies = [bytearray(run.buffer) for run in runs]
            self._flip(memoryview(self._random.choice(copies)))
            runs = [Run(r.index, memoryview(c)) for r, c in zip(runs, copies, strict=True)]
        elif fails and self._how == "torn":
            runs = await self._torn(runs)
        await self._inner.write(runs)

    async def discard(self, index: int, count: int) -> None:
        await self._call("discard", pages_between(self, index, count))
        await self._inner.discard(index, count)

    async def flush(self) -> None:
        await self._call("flush", ())
        await self._inner.flush()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _call(self, operation: str, pages: Sequence[int]) -> bool:
        """Count a call; fail, or say that the caller does what `how` says."""
        self.calls[operation] += 1
        which = self._which.get(operation)
        fails = which is not None and which.has(self.calls[operation], self._random)
        if self._failed or (fails and self._how == "failed"):
            self._failed = True
            raise StoreFailedError("has failed, as it was told to", store=NAME)
        if fails and self._how in ERRORS:
            page = self._random.choice(pages) if pages else None
            raise ERRORS[self._how]("fails as it was told to", store=NAME, page=page)
        if fails and self._how == "hang":
            await asyncio.Event().wait()
        return fails

    def _flip(self, buffer: memoryview) -> None:
        buffer[self._random.randrange(len(buffer))] ^= 1 << self._random.randrange(8)

    async def _torn(self, runs: Sequence[Run]) -> list[Run]:
        """The runs up to a random page, of which only the beginning is new."""
        at = self._random.randrange(len(runs))
        torn, size = runs[at], self.page_size
        page = self._random.randrange(torn.buffer.nbytes // size)
        whole = bytearray((page + 1) * size)
        await self._inner.read([Run(torn.index, memoryview(whole))])
        cut = page * size + self._random.randrange(size)
        whole[:cut] = torn.buffer.cast("B")[:cut]
        return [*runs[:at], Run(torn.index, memoryview(whole))]


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    options = Options(layer)
    which = {}
    for name in OPERATIONS:
        text = options.text(name, None)
        try:
            which.update({} if text is None else {name: Which(text)})
        except GrammarError as error:
            raise layer.error(error.message, name) from None
    how = options.choice("how", "transient", KINDS)
    seed = options.integer("seed", 1, low=0, high=1 << 40)
    options.finish()
    return FaultyFilter(await below.open(geometry), which, how=how, seed=seed)
