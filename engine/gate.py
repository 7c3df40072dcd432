"""How much may be under way in one store, and who goes first.

A store that is slow must not fill the pager's memory with work that waits for it, and a thread
that sleeps in a fault must not queue behind pages that merely leave. So at most `most` operations
are in the store; of those that wait the most urgent is let in first, and the last quarter of the
places is kept for demand.

Must not know: stores, pages, what an operation is.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from enum import IntEnum

OPERATIONS_MAX = 64


class Urgency(IntEnum):
    """What an operation is for; the lower, the earlier."""

    DEMAND = 0
    READAHEAD = 1
    WRITE_BACK = 2


class Gate:
    """The entrance of one store."""

    def __init__(self, most: int = OPERATIONS_MAX) -> None:
        self._most = most
        self._inside = 0
        self._waiting: list[tuple[Urgency, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def _has_room(self, urgency: Urgency) -> bool:
        places = self._most if urgency == Urgency.DEMAND else self._most - self._most // 4
        return self._inside < places

    async def enter(self, urgency: Urgency) -> None:
        """Return when the operation may begin; each return is paired with one `leave`."""
        if self._has_room(urgency) and (not self._waiting or urgency < self._waiting[0][0]):
            self._inside += 1
            return
        place = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (urgency, next(self._numbers), place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()  # it was let in while it was given up
            raise

    def leave(self) -> None:
        """The operation has ended."""
        self._inside -= 1
        while self._waiting and (self._waiting[0][2].done() or self._has_room(self._waiting[0][0])):
            place = heapq.heappop(self._waiting)[2]
            if not place.done():
                self._inside += 1
                place.set_result(None)
