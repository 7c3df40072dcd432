"""A target for measuring a host: Python says hello, native/nvme_bare.c moves the blocks.

Responsible for: bringing connections up as any target of ours does, and handing each I/O queue to
the loop in C, in a thread of its own. Run as a program it prints its port, and ends with its
standard input. It trusts its host, keeps blocks in memory, and asks for no data: what a host
writes comes along with the command. A connection whose first byte is a question mark is not
NVMe's: it gets blocks of bytes back, as the raw round trip that all else is compared with.

Must not know: what is measured.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time

from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.identify import Namespace
from userswap.backends.nvme_tcp.target import Rules, Session, Target
from userswap.backends.nvme_tcp.target_queue import Closed, Limits
from userswap.native import ffi, lib

NQN = "nqn.2026-01.io.userswap:bench"
BLOCK = 4096
TRANSFER = 128 * 1024
RAW = b"?"
ASK, ANSWER = 72, 24 + BLOCK + 24
"""Of the raw round trip: a Read's capsule; its data and its completion."""


class Responder:
    def __init__(self, blocks: int, spin: bool) -> None:
        self._memory = ffi.new("uint8_t[]", blocks * BLOCK)
        self._blocks = blocks
        self._spin = spin
        limits = Limits(in_capsule=TRANSFER, transfer=TRANSFER)
        namespace = Namespace(blocks, BLOCK, nguid=os.urandom(16))
        self._target = Target(NQN, {1: namespace}, Rules(limits=limits), serial="bench")
        self._lock = threading.Lock()

    def serve(self, connection: socket.socket) -> None:
        """One connection, to its end."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            if connection.recv(1, socket.MSG_PEEK) == RAW:
                connection.recv(1)
                lib.us_nvme_pong(connection.fileno(), ASK, ANSWER, self._spin)
                return
            with self._lock:
                session = self._target.accept(time.monotonic())
            if self._greet(connection, session):
                self._move(connection, session)
            with self._lock:
                session.eof_received(time.monotonic())

    def _greet(self, connection: socket.socket, session: Session) -> bool:
        """Answer until the queue is one for I/O, and connected."""
        while not session.over:
            data = connection.recv(1 << 16)
            if not data:
                return False
            with self._lock:
                events = session.receive_data(data, time.monotonic())
                answers = b"".join(map(bytes, session.data_to_send()))
            assert all(isinstance(event, Closed) for event in events), "I/O on the admin queue"
            connection.sendall(answers)
            if session.controller is not None and session.queue.queue:
                return True
        return False

    def _move(self, connection: socket.socket, session: Session) -> None:
        form: pdu.Framing = session.queue.sending
        bare = ffi.new(
            "struct us_nvme_bare *",
            {
                "memory": self._memory,
                "blocks": self._blocks,
                "block_size": BLOCK,
                "header_digest": form.header_digest,
                "data_digest": form.data_digest,
                "spin": self._spin,
            },
        )
        lib.us_nvme_bare_serve(connection.fileno(), bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--spin", action="store_true")
    given = parser.parse_args()
    os.sched_setaffinity(0, [given.cpu])
    responder = Responder(given.blocks, given.spin)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_end_with_input, daemon=True).start()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=responder.serve, args=(connection,), daemon=True).start()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
