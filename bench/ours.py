"""userswap's side, inside the touching process: a region, and what it says of itself."""

from __future__ import annotations

from typing import Any

import userswap
from userswap.bench.paged import Paged

SMALLEST = 4 << 20
"""A budget that any region may have."""


class UserswapMemory(Paged):
    """A region, touched through its memoryview."""

    def __init__(self, size: int, resident: int, store: str) -> None:
        self._region = userswap.Region(size, resident=resident, store=store, name="bench")
        self.buffer = self._region.memory

    def stats(self) -> dict[str, Any]:
        return self._region.stats().as_dict()

    def evict(self) -> None:
        whole = self._region.resident
        self._region.resize_resident(SMALLEST)
        self._region.resize_resident(whole)

    def close(self) -> None:
        self.buffer.release()
        self._region.close()
