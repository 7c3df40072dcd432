"""The embedded pager's process: composition root.

It is exec'd by the first region of a process, in a session of its own, and deaf to the signals of a
terminal: it must outlive every thread that may still fault. It ends when its client has let go of
it or is gone, and then frees everything by ending.

Must not know: pages.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterable

from userswap.engine.connection import Connection, Terms
from userswap.engine.control import Message
from userswap.engine.desk import Desk
from userswap.engine.errors import ConfigError, UserswapError
from userswap.engine.fault_loop import cancel_all
from userswap.engine.listening import Listener, listen_privately
from userswap.engine.served import ClientService
from userswap.native import ffi, lib

VISITORS_MAX = 16
VISIT_S = 10.0
LINES_A_SECOND = 50


class Embedded(Terms):
    """One program's own pager, with a desk for its user's visitors."""

    def __init__(self, connection: socket.socket) -> None:
        self.client = Connection(connection, self)
        self.desk = Desk(self)
        self._listener: Listener | None = None
        self._visits: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Serve the client until it has let go or is gone."""
        self.client.open()
        gc.freeze()  # what start-up made stays: collections look only at what came since
        await self.client.introduced.wait()
        self._receive_visitors()
        await self.client.ended.wait()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.socket.fileno())
            self._listener.close()
        await cancel_all(self._visits)
        await self.client.close()

    def _receive_visitors(self) -> None:
        """Where there is no place for a socket, the program is served all the same."""
        try:
            self._listener = listen_privately(f"{self.client.credentials.pid}.sock")
        except (OSError, UserswapError):
            return
        asyncio.get_running_loop().add_reader(self._listener.socket.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.socket.accept()
        except OSError:
            return
        if len(self._visits) >= VISITORS_MAX:
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._visited(connection))
        self._visits.add(task)
        task.add_done_callback(self._visits.discard)

    async def _visited(self, connection: socket.socket) -> None:
        visitor = Connection(connection, self)
        visitor.open()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(visitor.ended.wait(), VISIT_S)
        finally:
            await visitor.close()

    def begin(self, client: Connection, hello: Message, uffd: int) -> ClientService:
        if client is not self.client:
            raise UserswapError("this pager serves the program that started it, and no other")
        service = super().begin(client, hello, uffd)
        lib.us_place_loop(service.native)
        return service

    async def visit(self, visitor: Connection, operation: str, request: Message) -> Message:
        return await self.desk.answer(visitor, operation, request)

    def about(self) -> Message:
        return {"kind": "embedded", "pid": os.getpid()}

    def connections(self) -> list[Connection]:
        return [self.client]

    def grants(self, client: Connection, number: int) -> Message:
        if not number or client.service is None:
            return {}
        report = ffi.new("struct us_report *")
        lib.us_region_report(client.service.regions[number].handle, report)
        return {"resident": report.limit}

    def change(self, client: Connection, number: int, what: str, value: int | float) -> None:
        if what != "resident" or not number or client.service is None:
            raise ConfigError("a program's own pager takes CLIENT/REGION resident=SIZE alone")
        self.limit(client, client.service.regions[number], number, int(value))


class _Stderr(logging.Handler):
    """Standard error, which may be a full pipe: a line is lost before it blocks.

    What clients cause must not fill a disk: so many lines a second, and no more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._second, self._lines = 0, 0

    def emit(self, record: logging.LogRecord) -> None:
        second = int(record.created)
        self._second, self._lines = second, self._lines + 1 if second == self._second else 1
        if self._lines > LINES_A_SECOND:
            return
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            with contextlib.suppress(OSError):
                os.write(2, (self.format(record) + "\n").encode())


def settle_process(name: str, deaf: Iterable[signal.Signals]) -> None:
    """Make this process fit to serve: deaf to signals, without limits that it was started with."""
    for number in deaf:
        signal.signal(number, signal.SIG_IGN)
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (hard, hard))
    title = ctypes.create_string_buffer(name.encode())
    ctypes.CDLL(None).prctl(15, title, 0, 0, 0)  # PR_SET_NAME
    logging.basicConfig(format="userswap: %(message)s", handlers=[_Stderr()])


async def _serve(descriptor: int) -> None:
    await Embedded(socket.socket(fileno=descriptor)).serve()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="userswap-pager", description=__doc__)
    parser.add_argument("--embedded", type=int, required=True, metavar="FD")
    options = parser.parse_args(arguments)
    deaf = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE)
    settle_process("userswap-pager", deaf)
    asyncio.run(_serve(options.embedded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
