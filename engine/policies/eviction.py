"""Eviction policies by name, as pure objects.

The policies are C (native/eviction.h says what one is). This is the same code for tests and tools:
no region, no clock, no I/O.
"""

from __future__ import annotations

from userswap.native import ffi, lib

WHOLE = 256
"""The tail is a share of this."""


def names() -> list[str]:
    """The policies that exist; the first is the default."""
    found: list[str] = []
    while (name := lib.us_eviction_name(len(found))) != ffi.NULL:
        found.append(ffi.string(name).decode())
    return found


class Evictor:
    """One policy with a state of its own, for pages below `pages` of which `capacity` may stay."""

    def __init__(
        self,
        name: str,
        *,
        pages: int,
        capacity: int,
        tail: int = 0,
        least: int = 0,
        hits_seen: bool = False,
        seed: int = 1,
    ) -> None:
        """Raises KeyError when there is no policy of that name."""
        self._policy = lib.us_eviction_find(name.encode())
        if self._policy == ffi.NULL:
            raise KeyError(name)
        policy = self._policy
        setting = ffi.new(
            "struct us_eviction_setting *", [pages, capacity, tail, least, hits_seen, seed]
        )
        state = lib.us_eviction_open(policy, setting)
        if state == ffi.NULL:
            raise MemoryError
        self._state = ffi.gc(state, lambda state: lib.us_eviction_close(policy, state))
        self._page = ffi.new("uint32_t *")

    def insert(self, page: int, *, ahead: bool = False) -> None:
        """`page`, which is not here, came in; ahead: nobody has touched it yet."""
        if not lib.us_eviction_insert(self._policy, self._state, page, ahead):
            raise MemoryError

    def touch(self, page: int) -> None:
        """A touch that was seen."""
        lib.us_eviction_touch(self._policy, self._state, page)

    def stage(self) -> int | None:
        """The next page to take out of the program's sight; None: the tail is long enough."""
        return self._named(lib.us_eviction_stage(self._policy, self._state, self._page))

    def victim(self) -> int | None:
        """The page that goes, and is not here any more; None: there is none."""
        return self._named(lib.us_eviction_victim(self._policy, self._state, self._page))

    def resize(self, capacity: int, tail: int = 0) -> None:
        lib.us_eviction_resize(self._policy, self._state, capacity, tail)

    def _named(self, found: bool) -> int | None:
        return self._page[0] if found else None
