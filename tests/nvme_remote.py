"""Namespaces over loopback for the tests of the store: a target of ours, and how to reach it.

A medium outlives the servers that export it, as a disk does its machine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType

from userswap.backends.harness import Harness
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp.server import Server, serve
from userswap.backends.store import Geometry, Store

NQN = "nqn.2026-01.test:remote"
PAGES = 1 << 14
NGUID = bytes(range(16))


def url(address: tuple[str, int], **options: object) -> str:
    host, port = address
    host = f"[{host}]" if ":" in host else host
    given = "".join(f"&{name}={value}" for name, value in options.items())
    return f"nvme+tcp://{host}:{port}/{NQN}?nsid=1{given}"


async def started(medium: Store, *, port: int = 0, block_size: int = 4096) -> Server:
    return await serve(
        medium, nqn=NQN, listen=("127.0.0.1", port), block_size=block_size, nguid=NGUID
    )


@contextlib.asynccontextmanager
async def served(medium: Store | None = None, *, block_size: int = 4096) -> AsyncIterator[Server]:
    """A target on a port of its own."""
    medium = medium or MemoryStore(PAGES)
    server = await started(medium, block_size=block_size)
    try:
        yield server
    finally:
        await server.stop()


class Remote(Harness):
    """The conformance suite over loopback; each fresh medium has a target of its own."""

    def __init__(self, block_size: int, **options: object) -> None:
        super().__init__("nvme+tcp:", seed=1)
        self._block_size = block_size
        self._options = options
        self._servers: list[Server] = []

    async def open(self, geometry: Geometry | None = None) -> Store:
        server = await started(MemoryStore(PAGES), block_size=self._block_size)
        self._servers.append(server)
        self._place = url(server.address, **self._options)
        return await self.reopen(geometry)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await super().__aexit__(kind, value, traceback)
        for server in self._servers:
            await server.stop()
        await asyncio.sleep(0)
