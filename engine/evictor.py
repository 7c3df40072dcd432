"""The asyncio half of eviction: writes batches of moved-out pages to stores that are awaited.

The native worker chooses victims, has them moved out and reads them; a batch that comes here holds
pages in LEAVING. Every batch ends in `us_write_done`, whatever the store does: pages that it did
not accept go back to memory.

Must not know: who chose the pages, how they came out, which store it is.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from userswap.backends.store import Run, StoreError, StoreFullError, TransientError
from userswap.engine.fault_loop import FaultLoop, Served, cancel_all, start
from userswap.engine.gate import Urgency
from userswap.native import ffi, lib

log = logging.getLogger("userswap.pager")

PAGE = 4096
BATCHES = 16
TRANSIENT_TRIES = 5
RETRY_FIRST_S = 0.002


class Evictor:
    """Writes one client's batches."""

    def __init__(self, client: Any, loop: FaultLoop) -> None:
        self.client = client
        self._loop = loop
        self._numbers = ffi.new("uint32_t[]", BATCHES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._complained: set[str] = set()

    def drain(self) -> None:
        """Start a write for each batch that is there."""
        count = lib.us_take_writes(self.client, self._numbers, BATCHES)
        for number in list(self._numbers[0:count]):
            report = ffi.new("struct us_batch_report *")
            lib.us_batch_report(self.client, number, report)
            region = self._loop.region(report.region)
            region.transfers.begin()
            task = start(self._write(region, number, report))
            if not task.done():
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _write(self, region: Served, number: int, report: Any) -> None:
        accepted, full = 0, False
        try:
            await region.gate.enter(Urgency.WRITE_BACK)
        except asyncio.CancelledError:
            self._done(region, number, 0, False)
            raise
        try:
            runs = _runs(region, report)
            if await self._accepted(region, [run for run, _ in runs]):
                accepted = report.moved
            else:
                # One run that is refused takes no other along.
                for run, bits in runs:
                    if await self._accepted(region, [run]):
                        accepted |= bits
                full = accepted != report.moved
        finally:
            region.gate.leave()
            self._done(region, number, accepted, full)

    def _done(self, region: Served, number: int, accepted: int, full: bool) -> None:
        lib.us_write_done(self.client, number, accepted, full)
        region.transfers.end()

    async def _accepted(self, region: Served, runs: list[Run]) -> bool:
        delay = RETRY_FIRST_S
        for _ in range(TRANSIENT_TRIES):
            try:
                await region.store.write(runs)
                return True
            except TransientError:
                await asyncio.sleep(delay)
                delay *= 4
            except StoreFullError as error:
                self.complain(region, f"is full: {error}")
                return False
            except StoreError as error:
                self.complain(region, f"does not take pages: {error}")
                return False
            except Exception:
                log.exception("%s: the store %s broke its contract", region.name, region.url)
                return False
        self.complain(region, "does not answer writes")
        return False

    def complain(self, region: Served, what: str) -> None:
        """Log what is wrong with a store, once."""
        if region.url not in self._complained:
            self._complained.add(region.url)
            log.warning(
                "%s: the store %s %s; its pages stay in memory", region.name, region.url, what
            )

    async def cancel(self) -> None:
        """The client is gone: nobody needs the pages any more."""
        await cancel_all(self._tasks)


def _runs(region: Served, report: Any) -> list[tuple[Run, int]]:
    """The batch's pages as runs of consecutive indices, each with its bits of the batch."""
    runs: list[tuple[Run, int]] = []
    whole = memoryview(ffi.buffer(report.buffer, report.pages * PAGE)).cast("B")
    slot = 0
    while slot < report.pages:
        if not report.moved >> slot & 1:
            slot += 1
            continue
        end = slot + 1
        while (
            end < report.pages
            and report.moved >> end & 1
            and report.index[end] == report.index[end - 1] + 1
        ):
            end += 1
        run = Run(region.base + report.index[slot], whole[slot * PAGE : end * PAGE])
        runs.append((run, ((1 << end) - 1) & ~((1 << slot) - 1)))
        slot = end
    return runs
