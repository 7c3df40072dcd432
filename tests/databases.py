"""Databases of `lmdb:` for tests, and ways into them."""

from __future__ import annotations

from pathlib import Path

from userswap.backends.lmdb import LmdbStore
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run, Store

PAGE = 4096
PAGES = 1 << 20
MIB = 1 << 20


def url_of(path: Path, options: str = "") -> str:
    return f"lmdb:{path}?{options}" if options else f"lmdb:{path}"


async def open_at(path: Path, options: str = "", page_size: int = PAGE) -> LmdbStore:
    store = await open_stack(url_of(path, options), Geometry(PAGES, page_size))
    assert isinstance(store, LmdbStore)
    return store


async def read(store: Store, index: int) -> bytes:
    buffer = bytearray(b"\xaa" * store.page_size)
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes) -> None:
    await store.write([Run(index, memoryview(data))])
