"""The pager process: composition root, and the control connection of an embedded pager's client.

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

from userswap.backends.store import StoreError
from userswap.engine.control import Message, close_all, peer, receive, send
from userswap.engine.errors import PagerError, UserswapError
from userswap.engine.served import ClientService, OpenRegion
from userswap.engine.stores import Stores

log = logging.getLogger("userswap.pager")


class Connection:
    """One client's control connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._service: ClientService | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._unclaimed: set[int] = set()
        """Descriptors that came and that no operation has taken."""
        self._pidfd = -1
        self.ended = asyncio.Event()

    def open(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            message, descriptors = receive(self._socket)
        except BlockingIOError:
            return
        except (OSError, PagerError) as error:
            log.warning("control connection: %s", error)
            self.ended.set()
            return
        if message is None:
            self.ended.set()
            return
        self._unclaimed.update(descriptors)
        task = asyncio.get_running_loop().create_task(self._answer(message, descriptors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Message, descriptors: list[int]) -> None:
        answer: Message = {"id": request.get("id"), "ok": True}
        outgoing: list[int] = []
        try:
            if request.get("op") != "hello":
                self._refuse(descriptors)
            result, outgoing = await self._perform(str(request.get("op")), request, descriptors)
            answer.update(result)
        except UserswapError as error:
            answer.update(ok=False, kind=error.kind, error=str(error))
        except (OSError, StoreError) as error:
            answer.update(ok=False, kind="error", error=f"{request.get('op')}: {error}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            answer.update(
                ok=False, kind="config", error=f"{request.get('op')}: bad request ({error})"
            )
        except Exception as error:
            log.exception("%s", request.get("op"))
            answer.update(ok=False, kind="error", error=f"{request.get('op')}: {error!r}")
        finally:
            self._refuse(descriptors)
        while not self.ended.is_set():
            try:
                send(self._socket, answer, outgoing)
                return
            except BlockingIOError:
                await asyncio.sleep(0.001)
            except OSError:
                self.ended.set()

    async def _perform(
        self, operation: str, request: Message, descriptors: list[int]
    ) -> tuple[Message, list[int]]:
        if operation == "hello":
            return self._hello(request, descriptors)
        service = self._service
        if service is None:
            raise UserswapError("hello comes first")
        if operation == "agent":
            service.start(int(request["staging"]), int(request["tid"]), self.ended.set)
            return {}, []
        if operation == "quiet":
            await service.quiet()
            return {}, []
        if operation == "open":
            return await service.open(request)
        return await self._on_region(service, operation, request), []

    async def _on_region(self, service: ClientService, operation: str, request: Message) -> Message:
        from userswap.native import lib

        region = service.region(request)
        match operation:
            case "stats":
                return {"stats": service.stats(region)}
            case "limit":
                lib.us_region_limit(region.handle, int(request["limit"]))
            case "prefetch" | "discard" | "flush":
                return await self._over_time(service, region, operation, request)
            case "quiesce":
                await service.quiesce(region)
            case "resume":
                region.closing = False
                lib.us_region_resume(region.handle)
            case "close":
                await service.close(int(request["region"]), unmapped=bool(request["unmapped"]))
            case _:
                raise UserswapError(f"no operation {operation!r}")
        return {}

    async def _over_time(
        self, service: ClientService, region: OpenRegion, operation: str, request: Message
    ) -> Message:
        """An operation that a close has to wait for."""
        region.operations.begin()
        try:
            if operation == "flush":
                await service.flush(region)
                return {}
            first, count = int(request["first"]), int(request["count"])
            if operation == "discard":
                await service.discard(region, first, count)
                return {}
            return {"pages": await service.prefetch(region, first, count)}
        finally:
            region.operations.end()

    def _hello(self, request: Message, descriptors: list[int]) -> tuple[Message, list[int]]:
        if self._service is not None or len(descriptors) != 1:
            raise UserswapError("hello comes once, with one userfaultfd")
        pid = peer(self._socket)
        if request["pid"] != pid:
            # Memory is read, and the client's end is seen, by this number.
            raise UserswapError(f"hello: this is process {pid}, not {request['pid']!r}")
        self._service = ClientService(1, descriptors[0], request, Stores())
        self._unclaimed.difference_update(descriptors)
        # A child of the client may hold its socket open: only the pidfd tells that it has ended.
        self._pidfd = os.pidfd_open(self._service.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self.ended.set)
        return {}, self._service.descriptors()

    def _refuse(self, descriptors: Iterable[int]) -> None:
        """Close those that no operation has taken."""
        unclaimed = self._unclaimed.intersection(descriptors)
        self._unclaimed -= unclaimed
        close_all(unclaimed)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket.fileno())
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._refuse(self._unclaimed)  # of tasks that were cancelled before they began
        if self._service is not None:
            await self._service.end()
        self._socket.close()


async def serve_embedded(connection: socket.socket) -> None:
    """Serve one client until it has let go or is gone."""
    client = Connection(connection)
    client.open()
    gc.freeze()  # what start-up made stays: collections look only at what came since
    await client.ended.wait()
    await client.close()


class _Stderr(logging.Handler):
    """Standard error, which may be a full pipe: a line is lost before it blocks."""

    def emit(self, record: logging.LogRecord) -> None:
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            with contextlib.suppress(OSError):
                os.write(2, (self.format(record) + "\n").encode())


def _settle() -> None:
    """Make this process fit to serve: deaf to a terminal, without limits that its client set."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (hard, hard))
    name = ctypes.create_string_buffer(b"userswap-pager")
    ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="userswap-pager", description=__doc__)
    parser.add_argument("--embedded", type=int, required=True, metavar="FD")
    options = parser.parse_args(arguments)
    _settle()
    logging.basicConfig(format="userswap: %(message)s", handlers=[_Stderr()])
    asyncio.run(serve_embedded(socket.socket(fileno=options.embedded)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
