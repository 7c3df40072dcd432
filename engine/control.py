"""Control messages between a client and its pager: JSON in SOCK_SEQPACKET, descriptors beside it.

One packet is one message, so there is no framing to get wrong. A request carries an id, its answer
the same id; answers may come in any order. Nothing on the fault path ever passes here.

Must not know: what the messages mean.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from userswap.engine.errors import PagerError, from_kind

MESSAGE_MAX = 65536
DESCRIPTORS_MAX = 8

Message = dict[str, Any]


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message; raises OSError, BlockingIOError when a non-blocking socket is full."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    if len(payload) > MESSAGE_MAX:
        raise PagerError(f"a control message of {len(payload)} bytes is over {MESSAGE_MAX}")
    socket.send_fds(connection, [payload], list(descriptors))


def receive(connection: socket.socket) -> tuple[Message | None, list[int]]:
    """Receive one message and its descriptors; (None, []) at the end of the connection.

    Raises PagerError for what is not a JSON object; descriptors that came with it are closed.
    """
    payload, descriptors, flags, _ = socket.recv_fds(connection, MESSAGE_MAX, DESCRIPTORS_MAX)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if not payload:
        return None, []
    try:
        message = json.loads(payload)
        if not isinstance(message, dict) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("truncated" if flags else "not an object")
    except ValueError as error:
        for descriptor in descriptors:
            os.close(descriptor)
        raise PagerError(f"a control message cannot be understood: {error}") from None
    return message, descriptors


class Caller:
    """The client's end: requests from any thread, each waiting for its own answer.

    Whichever waiting thread holds the receive lock reads for all of them.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._send_lock = threading.Lock()
        self._state = threading.Condition()
        self._answers: dict[int, tuple[Message, list[int]]] = {}
        self._waiting: set[int] = set()
        self._receiving = False
        self._last_id = 0
        self._ended = False

    def call(self, operation: str, /, descriptors: Sequence[int] = (), **arguments: Any) -> Message:
        """Send a request and wait for its answer, whose descriptors come as "descriptors".

        Raises the error that the pager answered with; PagerError when it is gone.
        """
        with self._state:
            self._last_id += 1
            number = self._last_id
            self._waiting.add(number)
        try:
            try:
                with self._send_lock:
                    request = {"id": number, "op": operation, **arguments}
                    send(self.connection, request, descriptors)
            except OSError as error:
                raise PagerError(f"the pager is gone ({error.strerror})") from None
            answer, received = self._wait(number)
        finally:
            with self._state:
                self._waiting.discard(number)
        if not answer.get("ok"):
            raise from_kind(str(answer.get("kind")), str(answer.get("error")))
        answer["descriptors"] = received
        return answer

    def _wait(self, number: int) -> tuple[Message, list[int]]:
        while True:
            with self._state:
                while number not in self._answers and self._receiving and not self._ended:
                    self._state.wait()
                if number in self._answers:
                    return self._answers.pop(number)
                if self._ended:
                    raise PagerError("the pager is gone")
                self._receiving = True
            message: Message | None = None
            descriptors: list[int] = []
            ended = False
            try:
                message, descriptors = receive(self.connection)
                ended = message is None
            except OSError:
                ended = True
            finally:
                self._deliver(message, descriptors, ended)

    def _deliver(self, message: Message | None, descriptors: list[int], ended: bool) -> None:
        with self._state:
            self._receiving = False
            self._ended = self._ended or ended
            if message is not None and message.get("id") in self._waiting:
                self._answers[int(message["id"])] = (message, descriptors)
            else:
                for descriptor in descriptors:
                    os.close(descriptor)
            self._state.notify_all()
