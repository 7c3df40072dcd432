"""What was written to a namespace and no flush has confirmed yet.

Responsible for: being able to write all of it once more. A target with a volatile cache that is
started again has lost it, and whoever was told that a page was written has no other copy.
Invariants:
 1. What was written or zeroed is in here until a flush has returned that was sent after it.
 2. Of a unit only the last state is kept.
Must not know: commands, connections, pages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from userswap.backends.nvme_tcp.pdu import Buffer
from userswap.backends.ranges import Ranges

UNIT = 4096
"""Bytes of what is kept, written and zeroed."""


@dataclass(slots=True)
class _Epoch:
    """What came between two flushes."""

    written: dict[int, bytes] = field(default_factory=dict)
    zeroed: Ranges = field(default_factory=Ranges)

    def write(self, unit: int, data: bytes) -> None:
        self.written[unit] = data
        self.zeroed.remove(unit, 1)

    def zero(self, first: int, count: int) -> None:
        self.zeroed.add(first, count)
        gone = range(first, first + count)
        if count > len(self.written):
            gone_units = [unit for unit in self.written if unit in gone]
        else:
            gone_units = [unit for unit in gone if unit in self.written]
        for unit in gone_units:
            del self.written[unit]


class Unflushed:
    """See the module. The last epoch is open; those before it wait for their flush."""

    def __init__(self) -> None:
        self._epochs = deque([_Epoch()])
        self._sealed = 0

    @property
    def size(self) -> int:
        """Memory that it takes, in bytes."""
        return UNIT * sum(len(epoch.written) for epoch in self._epochs)

    def wrote(self, unit: int, data: Buffer) -> None:
        epoch = self._epochs[-1]
        view = memoryview(data)
        for at in range(0, len(view), UNIT):
            epoch.write(unit + at // UNIT, bytes(view[at : at + UNIT]))

    def zeroed(self, first: int, count: int) -> None:
        self._epochs[-1].zero(first, count)

    def seal(self) -> int:
        """A flush is sent now: it will confirm all that is in here; its mark."""
        self._epochs.append(_Epoch())
        self._sealed += 1
        return self._sealed

    def confirm(self, mark: int) -> None:
        """The flush of this mark has returned."""
        while self._sealed - len(self._epochs) + 1 < mark:
            self._epochs.popleft()

    def merge(self) -> tuple[dict[int, bytes], Ranges]:
        """All of it as it is to be, units with their data and ranges of zeros; whoever has written
        some of it again, and flushed, removes that. No mark confirms any of it any more."""
        merged = _Epoch()
        for epoch in self._epochs:
            for first, count in epoch.zeroed:
                merged.zero(first, count)
            for unit, data in epoch.written.items():
                merged.write(unit, data)
        self._sealed += 1
        self._epochs = deque([merged, _Epoch()])
        return merged.written, merged.zeroed
