"""The stores that a pager has open, and where in them each region's pages are.

A store that is awaited is opened once, however many regions of however many clients page to it: a
volume over it hands each region an extent of its own. A store that the fault server serves
natively is opened once for each client, because the words of its page table name places in it.

What a client asks for is the name of a store that the operator declared, where there are such;
only an embedded pager, which is its client's own process, opens what a URL says.

Must not know: which stores there are, faults, the clients' sockets.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from userswap.backends import registry
from userswap.backends.grammar import GrammarError, unknown_name, without_password
from userswap.backends.store import Geometry, NativePool, Store, StoreError
from userswap.backends.volume import Extent, Volume, open_volume
from userswap.engine.errors import ConfigError, UserswapError
from userswap.engine.gate import Gate
from userswap.engine.isolation import open_isolated
from userswap.engine.objects import OBJECT_PREFIX, unpickled

log = logging.getLogger("userswap.pager")


@dataclass
class _Open:
    """A store that is open, and the regions that use it."""

    store: Store
    volume: Volume | None
    gate: Gate
    users: int = 0


@dataclass(frozen=True)
class Backing:
    """Where one region's pages go."""

    key: tuple[int, str]
    label: str
    """The store as messages name it."""
    store: Store
    gate: Gate
    extent: Extent | None

    @property
    def base(self) -> int:
        """The store's index of the region's first page."""
        return self.extent.base if self.extent else 0

    @property
    def native(self) -> NativePool | None:
        return self.store.native


class Stores:
    """What a pager has open. `declared` are the operator's stores, by name; None: any URL goes."""

    def __init__(self, declared: Mapping[str, str] | None = None) -> None:
        self._declared = declared
        self._open: dict[tuple[int, str], _Open] = {}
        """By client (0: shared by all) and store."""
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Opening and closing, by URL: two regions that ask at once for a file find it open once,
        and a store that hangs as it is opened holds up nobody who wants another."""

    async def open(self, client: int, store: str, region: str, pages: int) -> Backing:
        """Room for `pages` pages of a client's region.

        Raises ConfigError for what cannot be opened, UserswapError for what fails.
        """
        label = label_of(store)
        url = self._url(store)
        try:
            async with self._locks[url]:
                key, opened = await self._opened(client, url)
                opened.users += 1
            try:
                extent = await opened.volume.allocate(region, pages) if opened.volume else None
            except BaseException:
                await self._leave(key)
                raise
        except (GrammarError, StoreError) as error:
            raise ConfigError(_refusal(label, error)) from None
        except OSError as error:
            raise UserswapError(f"store {label!r}: {error}") from None
        return Backing(key, label, opened.store, opened.gate, extent)

    async def close(self, backing: Backing) -> None:
        """Forget a region's pages; the store is closed with its last region."""
        opened = self._open[backing.key]
        try:
            if opened.volume and backing.extent:
                await opened.volume.release(backing.extent)
        except Exception as error:
            log.warning("store %s: %s", backing.label, error)
        finally:
            await self._leave(backing.key)

    def _url(self, store: str) -> str:
        if self._declared is None:
            return store
        if store not in self._declared:
            raise ConfigError(unknown_name("store", store, self._declared))
        return self._declared[store]

    async def _opened(self, client: int, url: str) -> tuple[tuple[int, str], _Open]:
        for key in ((0, url), (client, url)):
            if key in self._open:
                return key, self._open[key]
        store = await open_store(url)
        volume = None
        if store.native is None:
            try:
                volume = await open_volume(store, name=label_of(url))
            except BaseException:
                await store.aclose()
                raise
        key = (0 if volume else client, url)
        self._open[key] = _Open(store, volume, Gate())
        return key, self._open[key]

    async def _leave(self, key: tuple[int, str]) -> None:
        async with self._locks[key[1]]:
            opened = self._open[key]
            opened.users -= 1
            if opened.users:
                return
            del self._open[key]
            try:
                await (opened.volume or opened.store).aclose()
            except Exception as error:
                log.warning("store %s: %s", label_of(key[1]), error)


async def open_store(url: str) -> Store:
    """Open a stack as large as it can be; somebody else's on a thread of its own."""
    if url.startswith(OBJECT_PREFIX):
        return await open_isolated("object", lambda: unpickled(url))
    foreign = registry.foreign_layers(registry.parse(url))
    if foreign:
        return await open_isolated(foreign[0], lambda: registry.open_stack(url, Geometry()))
    return await registry.open_stack(url, Geometry())


def _refusal(label: str, error: GrammarError | StoreError) -> str:
    """The store is named once, be it by the error itself."""
    if isinstance(error, GrammarError) and error.position is not None:
        return f"store: {error}"
    named = isinstance(error, StoreError) and error.store == label
    return f"store {error}" if named else f"store {label!r}: {error}"


def label_of(store: str) -> str:
    """A store as messages name it."""
    return "object" if store.startswith(OBJECT_PREFIX) else without_password(store)
