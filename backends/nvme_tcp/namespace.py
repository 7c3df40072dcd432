"""A namespace that is reached over a Path: what it can do, whose it is, what it may have lost.

Responsible for: seeing, with every association, that the namespace is the one that it was and still
this user's; writing once more what no flush had confirmed; and zeros.
Invariants:
 1. Nothing is written before `take`, so that who looks at what is somebody else's changes nothing.
 2. What was answered is in the namespace, or kept in memory until it is.
Must not know: pages, connections (reconnect.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence

from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import Command, Status, code_of
from userswap.backends.nvme_tcp.host import HostController, Request
from userswap.backends.nvme_tcp.lease import RENEW_S, InUseError, Lease
from userswap.backends.nvme_tcp.pdu import ProtocolError
from userswap.backends.nvme_tcp.reconnect import NAME, Path
from userswap.backends.nvme_tcp.unflushed import UNIT, Unflushed
from userswap.backends.nvme_tcp.url import Place
from userswap.backends.store import StoreError, StoreFailedError

TRANSFER_MAX = 128 << 10
"""Bytes of one command: a page that somebody waits for is not to stand behind a MiB."""
ZEROES_MAX = 8 << 20
ZEROES_AT_ONCE = 8
"""Bytes of one Write Zeroes, and how many at once: a slow target may have to write them all, and
has to do that well within the time after which a silent one is given up."""
BLOCKS_MAX = 1 << 16  # of one command
AT_ONCE = 64
"""Commands that write units again."""
LEAVE_S = 2.0
ONCS_NOT_SUPPORTED = 0x180
_NOT_DONE = {Status.INVALID_OPCODE, Status.INVALID_FIELD, ONCS_NOT_SUPPORTED}


class RemoteNamespace:
    """See the module. Its units are of 4 KiB, the last of which is not for use.

    `left` is told which requests a lost association may still obey, and for how many seconds.
    """

    def __init__(self, place: Place, left: Callable[[list[Request], float], None]) -> None:
        self.name = place.name
        self.nsid = place.settings.nsid
        self.path = Path(
            place.address,
            place.settings,
            place.patience,
            name=place.name,
            restore=self._restore,
            left=left,
        )
        self.lease = Lease(self._read_last, self._write_last, self._flush)
        self.unflushed: Unflushed | None = None
        """None: what was written is not volatile."""
        self.block = UNIT
        self.transfer = 0
        """bytes of one command, whole units"""
        self.queues = ""
        self._zeroes = 0  # bytes of one Write Zeroes; 0: zeros are written
        self._hints = False
        self._identity: identify.Namespace | None = None
        self._taking = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None

    @property
    def units(self) -> int:
        assert self._identity is not None
        return self._identity.blocks * self.block // UNIT - 1

    def read(self, unit: int, units: int) -> Command:
        blocks = UNIT // self.block
        return nvme.read(self.nsid, unit * blocks, units * blocks)

    def write(self, unit: int, units: int) -> Command:
        return nvme.write(self.nsid, *self._blocks(unit, units))

    def zeros(self, unit: int, end: int) -> list[tuple[int, int, Command, bytes | None]]:
        """Commands, with their first and number of units and their data, that make zeros of units
        up to `end`; of as many as are good at once."""
        assert self._identity is not None
        commands: list[tuple[int, int, Command, bytes | None]] = []
        step = (self._zeroes or self.transfer) // UNIT
        data = None if self._zeroes else bytes(min(step, end - unit) * UNIT)
        while unit < end and len(commands) < ZEROES_AT_ONCE:
            units = min(step, end - unit)
            if data is not None:
                commands.append((unit, units, self.write(unit, units), data[: units * UNIT]))
            else:
                blocks = self._blocks(unit, units)
                zero = nvme.write_zeroes(self.nsid, *blocks, deallocate=self._identity.zeroing)
                commands.append((unit, units, zero, None))
            unit += units
        return commands

    def hint(self, unit: int, end: int) -> tuple[Command, bytes] | None:
        """What tells the target that it need not store these zeros, where they were written, and
        where zeros is what it would read instead."""
        assert self._identity is not None
        first, blocks = self._blocks(unit, end - unit)
        deallocated = self._zeroes and self._identity.zeroing
        if deallocated or not self._hints or not self._identity.zeros or blocks >= 1 << 32:
            return None
        return nvme.deallocate(self.nsid, [(first, blocks)])

    def zeros_otherwise(self, status: int) -> bool:
        """The controller does not zero blocks so: smaller parts, or else written zeros, may do."""
        if not self._zeroes or code_of(status) not in _NOT_DONE:
            return False
        self._zeroes = self.transfer if self._zeroes > self.transfer else 0
        return True

    async def take(self, *, everything: bool = False) -> None:
        """It is ours, from the first write on; one of `everything` may also lose what is there."""
        now = asyncio.get_running_loop().time
        async with self._taking:
            while not self.lease.is_fresh(now()):
                if self.path.error is not None:
                    raise self.path.error
                if self.lease.is_foreign and not everything:
                    raise self.refused("holds something else in its last 4 KiB")
                try:
                    await (self.lease.renew() if self.lease.is_taken else self.lease.take())
                except InUseError as error:
                    self.path.fail(self.refused(str(error)))
                except ProtocolError:
                    await self.path.wait()
            if self._renewing is None:
                self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def aclose(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        with contextlib.suppress(StoreError, ProtocolError, InUseError, TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self.lease.release()
        await self.path.aclose()

    def refused(self, why: str) -> StoreFailedError:
        return StoreFailedError(f"{self.name} {why}", store=NAME)

    # --- associations ---

    async def _restore(self, association: HostController) -> None:
        """There is an association: to what it was before?"""
        found, controller = association.ready.namespace, association.ready.controller
        self._compare(found)
        self._identity = found
        self.block = found.block_size
        transfer = min(controller.transfer or TRANSFER_MAX, TRANSFER_MAX, BLOCKS_MAX * self.block)
        transfer = transfer // UNIT * UNIT
        if transfer < self.transfer:
            raise self.refused(f"takes only {transfer} bytes at once now, not {self.transfer}")
        self.transfer = transfer
        knows_zeroes = controller.optional & identify.ONCS_WRITE_ZEROES
        self._zeroes = min(ZEROES_MAX, BLOCKS_MAX * self.block) if knows_zeroes else 0
        self._hints = bool(controller.optional & identify.ONCS_DATASET_MANAGEMENT)
        self.queues = f"{association.ready.queues} queues of {association.ready.entries}"
        if controller.volatile_cache and self.unflushed is None:
            self.unflushed = Unflushed()
        try:
            await self.lease.check()
        except InUseError as error:
            raise self.refused(str(error)) from None
        await self._rewrite()

    def _compare(self, found: identify.Namespace) -> None:
        if found.block_size > UNIT or UNIT % found.block_size:
            raise self.refused(f"has blocks of {found.block_size} bytes; 512 to 4096 will do")
        if found.metadata:
            raise self.refused(
                f"has {found.metadata} bytes of metadata with each block: format it without"
            )
        if found.blocks * found.block_size < 2 * UNIT:
            raise self.refused("is too small")
        known = self._identity
        if known is None:
            return
        if (found.nguid, found.block_size) != (known.nguid, known.block_size):
            raise self.refused("is another one now: its target was started without its data")
        if found.blocks * found.block_size // UNIT != known.blocks * known.block_size // UNIT:
            raise self.refused("has another size now")

    async def _rewrite(self) -> None:
        """What was answered, and may have been in a cache that lost its power: part by part, so
        that a way that is soon lost again leads somewhere."""
        if self.unflushed is None:
            return
        written, zeroed = self.unflushed.merge()
        while zeros := next(iter(zeroed), None):
            at, count = zeros
            commands = self.zeros(at, at + count)
            await self._again(
                [(command, data, range(at, at + n)) for at, n, command, data in commands]
            )
            zeroed.remove(at, commands[-1][0] + commands[-1][1] - at)
        while units := list(itertools.islice(written, AT_ONCE)):
            await self._again(
                [(self.write(unit, 1), written[unit], range(unit, unit + 1)) for unit in units]
            )
            for unit in units:
                del written[unit]

    async def _again(self, commands: Sequence[tuple[Command, bytes | None, range]]) -> None:
        path = self.path
        await asyncio.gather(
            *(path.must("written again", c, data=data, units=units) for c, data, units in commands)
        )
        path.counters.rewritten += len(commands)
        await self._flush()

    # --- the last unit ---

    async def _renew(self) -> None:
        while self.path.error is None:
            await asyncio.sleep(RENEW_S)
            try:
                await self.path.wait()
                await self.lease.renew()
            except InUseError as error:
                self.path.fail(self.refused(str(error)))
            except (ProtocolError, StoreFailedError):
                continue  # who restores the way looks

    async def _read_last(self) -> bytes:
        page = bytearray(UNIT)
        await self.path.must("lease", self.read(self.units, 1), into=memoryview(page))
        return bytes(page)

    async def _write_last(self, data: bytes) -> None:
        await self.path.must("lease", self.write(self.units, 1), data=data)

    async def _flush(self) -> None:
        if self.unflushed is not None:
            await self.path.must("flush", nvme.flush(self.nsid))

    def _blocks(self, unit: int, units: int) -> tuple[int, int]:
        """The first, and how many."""
        blocks = UNIT // self.block
        return unit * blocks, units * blocks
