"""Memory under test, whoever pages it: what the sides of a comparison have in common."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import Any


class Paged(ABC):
    """Lives in the touching process. `buffer` is anything that cffi can take an address of."""

    buffer: Any

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """What the pager says of itself."""

    @abstractmethod
    def evict(self) -> None:
        """Send all pages to the store, then make room for all of them again."""

    @abstractmethod
    def close(self) -> None: ...


class KernelMemory(Paged):
    """Anonymous memory of base pages. Its budget is its control group's, from outside."""

    def __init__(self, size: int) -> None:
        self.buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffer.madvise(mmap.MADV_NOHUGEPAGE)

    def stats(self) -> dict[str, Any]:
        return {}

    def evict(self) -> None:
        raise NotImplementedError("the control group decides what stays")

    def close(self) -> None:
        self.buffer.close()
