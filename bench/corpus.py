"""Real data for demonstrations: files that every installation has, packed one after the other.

Compressed memory is judged by what it does to real data, so nothing here is made up: the running
Python's own files first, then /usr/lib. What was read is remembered by length and SHA-256, taken
from the bytes that were copied, so that a file replaced meanwhile is no loss.

Bytes go through ordinary reads into the process's own memory and are copied from there: a region
for user-mode faults only cannot be the target of a system call.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20
"""Bytes between two signs of life; also how long Ctrl-C may have to wait."""
SMALL_REST = 64 << 10
"""Room too small to go on looking for files that fit."""


@dataclass(frozen=True, slots=True)
class Candidate:
    path: Path
    length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One file's bytes in memory and what they must hash to."""

    path: Path
    offset: int
    length: int
    digest: bytes


def default_roots() -> list[Path]:
    return [Path(sysconfig.get_path("stdlib")), Path(sys.prefix, "lib"), Path("/usr/lib")]


def choose(roots: Iterable[Path], capacity: int, advance: Callable[[int], None]) -> list[Candidate]:
    """Files that fit into `capacity` bytes together, each once however many names it has."""
    chosen: list[Candidate] = []
    seen: set[tuple[int, int]] = set()
    room = capacity
    for path in _walk(roots):
        if room == 0:
            break
        try:
            entry = path.lstat()
        except OSError:
            continue
        identity = entry.st_dev, entry.st_ino
        if not stat.S_ISREG(entry.st_mode) or not 0 < entry.st_size <= room or identity in seen:
            continue
        seen.add(identity)
        chosen.append(Candidate(path, entry.st_size))
        room -= entry.st_size
        advance(entry.st_size)
        if room < SMALL_REST:
            break
    return chosen


def _walk(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        for folder, names, files in os.walk(root):
            names.sort()
            for name in sorted(files):
                yield Path(folder, name)


def load(
    memory: memoryview, candidates: Iterable[Candidate], advance: Callable[[int], None]
) -> list[Piece]:
    """Copy the files into memory, as far as they can be read and no further than they were long."""
    pieces = []
    offset = 0
    for candidate in candidates:
        digest = hashlib.sha256()
        end = offset
        try:
            with open(candidate.path, "rb") as file:
                while data := file.read(min(CHUNK, offset + candidate.length - end)):
                    memory[end : end + len(data)] = data
                    digest.update(data)
                    end += len(data)
                    advance(len(data))
        except OSError:
            continue
        if end > offset:
            pieces.append(Piece(candidate.path, offset, end - offset, digest.digest()))
        offset = end
    return pieces


def intact(memory: memoryview, piece: Piece, advance: Callable[[int], None]) -> bool:
    """Whether the piece still hashes to what was put in."""
    digest = hashlib.sha256()
    end = piece.offset + piece.length
    for offset in range(piece.offset, end, CHUNK):
        with memory[offset : min(offset + CHUNK, end)] as data:
            digest.update(data)
            advance(len(data))
    return digest.digest() == piece.digest
