"""`encrypt::` keeps pages by AES-256-GCM: a medium never sees what they hold.

Responsible for: keys and nonces. A page's record is its nonce and its tag; its index is bound in,
so that a page which was damaged or is another's is lost, not wrong.

Nonces: a nonce that came twice under one key would give both pages away. Each is 64 random bits,
drawn when the store is opened and anew after 2**32 pages, and a counter of 32 bits. So within one
drawing none comes twice. A crash, a medium that was put back to an older state, or a second medium
under the same key change nothing, since nothing is remembered. That two of n drawings are the same
has a chance below n**2 / 2**65: 2**-33 for a key that opened 65,536 stores. An open store must not
be used on both sides of a fork.

What a medium does see: which pages are kept, and when they change. Whoever can write to it can put
a page's old state back, together with its old record, or make both zeros.
Must not know: how records are kept (sealed.py).

Options: `key_file=PATH`, a file that only its owner can read: 32 random bytes, or 64 hexadecimal
digits. A page costs 56 bytes of the inner store. Needs the extra `userswap[encrypt]`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from typing import TYPE_CHECKING

import aiofiles

from userswap.backends.filters.sealed import Sealed, open_below
from userswap.backends.grammar import LayerSpec, Options
from userswap.backends.store import Below, Geometry, Store, StoreFailedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NAME = "encrypt"
KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
_HEX = re.compile(rb"[0-9A-Fa-f]{64}\s*")
_COUNTS = 1 << 32


class Nonces:
    """Twelve bytes that were never given out before."""

    def __init__(self) -> None:
        self._prefix = b""
        self._count = _COUNTS - 1

    def next(self) -> bytes:
        self._count += 1
        if self._count >= _COUNTS:
            self._prefix = os.urandom(NONCE_BYTES - 4)
            self._count = 1  # so that no record is all zeros
        return self._prefix + self._count.to_bytes(4, "little")


class EncryptFilter(Sealed):
    """See `Sealed`."""

    def __init__(self, inner: Store, pages: int, cipher: AESGCM) -> None:
        from cryptography.exceptions import InvalidTag

        super().__init__(inner, pages, NAME, NONCE_BYTES + TAG_BYTES)
        self.encrypted = True
        self._cipher = cipher
        self._nonces = Nonces()
        self._invalid = InvalidTag

    def seal(self, index: int, pages: memoryview) -> tuple[memoryview, list[bytes]]:
        sealed, records = bytearray(), []
        for number, page in enumerate(self._single(pages), index):
            nonce = self._nonces.next()
            closed = self._cipher.encrypt(nonce, page, _bound(number))
            sealed += memoryview(closed)[:-TAG_BYTES]
            records.append(nonce + closed[-TAG_BYTES:])
        return memoryview(sealed), records

    def unseal(self, index: int, page: memoryview, record: bytes) -> bool:
        nonce, tag = record[:NONCE_BYTES], record[NONCE_BYTES:]
        try:
            page[:] = self._cipher.decrypt(nonce, bytes(page) + tag, _bound(index))
        except self._invalid:
            return False
        return True


def _bound(index: int) -> bytes:
    return index.to_bytes(8, "little")


async def read_key(path: str) -> bytes:
    """The key in a file; what is wrong with the file is a StoreFailedError."""

    def wrong(what: str) -> StoreFailedError:
        return StoreFailedError(f"key file {path}: {what}", store=NAME)

    try:
        async with aiofiles.open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise wrong("is not a file")
            if status.st_mode & 0o077:
                raise wrong("others than its owner may use it; chmod 600 it")
            if status.st_uid not in (0, os.geteuid()):
                raise wrong(f"belongs to user {status.st_uid}, who could change it")
            content = await file.read(4 * KEY_BYTES)
    except OSError as error:
        raise wrong(error.strerror or str(error)) from error
    if _HEX.fullmatch(content):
        return bytes.fromhex(content.decode("ascii"))
    if len(content) != KEY_BYTES:
        raise wrong(f"{KEY_BYTES} bytes are a key, or {2 * KEY_BYTES} hexadecimal digits")
    return content


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    options = Options(layer)
    path = options.text("key_file", "")
    options.finish()
    if not path:
        raise layer.error("needs key_file=PATH, 32 random bytes that only you can read")
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        reason = "needs a package: pip install 'userswap[encrypt]'"
        raise StoreFailedError(reason, store=NAME) from error
    key = await read_key(path)
    # The file's key makes two: one for pages, one that tells whether it is the medium's key.
    cipher = AESGCM(hashlib.blake2b(key=key, person=b"userswap pages", digest_size=32).digest())

    def check(salt: bytes) -> bytes:
        return hashlib.blake2b(salt, key=key, person=b"userswap label", digest_size=16).digest()

    inner, pages = await open_below(NAME, NONCE_BYTES + TAG_BYTES, geometry, below)
    store = EncryptFilter(inner, pages, cipher)
    try:
        await store.tail.open(NAME, check, f"key file {path} has another key than the medium's")
    except BaseException:
        await inner.aclose()
        raise
    return store
