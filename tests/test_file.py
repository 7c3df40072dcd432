"""`file:` keeps the contract on every kind of medium, and touches nothing that is not its own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import run_child
from userswap.backends.conformance import CHECKS, Check, run
from userswap.backends.file import FileStore, Medium
from userswap.backends.grammar import GrammarError
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreFailedError,
    StoreFullError,
)
from userswap.native import ffi, transfers

PAGE = 4096
MIB = 1 << 20
URLS = ("file:{dir}/pages?direct=on", "file:{dir}/pages?direct=off")


@pytest.fixture
def no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(transfers, "_Ring", refused)


async def opened(path: Path | str, options: str = "", pages: int | None = 100) -> Store:
    return await open_stack(f"file:{path}{options}", Geometry(pages))


async def read(store: Store, index: int, pages: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (pages * store.page_size))
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes) -> None:
    await store.write([Run(index, memoryview(data))])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("url", URLS)
def test_conformance(url: str, check: Check, seed: int) -> None:
    run(check, url, seed=seed)


@pytest.mark.parametrize("check", CHECKS)
def test_conformance_by_threads(check: Check, seed: int, no_ring: None) -> None:
    run(check, URLS[0], seed=seed)


@pytest.mark.parametrize("check", CHECKS)
def test_null_conforms_but_for_forgetting(check: Check, seed: int) -> None:
    run(check, "null:", forgets=True, seed=seed)


# --- whose file ---


async def test_a_new_file_is_private_sparse_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    store = await opened(path, pages=None)
    status = path.stat()
    assert (status.st_mode & 0o7777, status.st_size, status.st_blocks) == (0o600, 1 << 40, 0)
    assert store.page_count == (1 << 40) // PAGE
    assert store.durable
    assert "sparse file" in store.space
    await write(store, store.page_count - 1, b"z" * PAGE)
    await write(store, 0, b"a" * PAGE)
    assert path.stat().st_blocks * 512 < MIB
    with pytest.raises(StoreFailedError, match="another store has it open"):
        await opened(path)
    second = run_child(f"import fcntl; fcntl.flock(open('{path}'), fcntl.LOCK_EX | fcntl.LOCK_NB)")
    assert "BlockingIOError" in second.stderr
    await store.discard(0, store.page_count)
    assert path.stat().st_blocks * 512 < MIB / 2
    await store.aclose()
    again = await opened(path, pages=None)
    assert again.page_count == (1 << 40) // PAGE
    await again.aclose()


async def test_what_is_there_stays_until_the_first_write(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    content = random.Random(1).randbytes(10_001)
    path.write_bytes(content)
    path.chmod(0o644)
    before = path.stat()
    for pages, count in ((None, 2), (100, 100)):
        store = await opened(path, pages=pages)
        assert store.page_count == count
        assert await read(store, 0, 2) == content[: 2 * PAGE]
        await store.flush()
        await store.aclose()
    after = path.stat()
    assert path.read_bytes() == content
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    store = await opened(path)
    assert await read(store, 2, 2) == content[2 * PAGE :] + bytes(4 * PAGE - len(content))
    await write(store, 50, b"n" * PAGE)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.stat().st_size == 100 * PAGE
    assert await read(store, 1, 2) == content[PAGE:] + bytes(3 * PAGE - len(content))
    await store.aclose()


async def test_what_is_refused(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"content")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "open").touch()
    (tmp_path / "open").chmod(0o666)
    (tmp_path / "one").touch()
    os.link(tmp_path / "one", tmp_path / "two")
    for name, reason in (
        ("link", "symbolic link"),
        ("nowhere", "symbolic link"),
        ("pipe", "neither a regular file nor"),
        ("open", "chmod 600"),
        ("one", "hard links"),
        ("", "directory"),
        ("missing/pages", "No such file"),
    ):
        with pytest.raises(StoreFailedError, match=reason):
            await opened(tmp_path / name)
    assert real.read_bytes() == b"content"
    assert not (tmp_path / "missing").exists()
    with pytest.raises(StoreFailedError, match="neither a regular file nor"):
        await opened("/dev/null")


@pytest.mark.privileged
async def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    path.write_bytes(b"theirs")
    os.chown(path, 12345, 12345)
    with pytest.raises(StoreFailedError, match="another user"):
        await opened(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:", "whole path"),
        ("file:pages", "whole path"),
        ("file:{dir}/pages?direct=maybe", "on or off"),
        ("file:{dir}/pages?size=1KiB", "less than a page"),
        ("file:{dir}/pages?depth=3", "unknown option"),
    ],
)
async def test_a_url_that_is_wrong_leaves_no_file(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        await open_stack(url.format(dir=tmp_path), Geometry(10))
    assert os.listdir(tmp_path) == []


async def test_sizes(tmp_path: Path) -> None:
    with pytest.raises(StoreFailedError, match="has 1MiB; 4MiB are asked for"):
        await opened(tmp_path / "a", "?size=1MiB", pages=1024)
    store = await opened(tmp_path / "a", "?size=1MiB", pages=None)
    assert store.page_count == 256
    await write(store, 255, bytes(range(256)) * 16)
    await store.aclose()
    store = await opened(tmp_path / "a", pages=None)
    assert store.page_count == 256
    assert await read(store, 255) == bytes(range(256)) * 16
    await store.aclose()


# --- what a medium does ---


@pytest.mark.parametrize("ring", [True, False])
async def test_a_page_that_cannot_be_read_is_lost_alone(ring: bool) -> None:
    """This process's memory is the medium: a page of it that is not mapped gives EIO."""
    with mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[:] = b"".join(bytes([65 + i]) * PAGE for i in range(8))
        with ffi.from_buffer(area) as place:
            address = int(ffi.cast("uintptr_t", place))
        first, hole = address // PAGE, address // PAGE + 2
        libc = ctypes.CDLL(None)
        assert libc.munmap(ctypes.c_void_p(hole * PAGE), ctypes.c_size_t(PAGE)) == 0
        medium = Medium(os.open("/proc/self/mem", os.O_RDWR), "memory", True, 1 << 47, False)
        store = FileStore(medium, 1 << 35, PAGE, direct=False, ring=ring)
        for index, pages in ((first, 8), (hole, 1), (hole - 1, 2)):
            with pytest.raises(PageLostError, match="Input/output error") as caught:
                await read(store, index, pages)
            assert caught.value.page == hole
        for index, pages in ((first, 8), (hole, 1), (hole - 1, 2)):
            with pytest.raises(PageLostError, match="cannot be written") as caught:
                await write(store, index, b"n" * PAGE * pages)
            assert caught.value.page == hole
        assert await read(store, first, 2) == b"n" * 2 * PAGE
        assert await read(store, hole + 1, 5) == b"n" * 5 * PAGE
        # What could not be written is neither old nor new, until it is written again.
        again = libc.mmap
        again.restype = ctypes.c_void_p
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        where = again(ctypes.c_void_p(hole * PAGE), ctypes.c_size_t(PAGE), 3, flags, -1, 0)
        assert where == hole * PAGE
        with pytest.raises(PageLostError, match="halfway"):
            await read(store, first, 8)
        await write(store, hole, b"w" * PAGE)
        assert await read(store, hole - 1, 2) == b"n" * PAGE + b"w" * PAGE
        await store.aclose()


async def test_a_flush_that_fails_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path / "pages")
    await write(store, 3, b"x" * PAGE)
    assert isinstance(store, FileStore)
    change = store._transfers.change

    def failing(transfer: transfers.Transfer, operation: int, *rest: int) -> None:
        transfer.failures = [transfers.Failure(errno.EIO, 0, 0)]
        change(transfer, operation, *rest)

    monkeypatch.setattr(store._transfers, "change", failing)
    for call in (store.flush(), store.flush(), read(store, 3), write(store, 3, bytes(PAGE))):
        with pytest.raises(StoreFailedError, match="lost writes"):
            await call
    await store.aclose()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.privileged
@pytest.mark.parametrize("direct", ["on", "off"])
@pytest.mark.parametrize("page_size", [PAGE, 65536, 2 * MIB])
async def test_a_full_disk_keeps_what_it_has(
    small_disk: Path, direct: str, page_size: int, seed: int
) -> None:
    rng = random.Random(seed)
    url = f"file:{small_disk}/pages?direct={direct}"
    store = await open_stack(url, Geometry(100 * MIB // page_size, page_size))
    old = {index: rng.randbytes(page_size) for index in range(100 * MIB // page_size)}
    kept = 0
    with contextlib.suppress(StoreFullError):
        for kept in old:
            await write(store, kept, old[kept])
    with pytest.raises(StoreFullError, match="No space left") as caught:
        await write(store, kept, old[kept])
    assert caught.value.page == kept
    assert 56 * MIB <= kept * page_size <= 64 * MIB
    with pytest.raises(StoreFullError):
        await write(store, kept - 1, rng.randbytes(2 * page_size))
    for index in range(kept - 1):
        assert await read(store, index) == old[index]
    assert await read(store, kept) == bytes(page_size)
    await store.discard(0, 4 * MIB // page_size + 1)
    await write(store, kept, old[kept])
    assert await read(store, kept) == old[kept]
    assert await read(store, 0) == bytes(page_size)
    await store.flush()
    await store.aclose()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A loop device of 16 MiB, and the file behind it."""
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(16 * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=off", str(backing)],
        check=True,
        capture_output=True,
        text=True,
    )
    yield Path(made.stdout.strip()), backing
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.privileged
@pytest.mark.parametrize("direct", ["on", "off"])
async def test_a_block_device(device: tuple[Path, Path], direct: str, seed: int) -> None:
    rng, (path, backing) = random.Random(seed), device
    with pytest.raises(StoreFailedError, match="has 16MiB; 32MiB are asked for"):
        await opened(path, pages=8192)
    with pytest.raises(StoreFailedError, match="less than size="):
        await opened(path, "?size=32MiB", pages=None)
    link = backing.parent / "by-name"
    link.symlink_to(path)
    store = await opened(link, f"?direct={direct}", pages=None)
    assert (store.page_count, store.page_size) == (4096, PAGE)
    with pytest.raises(StoreFailedError, match="in use"):
        await opened(path)
    pages = {index: rng.randbytes(PAGE) for index in (0, 1, 2, 1000, 4095)}
    for index, data in pages.items():
        await write(store, index, data)
    await store.discard(1, 1)
    assert await read(store, 0, 3) == pages[0] + bytes(PAGE) + pages[2]
    await store.flush()
    await store.aclose()
    content = backing.read_bytes()
    assert content[1000 * PAGE : 1001 * PAGE] == pages[1000]
    assert content[PAGE : 2 * PAGE] == bytes(PAGE)
    # A medium that ends too early: what is behind its end is lost, the rest is not.
    os.truncate(backing, 8 * MIB)
    store = await opened(path, "?direct=on", pages=None)
    with pytest.raises(PageLostError) as caught:
        await read(store, 4095)
    assert caught.value.page == 4095
    assert await read(store, 1000) == pages[1000]
    await store.aclose()


async def test_a_medium_that_cannot_forget_is_written_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path / "pages")
    assert isinstance(store, FileStore)
    await write(store, 0, b"x" * 100 * PAGE)
    change = store._change

    async def refusing(operation: int, pages: range) -> transfers.Failure | None:
        if operation in (transfers.PUNCH, transfers.ZERO):
            return transfers.Failure(errno.EOPNOTSUPP, 0, 0)
        return await change(operation, pages)

    monkeypatch.setattr(store, "_change", refusing)
    await store.discard(1, 70)
    assert await read(store, 0, 100) == b"x" * PAGE + bytes(70 * PAGE) + b"x" * 29 * PAGE
    await store.aclose()


# --- under a region ---

TOUCH = """
import random, sys, userswap
PAGE = 4096
url, pages = sys.argv[1], int(sys.argv[2])
page = lambda number, version: random.Random(number * 10 + version).randbytes(PAGE)
region = userswap.Region(pages * PAGE, resident="4MiB", store=url)
for version in range(2):
    for number in range(pages):
        region.memory[number * PAGE : (number + 1) * PAGE] = page(number, version)
for number in random.Random(1).sample(range(pages), min(pages, 3000)):
    assert region.memory[number * PAGE : (number + 1) * PAGE] == page(number, 1), number
stats = region.stats()
assert stats.lost_pages == 0, stats
print(stats.faults_awaited, stats.store_full)
region.close()
"""


@pytest.mark.parametrize("options", ["?direct=on", "?direct=off"])
def test_a_region_on_a_file(tmp_path: Path, options: str) -> None:
    child = run_child(TOUCH, args=[f"file:{tmp_path}/pages{options}", "4096"])
    assert child.returncode == 0, child.stderr
    awaited, full = child.stdout.split()
    assert int(awaited) > 100
    assert full == "False"


@pytest.mark.privileged
def test_a_region_on_a_disk_that_fills_up_loses_nothing(small_disk: Path) -> None:
    child = run_child(TOUCH, args=[f"file:{small_disk}/pages", "20480"], timeout=100)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split()[1] == "True"
    assert "full" in child.stderr
