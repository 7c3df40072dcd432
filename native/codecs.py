"""Finds the compression libraries and opens them for the C core.

Responsible for: where lz4 and zstd come from. The system's library comes first; where it is
missing, the one inside the lz4 or backports.zstd wheel serves, whose functions are exported. A
library that was opened stays so for the life of the process.

Must not know: what is compressed.
"""

import errno
import importlib.machinery
import os
from dataclasses import dataclass
from pathlib import Path

from userswap.native import ffi, lib

_NUMBERS = {"none": lib.US_CODEC_NONE, "lz4": lib.US_CODEC_LZ4, "zstd": lib.US_CODEC_ZSTD}
_SYSTEM_NAMES = {"lz4": "liblz4.so.1", "zstd": "libzstd.so.1"}
_IN_WHEELS = {"lz4": ("lz4", "block/_block*.so"), "zstd": ("backports", "zstd/_zstd*.so")}
_PACKAGES = {"lz4": ("liblz4-1", "lz4"), "zstd": ("libzstd1", "backports.zstd")}

NAMES = tuple(_NUMBERS)
"""What `open_codec` accepts; "none" keeps pages as they are and needs no library."""


class CodecError(Exception):
    """Neither the system nor a wheel has the library; the message says what to install."""


@dataclass(frozen=True)
class Codec:
    name: str
    number: int
    path: str
    version: str


def open_codec(name: str) -> Codec:
    """Open a codec's library, the system's if it is there."""
    if name not in _NUMBERS:
        raise ValueError(f"no codec named {name!r}; there are: {', '.join(NAMES)}")
    number = _NUMBERS[name]
    failures = []
    for path in _candidates(name):
        if lib.us_codec_is_open(number):
            break
        rc = lib.us_codec_open(number, os.fsencode(path))
        if rc < 0:
            reason = "lacks functions" if rc == -errno.ENOSYS else "cannot be loaded"
            failures.append(f"{path} {reason}")
    if not lib.us_codec_is_open(number):
        system, wheel = _PACKAGES[name]
        raise CodecError(
            f"{name}: no library ({'; '.join(failures)}): install it with "
            f"`apt-get install {system}` or `pip install {wheel}`"
        )
    return Codec(
        name, number, _text(lib.us_codec_path(number)), _text(lib.us_codec_version(number))
    )


def _candidates(name: str) -> list[str]:
    return [_SYSTEM_NAMES[name], *_wheel_libraries(name)] if name in _SYSTEM_NAMES else []


def _wheel_libraries(name: str) -> list[str]:
    """Shared objects inside the installed wheels, found without importing them."""
    package, pattern = _IN_WHEELS[name]
    spec = importlib.machinery.PathFinder.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return [str(path) for place in places or [] for path in sorted(Path(place).glob(pattern))]


def _text(pointer: object) -> str:
    return "" if pointer == ffi.NULL else os.fsdecode(ffi.string(pointer))
