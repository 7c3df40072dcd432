"""How stores that keep values write 4 KiB blocks: the options `codec=`, `level=` and `shuffle=`.

Responsible for: turning a block into a value, and back. A value begins with a tag byte
(native/pack.h) and so describes itself: a store may be opened again with another codec. A block
that is one pattern of four bytes over and over is five bytes; one that does not get shorter is
kept as it is, and no value is longer than a block and its tag.

Values are made by pyzstd's compressor, reused, or by the core's lz4: some ten microseconds a block,
which belongs off the fault path, on a thread where blocks come in batches. They are read by the
core, whose decompressor is reused too: a few microseconds, without the interpreter's lock.

Options: `codec=zstd|lz4|none`; `level=` for zstd, -50 to 22; `shuffle=auto|off|4|8`, the width of
numbers whose bytes are put in order before they are compressed. `auto` looks at each block that did
not get short without it, and keeps what is shorter.

Must not know: where values are kept, pages larger than a block.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from userswap.backends.grammar import Options
from userswap.backends.store import PAGE_SIZE, StoreFailedError
from userswap.native import codecs, ffi, lib

Buffer = bytes | bytearray | memoryview
NAME = "values"
BLOCK_SIZE = PAGE_SIZE
VALUE_MAX = int(lib.US_VALUE_MAX)
SHUFFLES = {"auto": int(lib.US_SHUFFLE_AUTO), "off": int(lib.US_SHUFFLE_OFF), "4": 4, "8": 8}
ZSTD_LEVELS = (-50, 22)
ZSTD_LEVEL = 1
LZ4_ACCELERATION = 1
WORTH_IT = 3500
"""Bytes above which a block is kept as it is: less would be saved than reading it back costs."""

_RAW = b"\0"
_SAME = bytes((lib.US_VALUE_SAME,))
_PATTERN = 4
ZEROS = _SAME + bytes(_PATTERN)
"""The value of a block of zeros; a store may as well forget the block."""


class Codec:
    """Encodes and decodes blocks; safe from any thread."""

    def __init__(self, name: str, *, level: int = ZSTD_LEVEL, shuffle: str = "auto") -> None:
        try:
            # Both, whichever is asked for: a store may hold what another codec has made.
            opened = {known: codecs.open_codec(known).number for known in ("lz4", "zstd")}
        except codecs.CodecError as error:
            raise StoreFailedError(str(error), store=NAME) from error
        self.name = name
        self._number = opened.get(name, int(lib.US_CODEC_NONE))
        self._shuffle = SHUFFLES[shuffle]
        self._compress = _compressor(level) if name == "zstd" else None
        self.description = {
            "zstd": f"zstd level {level}, shuffle {shuffle}",
            "lz4": f"lz4, shuffle {shuffle}",
            "none": "uncompressed",
        }[name]

    def encode(self, block: Buffer) -> bytes:
        """The value of a block, which is BLOCK_SIZE bytes: at most VALUE_MAX bytes."""
        content = bytes(block)
        assert len(content) == BLOCK_SIZE, f"a block of {len(content)} bytes"
        if content[_PATTERN:] == content[:-_PATTERN]:
            return _SAME + content[:_PATTERN]
        if self.name == "none":
            return _RAW + content
        packed, width = self._by_zstd(content) if self._compress else self._by_core(content)
        if not 0 < len(packed) <= WORTH_IT:
            return _RAW + content
        return bytes((self._number | width << lib.US_VALUE_WIDTH_SHIFT,)) + packed

    def decode(self, value: Buffer, into: memoryview) -> None:
        """Write the block that a value stands for; a ValueError where it stands for none."""
        assert into.nbytes == BLOCK_SIZE, f"a block of {into.nbytes} bytes"
        # `with`: an error's traceback must not hold on to the caller's buffers
        with ffi.from_buffer(value) as source, ffi.from_buffer(into) as place:
            length = len(source)
            rc = lib.us_value_decode(source, length, place)
        if rc == -errno.EILSEQ:
            raise ValueError(f"{length} bytes that are not the value of a block")
        if rc < 0:
            raise MemoryError(os.strerror(-rc))

    def _by_zstd(self, content: bytes) -> tuple[bytes, int]:
        assert self._compress is not None
        if self._shuffle > 0:
            return self._compress(_shuffled(self._shuffle, content)), self._shuffle
        plain = self._compress(content)
        if self._shuffle == lib.US_SHUFFLE_OFF:
            return plain, 0
        width = lib.us_pack_width(self._number, content, len(plain))
        packed = self._compress(_shuffled(width, content)) if width else plain
        return (packed, width) if len(packed) < len(plain) else (plain, 0)

    def _by_core(self, content: bytes) -> tuple[bytes, int]:
        out, width = ffi.new(f"uint8_t[{WORTH_IT}]"), ffi.new("int *")
        length = lib.us_pack(
            self._number, LZ4_ACCELERATION, self._shuffle, content, out, WORTH_IT, width
        )
        if length < 0:
            raise MemoryError(os.strerror(-length))
        return bytes(ffi.buffer(out, length)), width[0]


def codec_option(options: Options, default: str = "zstd") -> Codec:
    """Read `codec=`, `level=` and `shuffle=`. A library that is missing is a StoreFailedError."""
    name = options.choice("codec", default=default, choices=codecs.NAMES)
    level, shuffle = ZSTD_LEVEL, "auto"
    if name == "zstd":
        low, high = ZSTD_LEVELS
        level = options.integer("level", default=ZSTD_LEVEL, low=low, high=high)
    if name != "none":
        shuffle = options.choice("shuffle", default="auto", choices=SHUFFLES)
    return Codec(name, level=level, shuffle=shuffle)


def _shuffled(width: int, content: bytes) -> bytes:
    out = ffi.new(f"uint8_t[{BLOCK_SIZE}]")
    lib.us_shuffle(width, content, out)
    return bytes(ffi.buffer(out))


def _compressor(level: int) -> Callable[[bytes], bytes]:
    import pyzstd

    compressor = pyzstd.ZstdCompressor(level)
    compress, whole_frame = compressor.compress, compressor.FLUSH_FRAME
    return lambda content: compress(content, whole_frame)
