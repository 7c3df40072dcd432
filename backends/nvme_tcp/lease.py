"""Whose namespace it is now: a record in its last 4 KiB, which its user renews.

Responsible for: that a namespace has one user, though any number of hosts can reach it (few targets
know reservations); and for noticing, when it was out of reach, that somebody else took it or that
it came back without what was written to it. Where there is no record yet, none is written before
the user's first write; one that was given back says that the namespace is for us to take at once.
Must not know: connections, pages.

A record names the process that wrote it: who dies on this machine leaves a namespace that is free
at once. Of all others a record that does not change for WATCH_S is one that nobody renews.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from struct import Struct

from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.unflushed import UNIT

RENEW_S = 1.5
FRESH_S = 3.0
"""A lease that was not renewed for so long, because this process stood still perhaps, is looked at
before anything is written: nobody else takes it before WATCH_S."""
WATCH_S = 6.0
LOOK_S = 0.25
SETTLE_S = 0.1
"""Between writing a record and reading it: who took the namespace at the same time has by then."""
MAGIC = b"userswap lease 1"
_RECORD = Struct("<16s16sQ36sIQQ64s")  # as in Record and Process
_CRC = Struct("<I")
_ZEROS = bytes(UNIT)
_NOBODY = bytes(16)
_held: set[bytes] = set()
"""Tokens of this process."""


class InUseError(Exception):
    """The namespace is somebody else's now, or not what it was; the message goes on about it."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of some machine that has some name."""

    boot: str
    number: int
    start: int
    names: int
    """its namespace of process numbers"""
    machine: str

    @classmethod
    def this(cls) -> Process:
        boot = _text("/proc/sys/kernel/random/boot_id")
        names = os.stat("/proc/self/ns/pid").st_ino
        return cls(boot, os.getpid(), _start_of(os.getpid()), names, os.uname().nodename)

    @property
    def is_gone(self) -> bool:
        """It is one of this machine's that has ended; where that cannot be told: False."""
        here = Process.this()
        if (self.boot, self.names) != (here.boot, here.names):
            return False
        return _start_of(self.number) != self.start


@dataclass(frozen=True, slots=True)
class Record:
    token: bytes
    counter: int
    holder: Process

    def pack(self) -> bytes:
        holder = self.holder
        page = bytearray(UNIT)
        _RECORD.pack_into(
            page, 0, MAGIC, self.token, self.counter, holder.boot.encode(), holder.number,
            holder.start, holder.names, holder.machine.encode()[:64],
        )  # fmt: skip
        _CRC.pack_into(page, _RECORD.size, pdu.crc32c(page[: _RECORD.size]))
        return bytes(page)

    @classmethod
    def parse(cls, page: bytes) -> Record | None:
        """None: it is no record."""
        magic, token, counter, boot, number, start, names, machine = _RECORD.unpack_from(page)
        (crc,) = _CRC.unpack_from(page, _RECORD.size)
        if magic != MAGIC or crc != pdu.crc32c(page[: _RECORD.size]):
            return None
        texts = (text.rstrip(b"\0").decode(errors="replace") for text in (boot, machine))
        boot_id, machine_name = texts
        return cls(token, counter, Process(boot_id, number, start, names, machine_name))


class Lease:
    """One user's. `read`, `write` and `flush` are about the last 4 KiB, and may raise
    ProtocolErrors: then the way is lost, and `check` comes before anything else."""

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        write: Callable[[bytes], Awaitable[None]],
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        self._read, self._write, self._flush = read, write, flush
        self._token = secrets.token_bytes(16)
        self._counter = 0
        self._seen: bytes | None = None
        """What was there, while the namespace is not ours."""
        self._began = False
        self._renewed = 0.0
        self.is_taken = False

    @property
    def is_foreign(self) -> bool:
        """There is something that is no record, and not zeros."""
        known = self.is_taken or self._seen in (None, _ZEROS) or self.is_known
        return not known

    @property
    def is_known(self) -> bool:
        """There is a record: the namespace was used by one of us."""
        return self._seen is not None and Record.parse(self._seen) is not None

    def is_fresh(self, now: float) -> bool:
        """It is taken, and nobody can have taken it away."""
        return self.is_taken and now < self._renewed + FRESH_S

    async def check(self) -> None:
        """The namespace can be reached, again perhaps. An InUseError says why it must not be."""
        page = await self._read()
        found = Record.parse(page)
        ours = found is not None and found.token == self._token
        if self._seen is None:
            self._seen = await self._watch(page, found)
        elif self.is_taken and not ours:
            if found is not None:
                raise InUseError(f"was taken by {_name(found)} while it was out of reach")
            raise InUseError("has come back without what was written to it")
        elif self.is_taken:
            await self._put()
        elif page != self._seen and not (ours and self._began):
            raise InUseError(f"was taken by {_name(found)}" if found else "was changed by others")

    async def take(self) -> None:
        """Before the first write. What it finds changed is an InUseError."""
        page = await self._read()
        found = Record.parse(page)
        ours = found is not None and found.token == self._token
        if page != self._seen and not ours:
            raise InUseError(f"was taken by {_name(found)}" if found else "was changed by others")
        self._began = True
        await self._put()
        await self._flush()
        await asyncio.sleep(SETTLE_S)
        await self._look()
        _held.add(self._token)
        self.is_taken = True

    async def renew(self) -> None:
        await self._look()
        await self._put()

    async def release(self) -> None:
        """Give it back, if it can be reached."""
        _held.discard(self._token)
        if self.is_taken:
            self.is_taken = False
            await self._look()
            await self._write(Record(_NOBODY, 0, Process.this()).pack())

    async def _look(self) -> None:
        found = Record.parse(await self._read())
        if found is None or found.token != self._token:
            raise InUseError(f"was taken by {_name(found)}" if found else "was changed by others")

    async def _put(self) -> None:
        now = asyncio.get_running_loop().time()
        self._counter += 1
        await self._write(Record(self._token, self._counter, Process.this()).pack())
        self._renewed = now

    async def _watch(self, page: bytes, found: Record | None) -> bytes:
        """What is there, if nobody renews this record."""
        if found is None or found.token == _NOBODY or found.holder.is_gone:
            return page
        if found.holder == Process.this() and found.token not in _held:
            return page
        loop = asyncio.get_running_loop()
        until = loop.time() + WATCH_S
        while found.token not in _held:
            if loop.time() >= until:
                return page
            await asyncio.sleep(LOOK_S)
            now = await self._read()
            changed = Record.parse(now)
            if changed is None or changed.token == _NOBODY:
                return now
            if now != page:
                break
        raise InUseError(f"is in use by {_name(found)}")


def _name(record: Record) -> str:
    holder = record.holder
    if holder.boot == Process.this().boot:
        return f"process {holder.number} of this machine"
    return f"process {holder.number} of {holder.machine}"


def _start_of(process: int) -> int:
    """When a process was started, in ticks since the boot; 0: there is none, or its end alone."""
    fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else 0


def _text(path: str) -> str:
    try:
        return FilePath(path).read_text().strip()
    except OSError:
        return ""
