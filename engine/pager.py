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

from userswap.engine.connection import Connection


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="userswap-pager", description=__doc__)
    parser.add_argument("--embedded", type=int, required=True, metavar="FD")
    options = parser.parse_args(arguments)
    deaf = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE)
    settle_process("userswap-pager", deaf)
    asyncio.run(serve_embedded(socket.socket(fileno=options.embedded)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
