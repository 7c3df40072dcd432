"""The data that is paged: sample pages that native/touch.c stamps with page number and version.

`records` is made up: 16-byte records of four random bytes, four zero bytes and a counter, as
tables of numbers and pointers have them: lz4 makes 2.38 times less of them. `files` is real: the
contents of the files of this Python installation, in order of their names.
"""

from __future__ import annotations

import os
import random
import struct
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

PAGE = 4096
Data = Literal["records", "files"]
DATA: tuple[Data, ...] = get_args(Data)
RECORD_PAGES = 1024
FILE_PAGES = 8192


def load(data: Data, seed: int = 1) -> bytes:
    """Whole pages, the same for the same choice on the same machine."""
    return _records(random.Random(seed)) if data == "records" else _files()


def _records(generator: random.Random) -> bytes:
    record = struct.Struct("<IIQ")
    pages = bytearray()
    for page in range(RECORD_PAGES):
        for _ in range(PAGE // record.size):
            pages += record.pack(generator.getrandbits(32), 0, page)
    return bytes(pages)


def _files() -> bytes:
    pages = bytearray()
    for path in _python_files():
        pages += path.read_bytes()
        if len(pages) >= FILE_PAGES * PAGE:
            break
    whole = min(len(pages) // PAGE, FILE_PAGES) * PAGE
    if not whole:
        raise OSError("this Python installation has no files to take data from")
    return bytes(pages[:whole])


def _python_files() -> Iterator[Path]:
    """Those of the standard library: what else is installed there says nothing of Python."""
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages"})
        yield from (Path(folder, name) for name in sorted(names))
