"""Prefetch policies by name, as pure objects.

The policies are C (native/readahead.h says what one is), because they run on the fault path. This
is the same code for tests and tools: no region, no clock, no I/O.
"""

from __future__ import annotations

from userswap.native import ffi, lib


def names() -> list[str]:
    """The policies that exist; the first is the default."""
    found: list[str] = []
    while (name := lib.us_prefetch_name(len(found))) != ffi.NULL:
        found.append(ffi.string(name).decode())
    return found


class Prefetcher:
    """One policy with a state of its own."""

    def __init__(self, name: str) -> None:
        """Raises KeyError when there is no policy of that name."""
        self._policy = lib.us_prefetch_find(name.encode())
        if self._policy == ffi.NULL:
            raise KeyError(name)
        self._state = ffi.gc(lib.us_prefetch_new(self._policy), lib.us_prefetch_free)

    def fault(self, page: int) -> range:
        """A demand fault on `page`: the pages to read ahead, nearest first, not yet clipped."""
        ahead = lib.us_prefetch_fault(self._policy, self._state, page)
        first = page + ahead.stride
        return range(first, first + ahead.stride * ahead.count, ahead.stride or 1)
