"""Namespaces over loopback for the tests of the store: a target of ours, and how to reach it.

A medium outlives the servers that export it, as a disk does its machine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from userswap.backends.harness import Harness
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp.server import Rules, Server, serve
from userswap.backends.store import Geometry, Run, Store, pages_of

NQN = "nqn.2026-01.test:remote"
PAGES = 1 << 14
NGUID = bytes(range(16))


def url(address: tuple[str, int], **options: object) -> str:
    host, port = address
    host = f"[{host}]" if ":" in host else host
    given = "".join(f"&{name}={value}" for name, value in options.items())
    return f"nvme+tcp://{host}:{port}/{NQN}?nsid=1{given}"


async def started(
    medium: Store, *, port: int = 0, block_size: int = 4096, rules: Rules | None = None
) -> Server:
    listen = ("127.0.0.1", port)
    return await serve(
        medium, nqn=NQN, listen=listen, block_size=block_size, nguid=NGUID, rules=rules
    )


@contextlib.asynccontextmanager
async def served(medium: Store | None = None, **how: Any) -> AsyncIterator[Server]:
    """A target on a port of its own."""
    medium = medium or MemoryStore(PAGES)
    server = await started(medium, **how)
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
        return await self._open(MemoryStore(PAGES), geometry)

    async def open_limited(self) -> Store:
        return await self._open(MemoryStore(PAGES, limit=1 << 20), Geometry(PAGES - 1))

    async def _open(self, medium: Store, geometry: Geometry | None) -> Store:
        server = await started(medium, block_size=self._block_size)
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


class Proxy:
    """Carries connections to a target; cuts them after so many bytes, or when told to.

    `cuts` gives how many bytes each connection lives for; None: it is not cut.
    """

    def __init__(self, port: int, cuts: Callable[[], int | None] = lambda: None) -> None:
        self.port = port
        self.accepted = 0
        self.cut_connections = 0
        self.address = ("", 0)
        self.cuts = cuts
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = self._server.sockets[0].getsockname()[:2]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        self.flow()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """End all connections, at whatever byte they are."""
        for writer in self._open:
            self.cut_connections += 1
            writer.transport.abort()
        self._open.clear()

    def stall(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, back}
        self._open |= ends
        left = [self.cuts()]
        tasks = [
            asyncio.create_task(self._copy(reader, back, left)),
            asyncio.create_task(self._copy(there, writer, left)),
        ]
        self._tasks.update(tasks)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)
            for end in ends:
                end.transport.abort()
            self._open -= ends

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, left: list[int | None]
    ) -> None:
        while data := await source.read(16384):
            await self._flowing.wait()
            if left[0] is not None:
                data = data[: left[0]]
                left[0] -= len(data)
            sink.write(data)
            await sink.drain()
            if left[0] == 0:
                self.cut_connections += 1
                return


class Cached(Store):
    """A medium with a volatile cache: what was not flushed is gone when the power is."""

    durable = True

    def __init__(self, page_count: int = PAGES) -> None:
        self.page_size, self.page_count = 4096, page_count
        self.flushes = 0
        self._safe: dict[int, bytes] = {}
        self._cache: dict[int, bytes] = {}
        self._is_off = False

    async def read(self, runs: Sequence[Run]) -> None:
        zeros = bytes(self.page_size)
        for run in runs:
            for at, page in enumerate(pages_of(self, run)):
                data = self._cache.get(page, self._safe.get(page, zeros))
                run.buffer[at * self.page_size : (at + 1) * self.page_size] = data

    async def write(self, runs: Sequence[Run]) -> None:
        for run in runs:
            for at, page in enumerate(pages_of(self, run)):
                data = bytes(run.buffer[at * self.page_size : (at + 1) * self.page_size])
                self._keep(page, data)

    async def discard(self, index: int, count: int) -> None:
        for page in range(index, index + count):
            self._keep(page, bytes(self.page_size))

    def _keep(self, page: int, data: bytes) -> None:
        if not self._is_off:
            self._cache[page] = data

    async def flush(self) -> None:
        if not self._is_off:
            self.flushes += 1
            self._safe |= self._cache
            self._cache.clear()

    async def aclose(self) -> None:
        pass

    def lose_power(self) -> int:
        """How many pages that forgot; nothing is kept until `regain_power`."""
        self._is_off = True
        lost = len(self._cache)
        self._cache.clear()
        return lost

    def regain_power(self) -> None:
        self._is_off = False
