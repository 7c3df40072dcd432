"""The limit: memory behind the bare loop of native/bare.c, which a forked process runs."""

from __future__ import annotations

import os
import signal
from array import array
from typing import Any

from userswap.bench import sample
from userswap.bench.paged import Paged
from userswap.native import check, ffi, lib

PAGE = sample.PAGE


class BareMemory(Paged):
    """All pages are missing at first: filled with the sample where `content` is given, else zeros.

    The server runs on `cpu`; -1 leaves it to the scheduler."""

    def __init__(self, pages: int, content: bytes | None, cpu: int) -> None:
        self._bare = ffi.new("struct us_bare *")
        self._source = ffi.new("struct us_bare_source *")
        if content is not None:
            self._compress(content, pages)
        check(lib.us_bare_open(self._bare, pages))
        self.buffer = ffi.buffer(self._bare.memory, pages * PAGE)
        parent = os.getpid()
        self._server = os.fork()
        if self._server == 0:
            self._serve(parent, cpu)

    def _compress(self, content: bytes, pages: int) -> None:
        stored, offsets = bytearray(), array("Q", [0])
        page, room = ffi.new("uint8_t[]", PAGE), ffi.new("uint8_t[]", PAGE)
        check(lib.us_codec_open(lib.US_CODEC_LZ4, ffi.NULL))
        self._source.codec = lib.US_CODEC_LZ4
        for index in range(pages):
            lib.us_touch_page(ffi.from_buffer(content), len(content) // PAGE, index, 0, page)
            size = check(lib.us_compress(lib.US_CODEC_LZ4, 1, page, room, PAGE))
            stored += ffi.buffer(room, size)
            offsets.append(len(stored))
        self._stored = ffi.from_buffer("uint8_t[]", stored)
        self._offsets = ffi.from_buffer("uint64_t[]", offsets)
        self._source.stored, self._source.offsets = self._stored, self._offsets

    def _serve(self, parent: int, cpu: int) -> None:
        """In the forked process; never returns."""
        try:
            if cpu >= 0:
                os.sched_setaffinity(0, [cpu])
            rc = lib.us_bare_serve(self._bare, self._source, parent)
            os.write(2, f"bare loop: {os.strerror(-rc)}\n".encode())
        finally:
            os._exit(1)

    def stats(self) -> dict[str, Any]:
        return {}

    def evict(self) -> None:
        raise NotImplementedError("the bare loop never takes a page away")

    def close(self) -> None:
        self.buffer = None
        os.kill(self._server, signal.SIGKILL)
        os.waitpid(self._server, 0)
        lib.us_bare_close(self._bare)
