"""Makes a store of a URL: finds who provides its layers, and opens them from the inside out.

Responsible for: which stores and filters there are. Third parties add theirs through the
entry-point groups `userswap.stores` and `userswap.filters`; what this package itself provides is
known here too, so that it is found before its metadata was written anew.
Must not know: what any layer does with its target and options.

A store is opened by `open_store(layer, page_count)`, a filter by `open_filter(layer, store)`. Both
return a `Store`, or a coroutine that does, so that opening may wait for a medium or a network.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from userswap.backends.grammar import LayerSpec, parse_store_url
from userswap.backends.store import Store, StoreFailedError

STORES_GROUP = "userswap.stores"
FILTERS_GROUP = "userswap.filters"
_OWN_STORES = {
    "memory": "userswap.backends.memory:open_store",
    "ram": "userswap.backends.ram:open_store",
}
_OWN_FILTERS: dict[str, str] = {}


def stores() -> dict[str, EntryPoint]:
    """Every store there is, by its name in a URL."""
    return _layers(STORES_GROUP, _OWN_STORES)


def filters() -> dict[str, EntryPoint]:
    return _layers(FILTERS_GROUP, _OWN_FILTERS)


async def open_stack(url: str, page_count: int) -> Store:
    """Open the store that `url` names, under its filters. What is wrong with the URL itself is a
    GrammarError; what cannot be opened, a StoreError."""
    known_stores, known_filters = stores(), filters()
    spec = parse_store_url(url, stores=known_stores, filters=known_filters)
    store = await _open(known_stores[spec.store.name], spec.store, page_count)
    for layer in reversed(spec.filters):
        try:
            store = await _open(known_filters[layer.name], layer, store)
        except BaseException:
            await store.aclose()
            raise
    return store


def _layers(group: str, own: Mapping[str, str]) -> dict[str, EntryPoint]:
    # Ours win: an installed package must not replace what a documented name means.
    ours = {name: EntryPoint(name, place, group) for name, place in own.items()}
    return {**_installed(group), **ours}


@functools.cache
def _installed(group: str) -> Mapping[str, EntryPoint]:
    """Looked for once: it reads the metadata of every installed package."""
    return {point.name: point for point in entry_points(group=group)}


async def _open(point: EntryPoint, layer: LayerSpec, over: Any) -> Store:
    try:
        opener = point.load()
    except (ImportError, AttributeError) as error:
        raise StoreFailedError(f"cannot be loaded ({error})", store=layer.name) from error
    try:
        store = opener(layer, over)
        if inspect.isawaitable(store):
            store = await store
    except OSError as error:
        raise StoreFailedError(str(error), store=layer.name) from error
    if not isinstance(store, Store):
        reason = f"{point.value} returned {type(store).__name__}, which is no store"
        raise StoreFailedError(reason, store=layer.name)
    return store
