"""Makes a store of a URL: finds who provides its layers, and opens them from the inside out.

Responsible for: which stores and filters there are. Third parties add theirs through the
entry-point groups `userswap.stores` and `userswap.filters`; what this package itself provides is
known here too, so that it is found before its metadata was written anew.
Must not know: what any layer does with its target and options.

A store is opened by `open_store(layer, geometry)`, a filter by `open_filter(layer, geometry,
below)`, which opens what is under it. Both return a `Store`, or a coroutine that does, so that
opening may wait for a medium or a network. Whatever else a layer needs (a package that is not
installed) it imports when it is opened.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import (
    EntryPoint,
    PackageNotFoundError,
    distribution,
    entry_points,
    requires,
)

from userswap.backends.grammar import LayerSpec, StackSpec, parse_store_url
from userswap.backends.store import Geometry, Store, StoreFailedError

STORES_GROUP = "userswap.stores"
FILTERS_GROUP = "userswap.filters"
_OWN_STORES = {
    "file": "userswap.backends.file:open_store",
    "lmdb": "userswap.backends.lmdb:open_store",
    "memory": "userswap.backends.memory:open_store",
    "null": "userswap.backends.null:open_store",
    "nvme+tcp": "userswap.backends.nvme_tcp.store:open_store",
    "ram": "userswap.backends.ram:open_store",
    "redis": "userswap.backends.redis:open_store",
}
_OWN_FILTERS = {
    name: f"userswap.backends.filters.{name}:open_filter"
    for name in ("checksum", "delay", "encrypt", "faulty", "retry", "stats", "tier")
}
_EXAMPLES = ("ram:lz4", "ram:zstd", "memory:")
"""What a URL that is only a word may have been meant to be."""


def stores() -> dict[str, EntryPoint]:
    """Every store there is, by its name in a URL."""
    return _layers(STORES_GROUP, _OWN_STORES)


def filters() -> dict[str, EntryPoint]:
    return _layers(FILTERS_GROUP, _OWN_FILTERS)


def parse(url: str) -> StackSpec:
    """Read a URL whose layers all exist; what is wrong with it is a GrammarError."""
    return parse_store_url(url, stores=stores(), filters=filters(), examples=_EXAMPLES)


def foreign_layers(spec: StackSpec) -> list[str]:
    """The layers of a stack that are not this package's own."""
    names = [layer.name for layer in spec.filters if layer.name not in _OWN_FILTERS]
    return names + [spec.store.name] * (spec.store.name not in _OWN_STORES)


async def open_stack(
    url: str, geometry: Geometry, *, wrap: Callable[[Store], Store] = lambda store: store
) -> Store:
    """Open the store that `url` names, under its filters. What is wrong with the URL itself is a
    GrammarError; what cannot be opened, a StoreError.

    `wrap` puts something between the filters and the store, as who tests filters wants to.
    """
    return await _Below(parse(url), 0, wrap).open(geometry)


class _Below:
    """The layers of a stack from the one at `depth` inwards."""

    def __init__(self, spec: StackSpec, depth: int, wrap: Callable[[Store], Store]) -> None:
        self._spec = spec
        self._depth = depth
        self._wrap = wrap

    async def open(self, geometry: Geometry) -> Store:
        if self._depth == len(self._spec.filters):
            layer = self._spec.store
            return self._wrap(await _open(stores()[layer.name], layer, geometry))
        layer = self._spec.filters[self._depth]
        below = _Below(self._spec, self._depth + 1, self._wrap)
        return await _open(filters()[layer.name], layer, geometry, below)

    async def open_url(self, url: str, geometry: Geometry) -> Store:
        return await open_stack(url, geometry)


def missing(name: str) -> str:
    """The command that installs what one of our layers needs; empty where nothing is missing.

    What a layer needs beside this package is named in the extra of the layer's name.
    """
    try:
        requirements = requires("userswap") or []
    except PackageNotFoundError:
        return ""
    for requirement in requirements:
        needed, _, marker = requirement.partition(";")
        extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", marker)
        match = re.match(r"[\w.-]+", needed)
        if extra and extra[1] == name and match and not _is_installed(match[0]):
            return f"pip install 'userswap[{name}]'"
    return ""


def _is_installed(distribution_name: str) -> bool:
    try:
        distribution(distribution_name)
    except PackageNotFoundError:
        return False
    return True


def _layers(group: str, own: Mapping[str, str]) -> dict[str, EntryPoint]:
    # Ours win: an installed package must not replace what a documented name means.
    ours = {name: EntryPoint(name, place, group) for name, place in own.items()}
    return {**_installed(group), **ours}


@functools.cache
def _installed(group: str) -> Mapping[str, EntryPoint]:
    """Looked for once: it reads the metadata of every installed package."""
    return {point.name: point for point in entry_points(group=group)}


async def _open(point: EntryPoint, layer: LayerSpec, geometry: Geometry, *below: _Below) -> Store:
    try:
        opener = point.load()
    except (ImportError, AttributeError) as error:
        raise StoreFailedError(f"cannot be loaded ({error})", store=layer.name) from error
    try:
        store = opener(layer, geometry, *below)
        if inspect.isawaitable(store):
            store = await store
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise StoreFailedError(where, store=layer.name) from error
    if not isinstance(store, Store):
        reason = f"{point.value} returned {type(store).__name__}, which is no store"
        raise StoreFailedError(reason, store=layer.name)
    return store
