"""The part of the conformance suite that is about filters: what they make of a store that fails.

Responsible for: one check (see conformance.py). Must not know: any filter; pytest.
"""

from __future__ import annotations

import random
from typing import Any

from userswap.backends.harness import FailingStore, Harness, read, require, write
from userswap.backends.store import Store, StoreError

FAILURES_MAX = 60


async def check_failures_of_the_store_below(harness: Harness) -> None:
    """Every n-th call of the inner store fails: only StoreErrors come out, a failed write leaves
    each page old or new, other pages are untouched."""
    for number in range(1, FAILURES_MAX):
        if not await _history_over_failures(harness, lambda n, number=number: n == number):
            break
    for every in (2, 3, 5, 7):
        await _history_over_failures(harness, lambda n, every=every: n % every == 0)


async def _history_over_failures(harness: Harness, fails: Any) -> int:
    """A short history; returns how many calls of the inner store failed."""
    inner: list[FailingStore] = []

    def wrap(store: Store) -> Store:
        inner.append(FailingStore(store, lambda n: False))
        return inner[0]

    store = await harness.open_over(wrap)
    inner[0].calls, inner[0].fails = 0, fails
    rng = random.Random(harness.seed)
    size = store.page_size
    known = {index: {bytes(size)} for index in range(24)}
    """What each page may hold."""
    for step in range(30):
        index, pages = rng.randrange(18), rng.randrange(1, 6)
        wanted = range(index, index + pages)
        what = rng.choice(("write", "write", "discard", "read", "flush"))
        new = [harness.page(page, step) for page in wanted]
        if what == "discard":
            new = [bytes(size)] * pages
        try:
            if what == "write":
                await write(store, index, b"".join(new))
            elif what == "discard":
                await store.discard(index, pages)
            elif what == "flush":
                await store.flush()
            else:
                await _among(harness, store, index, [known[page] for page in wanted])
        except StoreError:
            if what in ("write", "discard"):
                for page, data in zip(wanted, new, strict=True):
                    known[page] = {*known[page], data}
            continue
        if what in ("write", "discard"):
            known.update({page: {data} for page, data in zip(wanted, new, strict=True)})
    inner[0].fails = lambda n: False
    for index, versions in known.items():
        await _among(harness, store, index, [versions])
    await store.aclose()
    return inner[0].failed


async def _among(harness: Harness, store: Store, index: int, versions: list[set[bytes]]) -> None:
    data = await read(store, index, len(versions))
    size = store.page_size
    for place, each in enumerate(versions):
        page = data[place * size : (place + 1) * size]
        possible = {harness.expected(version) for version in each}
        require(page in possible, f"page {index + place} is neither old nor new after a failure")
