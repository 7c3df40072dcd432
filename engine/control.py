"""Control messages between a client and its pager: JSON in SOCK_SEQPACKET, descriptors beside it.

One packet is one message, so there is no framing to get wrong. A request carries an id, its answer
the same id; answers may come in any order. Nothing on the fault path ever passes here.

Must not know: what the messages mean.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from userswap.engine.errors import PagerError, from_kind

MESSAGE_MAX = 65536
DESCRIPTORS_MAX = 8
SO_PEERPIDFD = 77

Message = dict[str, Any]


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that nobody takes."""
    for descriptor in descriptors:
        os.close(descriptor)


class Credentials(NamedTuple):
    """Who is at the other end of a connection, as the kernel knows it."""

    pid: int
    uid: int
    gid: int


def credentials(connection: socket.socket) -> Credentials:
    """The process that made the other end; for a listening one, the process that listened."""
    ucred = struct.Struct("iII")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size)
    return Credentials(*ucred.unpack(raw))


def open_peer(connection: socket.socket, pid: int) -> int:
    """A pidfd of the process that made the other end.

    Linux 6.5 gives it out for the connection itself; before that the number may be another's by
    now, where the process has ended and a child of it holds the connection.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid)


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message; raises OSError, BlockingIOError when a non-blocking socket is full."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    if len(payload) > MESSAGE_MAX:
        raise PagerError(f"a control message of {len(payload)} bytes is over {MESSAGE_MAX}")
    socket.send_fds(connection, [payload], list(descriptors))


def receive(connection: socket.socket) -> tuple[Message | None, list[int]]:
    """Receive one message and its descriptors; (None, []) at the end of the connection.

    Raises PagerError for what is not a whole JSON object; descriptors that came with it are closed.
    """
    # socket.recv_fds has no way to ask for CLOEXEC: a child started meanwhile would inherit them.
    received = array.array("i")
    room = socket.CMSG_SPACE(DESCRIPTORS_MAX * received.itemsize)
    payload, ancillary, flags, _ = connection.recvmsg(MESSAGE_MAX, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data[: len(data) // received.itemsize * received.itemsize])
    descriptors = received.tolist()
    if not payload and not descriptors:
        return None, []
    try:
        return _understand(payload, flags), descriptors
    except (ValueError, RecursionError) as error:
        close_all(descriptors)
        raise PagerError(f"a control message cannot be understood: {error}") from None


def _understand(payload: bytes, flags: int) -> Message:
    if flags & socket.MSG_TRUNC:
        raise ValueError(f"it is longer than {MESSAGE_MAX} bytes")
    if flags & socket.MSG_CTRUNC:
        raise ValueError("descriptors that came with it were lost: raise `ulimit -n`")
    message = json.loads(payload)
    if not isinstance(message, dict):
        raise ValueError("it is not an object")
    return message


class Pending:
    """A request under way."""

    def __init__(self) -> None:
        self._answers: SimpleQueue[tuple[Message, list[int]] | PagerError] = SimpleQueue()
        self._lock = threading.Lock()
        self._given_up = False

    def settle(self, answer: tuple[Message, list[int]] | PagerError) -> None:
        with self._lock:
            if not self._given_up:
                self._answers.put(answer)
            elif not isinstance(answer, PagerError):
                close_all(answer[1])

    def _give_up(self) -> None:
        """Nobody will wait any more: the descriptors of an answer that comes late are closed."""
        with self._lock:
            self._given_up = True
        with contextlib.suppress(Empty):
            self.settle(self._answers.get_nowait())

    def wait(self, timeout: float | None = None) -> Message:
        """The answer, whose descriptors come as "descriptors".

        Raises the error that the pager answered with; PagerError when it is gone, or when the time
        is up.
        """
        try:
            answer = self._answers.get(timeout=timeout)
        except BaseException as error:
            self._give_up()
            if isinstance(error, Empty):
                raise PagerError(f"the pager has not answered for {timeout:g} s") from None
            raise
        if isinstance(answer, PagerError):
            try:
                raise answer
            finally:
                del answer  # an error that refers to itself would hold what its callers hold
        message, descriptors = answer
        if not message.get("ok"):
            close_all(descriptors)
            raise from_kind(str(message.get("kind")), str(message.get("error")))
        message["descriptors"] = descriptors
        return message


class Caller:
    """The client's end: requests from any thread, each waiting for its own answer.

    One thread receives, and it is none of those that wait: a wait may be given up at any point.
    Packets are whole or not at all, so that sending needs no lock.
    """

    def __init__(
        self, connection: socket.socket, notice: Callable[[Message], None] = lambda message: None
    ) -> None:
        """`notice` hears, on the receiving thread, what comes without having been asked for."""
        self._connection = connection
        self._notice = notice
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Pending] = {}
        self._why_ended: str | None = None
        self._thread = threading.Thread(
            target=self._receive_all, name="userswap-answers", daemon=True
        )
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether there will be no more answers."""
        return self._why_ended is not None

    def begin(
        self, operation: str, /, descriptors: Sequence[int] = (), **arguments: Any
    ) -> Pending:
        """Send a request; raises PagerError when it cannot be sent."""
        number = next(self._numbers)
        pending = self._waiting[number] = Pending()
        try:
            send(self._connection, {"id": number, "op": operation, **arguments}, descriptors)
        except OSError as error:
            self._end(f"the pager is gone ({error.strerror})")
        except BaseException:
            self._waiting.pop(number, None)
            raise
        if self._why_ended is not None:
            self._end(self._why_ended)  # it may have ended before this one waited
        return pending

    def call(
        self,
        operation: str,
        /,
        descriptors: Sequence[int] = (),
        *,
        timeout: float | None = None,
        **arguments: Any,
    ) -> Message:
        """Send a request and wait for its answer; see Pending.wait for what is raised."""
        return self.begin(operation, descriptors, **arguments).wait(timeout)

    def close(self) -> None:
        """End the connection, for the other side too."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def abandon(self) -> None:
        """In a forked child: let go of the copy of the connection, which stays the parent's."""
        self._connection.close()

    def _receive_all(self) -> None:
        why = "the pager is gone"
        try:
            while True:
                message, descriptors = receive(self._connection)
                if message is None:
                    break
                self._deliver(message, descriptors)
        except PagerError as error:
            why = str(error)
        except OSError:
            pass
        self._end(why)

    def _deliver(self, message: Message, descriptors: list[int]) -> None:
        number = message.get("id")
        if type(number) is int and number in self._waiting:  # True is no number, though it equals 1
            self._waiting.pop(number).settle((message, descriptors))
            return
        close_all(descriptors)
        if "notice" in message:
            self._notice(message)

    def _end(self, why: str) -> None:
        # First the reason, then those who wait: who comes later sees the reason.
        self._why_ended = self._why_ended or why
        for number in list(self._waiting):
            pending = self._waiting.pop(number, None)
            if pending is not None:
                pending.settle(PagerError(self._why_ended))
