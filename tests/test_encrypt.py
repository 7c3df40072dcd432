"""What encrypt:: promises beyond what test_sealed.py checks: secrecy, nonces, keys."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from media import PAGE, History, Medium, key_file, open_over, read, write
from userswap.backends.filters import encrypt
from userswap.backends.filters.encrypt import Nonces, read_key
from userswap.backends.grammar import GrammarError
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, StoreFailedError

PAGES = Geometry(600)


async def test_the_medium_sees_nothing_of_pages_zeros_among_them(seed: int) -> None:
    rng = random.Random(seed)
    medium = Medium()
    store = await open_over(medium, "encrypt::", PAGES)
    secret = rng.randbytes(16)
    await write(store, 3, secret * (PAGE // 16) + bytes(PAGE))
    await write(store, 9, bytes(PAGE))
    first = medium.pages[3]
    await write(store, 3, secret * (PAGE // 16))
    await store.flush()
    everything = b"".join(medium.pages.values())
    assert secret not in everything
    assert medium.pages[3] != first, "the same content looks the same"
    assert len({medium.pages[page] for page in (4, 9)} | {bytes(PAGE)}) == 3
    assert medium.pages.keys() == {3, 4, 9, 600, 609}
    assert await read(store, 9) == bytes(PAGE)


async def test_no_nonce_comes_twice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []

    class Recorded(Nonces):
        def next(self) -> bytes:
            given.append(super().next())
            return given[-1]

    monkeypatch.setattr(encrypt, "Nonces", Recorded)
    monkeypatch.setattr(encrypt, "_COUNTS", 50)
    medium = Medium()
    for _ in range(20):  # opened again without an end, as after a crash
        store = await open_over(medium, "encrypt::", PAGES)
        history = History(random.Random(seed), 12)
        history.may = {page: [await read(store, page)] for page in range(12)}
        for _ in range(60):
            await history.step(store)
    assert len(given) > 1500
    assert len(set(given)) == len(given)
    assert len({nonce[:8] for nonce in given}) >= 40


async def test_another_key_is_refused_and_nothing_is_changed() -> None:
    medium = Medium()
    store = await open_over(medium, "encrypt::", PAGES)
    await write(store, 0, b"\x01" * PAGE)
    await store.aclose()
    before = dict(medium.pages)
    other = f"encrypt?key_file={key_file(1)}::"
    with pytest.raises(StoreFailedError, match="another key"):
        await open_over(medium, other, PAGES)
    with pytest.raises(StoreFailedError, match="written by encrypt"):
        await open_over(medium, "checksum::", Geometry(607))
    assert medium.pages == before
    assert await read(await open_over(medium, "encrypt::", PAGES), 0) == b"\x01" * PAGE


async def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = random.Random(1).randbytes(32)

    def keep(content: bytes, mode: int = 0o600) -> str:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
        return str(path)

    assert await read_key(keep(key)) == key
    for text in (key.hex(), key.hex().upper() + "\n"):
        assert await read_key(keep(text.encode(), 0o400)) == key
    for content in (b"", key + b"\n", key.hex().encode()[:-1], key * 2, b"passphrase\n"):
        with pytest.raises(StoreFailedError, match="32 bytes are a key"):
            await read_key(keep(content))
    for mode in (0o640, 0o604, 0o620):
        with pytest.raises(StoreFailedError, match="chmod 600"):
            await read_key(keep(key, mode))
    with pytest.raises(StoreFailedError, match="No such file"):
        await read_key(str(tmp_path / "none"))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for name in (fifo, tmp_path):
        with pytest.raises(StoreFailedError, match=r"is not a file|Is a directory"):
            await read_key(str(name))


async def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GrammarError, match="needs key_file=PATH"):
        await open_stack("encrypt::memory:", PAGES)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(StoreFailedError, match=r"userswap\[encrypt\]"):
        await open_stack(f"encrypt?key_file={key_file()}::memory:", PAGES)
