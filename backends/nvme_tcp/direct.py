"""An I/O queue on a socket of its own, without a transport between them.

Responsible for: a socket that does not block; one call that receives, places and completes what has
come; one that sends all commands of a turn of the loop; and the queue's timer.
Invariants:
 1. What is sent is read from the callers' buffers by the call that sends it: the queue says when
    they are free.
 2. After `drop`, or the last word of a queue that ended, the loop knows nothing of the socket.
Must not know: what requests are for, when to connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from userswap.backends.nvme_tcp.native_queue import NativeQueuePair
from userswap.backends.nvme_tcp.qpair import Event

LOOK_NS = 30_000
"""How long to look for the answer to a single command: about what sleeping and waking takes."""
LATE_MAX = 3
"""Answers in a row that did not come meanwhile, then the target is taken for a distant one..."""
LOOK_AGAIN = 64
"""...for so many commands."""


class DirectConnection:
    """One queue on one socket. `told` is called with what the queue has to tell, but for most
    completions: those go to `answered`, as CID | status << 16."""

    def __init__(
        self,
        pair: NativeQueuePair,
        told: Callable[[list[Event]], None],
        answered: Callable[[list[int]], None],
        linger: float,
    ) -> None:
        self._pair = pair
        self._told = told
        self._answered = answered
        self._linger = linger
        """Seconds that a peer has to take a TermReq."""
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._number = -1
        self._rest = b""
        """What the socket did not take of what is not C's to send."""
        self._flushes = False
        """`_flush` will be called: in this turn, or when the socket takes more."""
        self._timer: asyncio.TimerHandle | None = None
        self._late = LATE_MAX
        self._looked = False
        """In this turn of the loop."""
        self._crowded = False
        """Several answers came together, the last time that some did."""

    @property
    def was_closed(self) -> bool:
        """The peer closed it: it has done with what it had."""
        return self._pair.was_closed

    async def open(self, address: tuple[str, int]) -> None:
        """Connect; OSError where nobody answers."""
        found = await self._loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
        for number, (family, kind, protocol, _, place) in enumerate(found, 1):
            each = socket.socket(family, kind, protocol)
            try:
                each.setblocking(False)
                await self._loop.sock_connect(each, place)
            except BaseException as error:
                each.close()
                if not isinstance(error, OSError) or number == len(found):
                    raise
            else:
                break
        if self._pair.error is not None:  # it was dropped meanwhile
            each.close()
            return
        with contextlib.suppress(OSError):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._number = each, each.fileno()
        self._loop.add_reader(self._number, self._receive)
        self._flush()

    def transmit(self) -> None:
        """Send what waits: at once where nothing is on its way, else when this turn of the loop
        has brought all that comes with it."""
        if self._flushes or self._socket is None:
            return
        if self._pair.outstanding <= 1:
            self._flush()
        else:
            self._flushes = True
            self._loop.call_soon(self._flush)

    @property
    def is_near(self) -> bool:
        """`ask` would look for the answer, and found it the last time."""
        pair, quiet = self._pair, not (self._looked or self._crowded or self._flushes)
        return not self._late and quiet and not pair.outstanding and pair.direct

    def ask(self, now: float) -> None:
        """`transmit` of one command, and a look whether it is answered soon: a near target's
        answer is there before the loop could have gone to sleep, and its caller has not to wait.

        Not where others may follow in this turn of the loop, with which it had better be answered
        together; and hardly ever where it failed: all would wait for nothing.
        """
        pair = self._pair
        alone = pair.outstanding == 1 and not (self._looked or self._crowded or self._flushes)
        if not alone or self._rest or not pair.direct:
            self.transmit()
            return
        if self._late > LATE_MAX:
            self._late -= 1
            self.transmit()
            return
        self._looked = True
        self._loop.call_soon(self._turn)
        answers, events = pair.exchange(self._number, now, LOOK_NS)
        if not pair.was_late:
            self._late = 0
        elif self._late == LATE_MAX:
            self._late += LOOK_AGAIN
        else:
            self._late += 1
        self._came(answers, events)
        if self._timer is None:
            self._arm()

    def _turn(self) -> None:
        self._looked = False

    def drop(self) -> None:
        """End the connection at once; nobody is told."""
        self._pair.close()
        self._leave(linger=0)

    # --- inside ---

    def _receive(self) -> None:
        pair = self._pair
        now = self._loop.time()
        if pair.direct:
            answers, events = pair.receive_answers(self._number, now)
            self._crowded = len(answers) > 1
            self._came(answers, events)
        else:
            self._came([], self._receive_slowly(now))

    def _came(self, answers: list[int], events: list[Event]) -> None:
        if answers:
            self._answered(answers)
        if events:
            self._told(events)
        if self._pair.has_answers or not self._pair.direct:
            self._flush()

    def _receive_slowly(self, now: float) -> list[Event]:
        """What is not C's to receive."""
        assert self._socket is not None
        pair = self._pair
        try:
            count = self._socket.recv_into(pair.get_buffer())
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            count = 0
        if not count:
            pair.was_closed = True
            return pair.eof_received()
        return pair.buffer_updated(count, now)

    def _flush(self) -> None:
        self._flushes = False
        if self._socket is None:
            return
        pair = self._pair
        if pair.direct and not self._rest:
            sent = pair.send(self._number)
        else:
            sent = self._send_slowly(self._socket)
        if pair.error is not None:
            self._leave(self._linger)
        elif not sent:
            self._flushes = True
            self._loop.add_writer(self._number, self._writable)
        if self._timer is None:
            self._arm()

    def _send_slowly(self, to: socket.socket) -> bool:
        self._rest += b"".join(self._pair.data_to_send())
        if self._rest:
            with contextlib.suppress(OSError):  # `_receive` learns of it
                self._rest = self._rest[to.send(self._rest, socket.MSG_NOSIGNAL) :]
        return not self._rest

    def _writable(self) -> None:
        self._loop.remove_writer(self._number)
        self._flush()

    def _leave(self, linger: float) -> None:
        each, self._socket = self._socket, None
        if self._timer is not None:
            self._timer.cancel()
        if each is None:
            return
        self._loop.remove_reader(self._number)
        self._loop.remove_writer(self._number)
        if linger:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_WR)
            self._loop.call_later(linger, each.close)
        else:
            each.close()

    def _arm(self) -> None:
        """Deadlines only grow: one timer is early enough for all of them."""
        due = self._pair.get_timer()
        if due is not None and self._socket is not None:
            self._timer = self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if events := self._pair.handle_timer(self._loop.time()):
            self._told(events)
        self._flush()
