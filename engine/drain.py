"""The end of a daemon: regions go back to their programs as ordinary memory, where they fit.

Asked to end, the daemon takes nobody new and brings regions in, the one with least to bring first,
as far as the machine and the client's memory group have room; a region all of whose pages are in
memory is unregistered and let go of. What does not fit is served on, and tried again. The daemon
ends with its last region; no page is ever given up for it.

Must not know: sockets, how pages are brought in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from userswap.backends.grammar import format_size
from userswap.engine.connection import Connection
from userswap.engine.daemon import Daemon, Seat
from userswap.engine.desk import peer_name
from userswap.engine.notify import notify
from userswap.engine.page_table import State
from userswap.engine.served import OpenRegion
from userswap.native import ffi, lib

log = logging.getLogger("userswap.pager")

PAGE = 4096
AGAIN_S = 1.0
"""Between two tries to let regions go."""
SAY_EVERY_S = 30.0
"""What stays is told again."""
BUSY_S = 5.0
"""How long a program's own operation is waited for."""
RESERVE = 64 << 20
"""Memory that the machine keeps: bringing a region in must not bring it to its knees."""
GROUP_RESERVE = 4 << 20
"""And a memory group, whose members go on meanwhile."""
CHUNK_PAGES = 512
STEP_S = 0.002
STALLED_STEPS = 1000
MEMORY_GROUPS = "/sys/fs/cgroup"


class Drain:
    """The end of one daemon, once it is asked for."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.finished = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._under_way: dict[Seat, asyncio.Task[None]] = {}
        self._bringing = asyncio.Lock()
        self._kept: dict[Seat, str] = {}
        """Why a region stays for now."""

    def ask(self) -> None:
        """SIGTERM: begin; again, it repeats what is waited for."""
        if self._task is not None:
            self._say()
            return
        self.daemon.draining = True
        notify(STOPPING="1")
        log.info("pager asked to end: no new clients; regions go back to their programs")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        looks, deadline = 0, 0.0
        while self.daemon.seats:
            seats = [seat for seat in self.daemon.seats if seat.region is not None]
            for seat in sorted(seats, key=missing_bytes):
                if seat not in self._under_way:
                    self._start(seat)
            if time.monotonic() >= deadline and looks:
                self._say()
                deadline = time.monotonic() + SAY_EVERY_S
            looks += 1
            if self._under_way:
                await asyncio.wait(self._under_way.values(), timeout=AGAIN_S)
            if self._under_way or self._kept.keys() & set(self.daemon.seats):
                await asyncio.sleep(AGAIN_S)
            else:
                await asyncio.sleep(0)
        self.finished.set()

    def _start(self, seat: Seat) -> None:
        task = asyncio.get_running_loop().create_task(self._let_go(seat))
        self._under_way[seat] = task
        task.add_done_callback(lambda _: self._under_way.pop(seat))

    def _say(self) -> None:
        waiting = []
        for seat in self.daemon.seats:
            if seat.region is not None:
                pid = seat.client.credentials.pid
                why = self._kept.get(seat, "being brought in")
                waiting.append(
                    f"{peer_name(pid)}[{pid}]/{seat.region.name} with "
                    f"{format_size(missing_bytes(seat))} to bring in ({why})"
                )
        text = f"ending, once these regions are closed or fit in memory: {'; '.join(waiting)}"
        log.info("%s", text)
        notify(STATUS=text)

    async def _let_go(self, seat: Seat) -> None:
        region, client = seat.region, seat.client
        if region is None or region.closing or seat.number in client.leaving:
            return
        try:
            async with self._bringing:  # one at a time: they share the room that there is
                why = await self._bring_in(seat, region)
            if not why:
                why = await self._release(seat, region, client)
        except OSError as error:
            why = str(error)
        if why:
            self._kept[seat] = why
            seat.releasing = False
            if seat in self.daemon.seats:
                self.daemon.restore_limit(seat)
        else:
            self._kept.pop(seat, None)

    async def _bring_in(self, seat: Seat, region: OpenRegion) -> str:
        """Bring the region's pages in beside its faults; why it stays, if it does."""
        if region.closing:  # or freed by now, after its wait for those before it
            return "it is being closed"
        seat.releasing = True
        region.operations.begin()  # it is not freed under us
        try:
            if why := no_room(seat, missing_bytes(seat)):
                return why
            lib.us_region_limit(region.handle, 2 * region.pages * PAGE + RESERVE)
            for first in range(0, region.pages, CHUNK_PAGES):
                if why := await self._bring_chunk(seat, region, first):
                    return why
        finally:
            region.operations.end()
        return ""

    async def _bring_chunk(self, seat: Seat, region: OpenRegion, first: int) -> str:
        count = min(CHUNK_PAGES, region.pages - first)
        least, stalled = count + 1, 0
        while left := await self._restore(seat, region, first, count, 0):
            if region.closing or seat.client.ended.is_set():
                return "it is being closed"
            # Before each step: a page beyond what the group may have would end the client.
            if why := no_room(seat, left * PAGE):
                return why
            stalled = 0 if left < least else stalled + 1
            if stalled > STALLED_STEPS:
                return "its pages do not come in: its agent or its store does not answer"
            least = min(least, left)
            if await self._restore(seat, region, first, count, CHUNK_PAGES):
                await asyncio.sleep(STEP_S)
        return ""

    async def _restore(
        self, seat: Seat, region: OpenRegion, first: int, count: int, most: int
    ) -> int:
        """How many pages of a range are not in memory; at most so many are asked for."""
        service = seat.client.service
        assert service is not None
        return await service.beside(
            lambda: int(lib.us_region_restore(region.handle, first, count, most))
        )

    async def _release(self, seat: Seat, region: OpenRegion, client: Connection) -> str:
        """With nothing left outside, or almost: stop eviction, bring the rest, unregister."""
        service = client.service
        assert service is not None
        ended = client.leaving[seat.number] = asyncio.Event()
        try:
            try:  # those to come wait for `ended`
                await asyncio.wait_for(region.operations.settled(), BUSY_S)
            except TimeoutError:
                return "an operation of its program is under way"
            if region.closing:
                return "it is being closed"
            quiesced = asyncio.create_task(service.quiesce(region))
            for _ in range(STALLED_STEPS):
                if client.ended.is_set():
                    quiesced.cancel()
                    return "its program has ended"
                still = quiesced.done()  # what was looked at before that may have left since
                left = await self._restore(seat, region, 0, region.pages, CHUNK_PAGES)
                if not left and still:
                    break
                await asyncio.sleep(STEP_S)
            else:
                quiesced.cancel()
                return self._resume(region, "its agent or its store does not answer")
            final = service.stats(region)
            if lib.us_region_unregister(region.handle):
                return self._resume(region, "its memory cannot be unregistered")
            await service.close(seat.number, unmapped=False)
            client.released.add(seat.number)
            final["pages"] = {**final["pages"], State.STORED.name: 0}
            await client.tell({"notice": "released", "region": seat.number, "stats": final})
            if not service.regions:
                lib.us_client_let_go(service.native)
            log.info("%s[%d]/%s: let go of", peer_name(service.pid), service.pid, region.name)
            self.daemon.left(seat)
            return ""
        finally:
            del client.leaving[seat.number]
            ended.set()

    def _resume(self, region: OpenRegion, why: str) -> str:
        region.closing = False
        lib.us_region_resume(region.handle)
        return why


def missing_bytes(seat: Seat) -> int:
    """What is to be brought in of a region."""
    if seat.region is None or seat.region.closing:
        return 0
    states = ffi.new("uint64_t[]", len(State))
    lib.us_region_census(seat.region.handle, states)
    return int(states[State.STORED]) * PAGE


def no_room(seat: Seat, size: int) -> str:
    """Why so many bytes cannot come into a client's memory; nothing where they can."""
    room = room_for(seat.client.credentials.pid)
    return f"memory has room for {format_size(max(room, 0))} only" if room < size else ""


def room_for(pid: int) -> int:
    """Bytes that may come into a process's memory: what the machine has, and its memory groups."""
    room = _meminfo("MemAvailable") - RESERVE
    for used, limit in _groups(pid):
        room = min(room, limit - used - GROUP_RESERVE)
    return room


def _meminfo(name: str) -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _groups(pid: int) -> list[tuple[int, int]]:
    """(used, limit) of each memory group that a process is in and that has a limit."""
    found = []
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = ("memory.current", "memory.max")
        root = Path(MEMORY_GROUPS)
        if "memory" in controllers.split(","):
            names, root = ("memory.usage_in_bytes", "memory.limit_in_bytes"), root / "memory"
        elif controllers:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                used, limit = ((folder / name).read_text().strip() for name in names)
            except OSError:
                continue
            if limit != "max":
                found.append((int(used), int(limit)))
            if folder == root:
                break
    return found
