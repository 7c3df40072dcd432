"""Fault traces as files: which pages were touched, when, by whom, and how it was answered.

A trace is a file TRACE and, where it was rotated, older ones TRACE.1, TRACE.2 and so on. A file is
a header and blocks (native/trace.h), each written by one call: of a writer that was killed, all is
there but at most the block that it was writing. What follows the last whole block is ignored.

Also oracleGeneral, the format of libCacheSim: 24 bytes a touch, and no more known than the time in
seconds, a number for a page, a size, and which touch of it is the next.

Must not know: what records a trace, what it is for.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

from userswap.engine.errors import UserswapError
from userswap.native import check, ffi, lib

MAGIC = b"userswap trace\0\1"
HEADER = struct.Struct("<16sQQQI")  # magic, pages of the region, resident, flags, checksum
ALL_TOUCHES, STORED = 1, 2
BLOCK_RECORDS = 4096
ORACLE = struct.Struct("<IQIq")
ORACLE_SIZE = 4096
NANOSECONDS = 1_000_000_000
PAGES_MAX = 1 << 32
DENSE_MAX = 1 << 26
GAP_MAX = 65
"""Pages farther apart than this are neighbours to no policy."""


class TraceError(UserswapError):
    """A file is not a trace, or cannot be one; the message says which and why."""

    kind = "trace"


class Kind(IntEnum):
    READ = lib.US_TRACE_READ
    WRITE = lib.US_TRACE_WRITE
    PROTECT = lib.US_TRACE_PROTECT
    PHASE = lib.US_TRACE_PHASE
    RESIDENT = lib.US_TRACE_RESIDENT


class Outcome(IntEnum):
    UNKNOWN = lib.US_TRACE_UNKNOWN
    ZERO = lib.US_TRACE_ZERO
    LOAD = lib.US_TRACE_LOAD
    AWAITED = lib.US_TRACE_AWAITED
    RESCUE = lib.US_TRACE_RESCUE
    THERE = lib.US_TRACE_THERE


@dataclass(frozen=True, slots=True)
class Head:
    """What a trace says of itself."""

    pages: int
    """Of the region: page numbers are below."""
    resident: int = 0
    """Pages that might be resident while it was recorded; touches of those are not in it."""
    all_touches: bool = False
    """Nothing was spared: recorded with next to nothing resident, or by something that sees all."""
    stored: bool = False
    """The pages had contents before the trace began: first touches are reads of the store."""


@dataclass(slots=True)
class Records:
    """Records by columns of the same length."""

    page: array[int] = field(default_factory=lambda: array("I"))
    thread: array[int] = field(default_factory=lambda: array("I"))
    time_ns: array[int] = field(default_factory=lambda: array("Q"))
    kind: bytearray = field(default_factory=bytearray)
    outcome: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.page)

    def __iter__(self) -> Iterator[tuple[int, int, int, Kind, Outcome]]:
        """Page, thread, time, kind, outcome of each."""
        columns = (self.page, self.thread, self.time_ns, self.kind, self.outcome)
        for page, thread, time_ns, kind, outcome in zip(*columns, strict=True):
            yield page, thread, time_ns, Kind(kind), Outcome(outcome)

    def append(
        self,
        page: int,
        *,
        thread: int = 0,
        time_ns: int = 0,
        kind: Kind = Kind.READ,
        outcome: Outcome = Outcome.UNKNOWN,
    ) -> None:
        self.page.append(page)
        self.thread.append(thread)
        self.time_ns.append(time_ns)
        self.kind.append(kind)
        self.outcome.append(outcome)

    def grow(self, count: int) -> None:
        """`count` records more, of zeros."""
        for column in (self.page, self.thread, self.time_ns):
            column.frombytes(bytes(count * column.itemsize))
        self.kind += bytes(count)
        self.outcome += bytes(count)

    @contextmanager
    def native(self) -> Iterator[Any]:
        """For C. Meanwhile the columns cannot grow."""
        columns = ffi.new("struct us_trace_columns *")
        buffers = [
            ffi.from_buffer("uint32_t[]", self.page),
            ffi.from_buffer("uint32_t[]", self.thread),
            ffi.from_buffer("uint64_t[]", self.time_ns),
            ffi.from_buffer("uint8_t[]", self.kind),
            ffi.from_buffer("uint8_t[]", self.outcome),
        ]
        columns.page, columns.thread, columns.time_ns, columns.kind, columns.outcome = buffers
        try:
            yield columns
        finally:
            for buffer in buffers:
                ffi.release(buffer)


@dataclass(slots=True)
class Trace:
    head: Head
    records: Records
    files: int = 1
    lost_bytes: int = 0
    """After the last whole block of a file: the writer was killed, or the file damaged."""

    def touches(self) -> tuple[array[int], list[tuple[int, int]]]:
        """The pages that were touched, in order; and the phases: before which touch, which."""
        pages, phases = array("I"), list[tuple[int, int]]()
        if Kind.PHASE not in self.records.kind and Kind.RESIDENT not in self.records.kind:
            return self.records.page, phases
        for page, kind in zip(self.records.page, self.records.kind, strict=True):
            if kind == Kind.PHASE:
                phases.append((len(pages), page))
            elif kind != Kind.RESIDENT:
                pages.append(page)
        return pages, phases

    @property
    def resident(self) -> int:
        """The most pages that might be resident at any time of the recording."""
        if Kind.RESIDENT not in self.records.kind:
            return self.head.resident
        rows = zip(self.records.page, self.records.kind, strict=True)
        return max(self.head.resident, *(page for page, kind in rows if kind == Kind.RESIDENT))


class Writer:
    """Writes a trace. A context manager; `write` may be called as often as wanted."""

    def __init__(
        self, path: str | Path, head: Head, *, rotate_bytes: int = 0, keep: int = 1
    ) -> None:
        """With `rotate_bytes`, a file that is larger becomes TRACE.1, and so on up to `keep`."""
        self._path, self._head = Path(path), head
        self._rotate_bytes, self._keep = rotate_bytes, keep
        self._block = ffi.new(
            "uint8_t[]", lib.US_TRACE_BLOCK_HEADER + BLOCK_RECORDS * lib.US_TRACE_RECORD_MAX
        )
        self._file, self._size = self._open()

    def _open(self) -> tuple[BinaryIO, int]:
        head, flags = self._head, 0
        flags |= ALL_TOUCHES if head.all_touches else 0
        flags |= STORED if head.stored else 0
        packed = HEADER.pack(MAGIC, head.pages, head.resident, flags, 0)
        packed = packed[:-4] + _checksum(packed).to_bytes(4, "little")
        try:
            file = open(self._path, "xb", buffering=0)  # noqa: SIM115
        except FileExistsError:
            raise TraceError(f"{self._path} exists: remove it or name another file") from None
        except OSError as error:
            raise TraceError(f"{self._path}: {error.strerror}") from None
        file.write(packed)
        return file, len(packed)

    def write(self, records: Records) -> None:
        with records.native() as columns:
            for first in range(0, len(records), BLOCK_RECORDS):
                count = min(BLOCK_RECORDS, len(records) - first)
                length = lib.us_trace_pack(columns, first, count, self._block)
                if self._rotate_bytes and self._size + length > self._rotate_bytes:
                    self._rotate()
                self._file.write(ffi.buffer(self._block, length))
                self._size += length

    def _rotate(self) -> None:
        self._file.close()
        oldest = numbered(self._path, self._keep)
        oldest.unlink(missing_ok=True)
        for number in range(self._keep - 1, -1, -1):
            if numbered(self._path, number).exists():
                os.replace(numbered(self._path, number), numbered(self._path, number + 1))
        self._file, self._size = self._open()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checksum(header: bytes) -> int:
    return int(lib.us_crc32c(0, header, len(header)))


def numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def read(path: str | Path) -> Trace:
    """A trace, with its older files before it. Raises TraceError."""
    path = Path(path)
    number = 0
    while numbered(path, number + 1).exists():
        number += 1
    records, lost, head = Records(), 0, Head(0)
    for each in range(number, -1, -1):
        head, file_lost = _read_file(numbered(path, each), records)
        lost += file_lost
    return Trace(head, records, number + 1, lost)


def _read_file(path: Path, records: Records) -> tuple[Head, int]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
        raise TraceError(f"{path} is no trace of ours: `userswap trace import` takes oracleGeneral")
    _, pages, resident, flags, checksum = HEADER.unpack_from(data)
    if _checksum(data[: HEADER.size - 4] + bytes(4)) != checksum:
        raise TraceError(f"{path}: its header is damaged")
    buffer, at, length = ffi.from_buffer("uint8_t[]", data), HEADER.size, ffi.new("uint64_t *")
    blocks, first, count = [], len(records), 0
    while (found := lib.us_trace_look(buffer + at, len(data) - at, length)) >= 0:
        blocks.append((at, first + count))
        count += found
        at += length[0]
    records.grow(count)
    with records.native() as columns:
        for block, begins in blocks:
            check(lib.us_trace_unpack(buffer + block, columns, begins))
    head = Head(pages, resident, bool(flags & ALL_TOUCHES), bool(flags & STORED))
    return head, len(data) - at


# --- oracleGeneral ---


def read_oracle(path: str | Path) -> Trace:
    """All that an oracleGeneral file tells, its numbers squeezed into pages where they are large.

    What was next to what remains so; what was far apart remains far apart.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    if not data or len(data) % ORACLE.size:
        raise TraceError(f"{path} is not oracleGeneral: {len(data)} bytes are not records of 24")
    numbers, seconds = array("Q"), array("Q")
    for time_s, number, _, _ in ORACLE.iter_unpack(data):
        numbers.append(number)
        seconds.append(time_s * NANOSECONDS)
    pages = _squeezed(numbers)
    records = Records(pages, array("I", bytes(4 * len(pages))), seconds)
    records.kind, records.outcome = bytearray(len(pages)), bytearray(len(pages))
    return Trace(Head(max(pages) + 1, all_touches=True, stored=True), records)


def _squeezed(numbers: array[int]) -> array[int]:
    if max(numbers) < DENSE_MAX:
        return array("I", numbers)
    place, last, page = {}, -1, -1
    for number in sorted(set(numbers)):
        page += min(number - last, GAP_MAX)
        last = number
        place[number] = page
    if page >= PAGES_MAX:
        raise TraceError("more pages than a region can have")
    return array("I", (place[number] for number in numbers))


def write_oracle(path: str | Path, pages: array[int], times_ns: Iterable[int]) -> None:
    """For libCacheSim: each touch with the number, from 1, of the next one of the same page."""
    following, latest = array("q", bytes(8 * len(pages))), dict[int, int]()
    for at in range(len(pages) - 1, -1, -1):
        following[at] = latest.get(pages[at], -2) + 1
        latest[pages[at]] = at
    packed = (
        ORACLE.pack(time_ns // NANOSECONDS, page, ORACLE_SIZE, after)
        for time_ns, page, after in zip(times_ns, pages, following, strict=True)
    )
    try:
        Path(path).write_bytes(b"".join(packed))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
