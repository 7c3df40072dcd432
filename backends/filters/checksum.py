"""`checksum::` keeps a CRC-32 of every page: what is not what was written is lost, never wrong.

Responsible for: the record, 4 bytes of zlib's CRC-32 that begins from the page's index, so that a
page which was written to another's place does not match either. Any damage within 32 adjacent bits
is found; of other damage, one in 2**32. It is no protection from who means harm: `encrypt::` is.
Chosen by measurement, of a page of 4 KiB: CRC-32 1.7 us, SHA-256 3.8 us (by a CPU that has
instructions for it), BLAKE2b 7.3 us.
Must not know: how records are kept (sealed.py).

A page costs 8 bytes of the inner store. No options.
"""

from __future__ import annotations

import zlib

from userswap.backends.filters.sealed import Sealed, open_below
from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import Below, Geometry, Store

NAME = "checksum"
RECORD_BYTES = 4


class ChecksumFilter(Sealed):
    """See `Sealed`."""

    def __init__(self, inner: Store, pages: int) -> None:
        super().__init__(inner, pages, NAME, RECORD_BYTES)

    def seal(self, index: int, pages: memoryview) -> tuple[memoryview, list[bytes]]:
        return pages, [_record(index + n, page) for n, page in enumerate(self._single(pages))]

    def unseal(self, index: int, page: memoryview, record: bytes) -> bool:
        return _record(index, page) == record


def _record(index: int, page: memoryview) -> bytes:
    # All zeros are the record of no page: two values of 2**32 become one.
    return (zlib.crc32(page, index) or 1).to_bytes(RECORD_BYTES, "little")


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    Options(layer).finish()
    inner, pages = await open_below(NAME, RECORD_BYTES, geometry, below)
    store = ChecksumFilter(inner, pages)
    try:
        await store.tail.open(NAME, lambda salt: bytes(16), "the label is damaged")
    except BaseException:
        await inner.aclose()
        raise
    return store
