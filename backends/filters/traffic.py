"""Who is at work on which pages, of the callers of a store and of its own work behind them.

Responsible for: keeping the two apart. Callers see to it themselves that no two of them meet; work
behind them begins only where no caller is in its way, and a caller who changes pages waits for work
that is under way on them. Nobody waits to read: a page's content stays where it is while work is
under way, or work does not begin while it is read.
Must not know: what the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence


class Traffic:
    """Pages in use."""

    def __init__(self) -> None:
        self._read: list[range] = []
        self._changed: list[range] = []
        self._work: dict[int, asyncio.Event] = {}
        self._ended = asyncio.Event()

    def may_copy(self, page: int) -> bool:
        """Whether work may begin that leaves the page's content where it is."""
        return page not in self._work and not any(page in pages for pages in self._changed)

    def may_move(self, page: int) -> bool:
        return self.may_copy(page) and not any(page in pages for pages in self._read)

    @contextlib.contextmanager
    def reading(self, pages: Sequence[range]) -> Iterator[None]:
        self._read.extend(pages)
        try:
            yield
        finally:
            self._leave(self._read, pages)

    @contextlib.asynccontextmanager
    async def changing(self, pages: Sequence[range]) -> AsyncIterator[None]:
        self._changed.extend(pages)  # at once: no work begins on them while we wait
        try:
            for page, event in list(self._work.items()):
                if any(page in some for some in pages):
                    await event.wait()
            yield
        finally:
            self._leave(self._changed, pages)

    def begin(self, pages: Iterable[int]) -> Callable[..., None]:
        """Work begins on pages; what is returned ends it."""
        event = asyncio.Event()
        taken = dict.fromkeys(pages, event)
        self._work.update(taken)

        def end(*_: object) -> None:
            for page in taken:
                del self._work[page]
            event.set()
            self._end()

        return end

    async def something_ended(self) -> None:
        await self._ended.wait()

    def _leave(self, where: list[range], pages: Sequence[range]) -> None:
        for some in pages:
            where.remove(some)
        self._end()

    def _end(self) -> None:
        self._ended.set()
        self._ended = asyncio.Event()
