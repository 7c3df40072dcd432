"""The room that `lmdb:` takes: of the file, of a full map, of a full disk, of a region over it."""

import asyncio
import contextlib
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from databases import PAGE, PAGES, open_at, read, url_of, write
from support import run_child
from userswap.backends.lmdb import LmdbStore
from userswap.backends.store import (
    Run,
    StoreFullError,
)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    opened = await open_at(tmp_path / "store", "map_size=1GiB")
    yield opened
    await opened.aclose()


HEAP = """
import ast, contextlib, random, sys, sysconfig
from pathlib import Path
import asyncio, decimal, email, json, http.client, logging, numpy, unittest

library = sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
trees = [ast.parse(path.read_bytes()) for path in library]
rows = [{"id": i, "name": f"user{i}", "tags": ["a", str(i % 7)], "at": i / 7} for i in range(20000)]
pages = []
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
    for line in maps:
        span, rights, _, _, inode, *name = line.split()
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = (int(place, 16) for place in span.split("-"))
            memory.seek(start)
            with contextlib.suppress(OSError):
                content = memory.read(min(end - start, 8 << 20))
                pages += [content[at : at + 4096] for at in range(0, len(content), 4096)]
pages = [page for page in pages if any(page)]
Path(sys.argv[1]).write_bytes(b"".join(random.Random(1).sample(pages, 1500)))
"""


def heap_pages(path: Path) -> list[bytes]:
    """What memory is typically like: pages of another interpreter's, none of them empty."""
    assert run_child(HEAP, args=[str(path)]).returncode == 0
    content = path.read_bytes()
    return [content[at : at + PAGE] for at in range(0, len(content), PAGE)]


# --- space ---


async def churned(store: LmdbStore, kit: list[bytes], seed: int, pages: int = 16384) -> float:
    """Fill in random order, overwrite everything three times: the file over the raw pages."""
    rng = random.Random(seed)
    for _ in range(4):
        order = rng.sample(range(pages), pages)
        for at in range(0, pages, 64):
            runs = [Run(index, memoryview(rng.choice(kit))) for index in order[at : at + 64]]
            await store.write(runs)
    env = store._database.env
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"] / (pages * PAGE)


async def test_incompressible_pages_cost_one_page_each(store: LmdbStore, seed: int) -> None:
    rng = random.Random(seed)
    assert await churned(store, [rng.randbytes(PAGE) for _ in range(64)], seed) <= 1.05


async def test_typical_pages_cost_little_more_than_half(
    store: LmdbStore, tmp_path: Path, seed: int
) -> None:
    assert await churned(store, heap_pages(tmp_path / "heap"), seed) <= 0.6


async def test_pages_that_change_their_kind_leave_nothing_behind(
    store: LmdbStore, seed: int
) -> None:
    noise, text = random.Random(seed).randbytes(PAGE), b"evict" * 819 + b"\0"
    tails = store._database.tails

    def entries() -> int:
        with store._database.env.begin() as txn:
            return txn.stat(tails)["entries"] + txn.stat(store._database.values)["entries"]

    for data, count in ((noise, 2), (text, 1), (noise, 2), (bytes(PAGE), 0), (noise, 2)):
        await write(store, 7, data)
        assert await read(store, 7) == data
        assert entries() == count
    await store.discard(0, PAGES)
    assert entries() == 0


async def test_no_reader_is_held_so_the_file_does_not_grow(store: LmdbStore, seed: int) -> None:
    rng = random.Random(seed)
    noise = [rng.randbytes(PAGE) for _ in range(8)]
    sizes = []
    for _ in range(12):
        for at in range(0, 512, 64):
            await store.write([Run(at + i, memoryview(rng.choice(noise))) for i in range(64)])
            await read(store, at)
        sizes.append(store._database.env.info()["last_pgno"])
    assert sizes[-1] <= sizes[2] * 1.05


# --- full ---


async def fill(store: LmdbStore, rng: random.Random) -> dict[int, bytes]:
    """Noise, until there is no room: what was taken."""
    taken: dict[int, bytes] = {}
    for index in range(0, PAGES, 16):
        data = rng.randbytes(16 * PAGE)
        try:
            await write(store, index, data)
        except StoreFullError:
            break
        taken.update((index + i, data[i * PAGE : (i + 1) * PAGE]) for i in range(16))
    return taken


async def check_full(store: LmdbStore, seed: int) -> None:
    """Full, read, emptied by discards, full again: nothing lost, nothing left."""
    rng = random.Random(seed)
    for _ in range(3):
        taken = await fill(store, rng)
        assert len(taken) > 64
        with pytest.raises(StoreFullError):
            await write(store, PAGES - 64, rng.randbytes(64 * PAGE))
        assert await read(store, PAGES - 64) == bytes(PAGE)
        for index, data in taken.items():
            assert await read(store, index) == data
        for index in range(0, len(taken), 2):
            await store.discard(index, 1)
            assert await read(store, index) == bytes(PAGE)
        assert await read(store, 1) == taken[1]
        await store.discard(0, PAGES)
        assert await read(store, 1) == bytes(PAGE)
        await store.flush()


async def test_a_full_map_loses_nothing(tmp_path: Path, seed: int) -> None:
    store = await open_at(tmp_path / "store", "map_size=4MiB")
    await check_full(store, seed)
    await store.aclose()
    store = await open_at(tmp_path / "store", "map_size=64MiB")
    await write(store, 0, random.Random(seed).randbytes(4096 * PAGE))
    await store.aclose()


@contextlib.contextmanager
def disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.privileged
async def test_a_full_disk_loses_nothing(tmp_path: Path, seed: int) -> None:
    with disk(tmp_path / "disk", "64m") as path:
        store = await open_at(path / "store", "durability=commit")
        await check_full(store, seed)
        await store.aclose()
        store = await open_at(path / "store")
        assert await read(store, 0) == bytes(PAGE)
        await store.aclose()


async def test_writes_that_fit_succeed_beside_one_that_does_not(tmp_path: Path, seed: int) -> None:
    store = await open_at(tmp_path / "store", "map_size=2MiB")
    rng = random.Random(seed)
    small = [rng.randbytes(PAGE) for _ in range(8)]
    large = rng.randbytes(1024 * PAGE)
    results = await asyncio.gather(
        *(write(store, index, data) for index, data in enumerate(small[:4])),
        write(store, 1000, large),
        *(write(store, index, data) for index, data in enumerate(small[4:], 4)),
        return_exceptions=True,
    )
    assert [type(result) for result in results if result] == [StoreFullError]
    assert isinstance(results[4], StoreFullError)
    for index, data in enumerate(small):
        assert await read(store, index) == data
    assert await read(store, 1000) == bytes(PAGE)
    await store.aclose()


# --- a region over it ---


PAGE_THROUGH = """
import random, sys
import userswap
from userswap.bench import sample

rng, size, kit = random.Random(int(sys.argv[2])), 16 << 20, sample.load("files")
pages = [kit[at : at + 4096] for at in range(0, size // 2, 4096)]
pages += [rng.randbytes(4096) for _ in range(size // 4096 - len(pages))]
rng.shuffle(pages)
with userswap.Region(size, resident=size // 4, store=sys.argv[1]) as region:
    for index, page in enumerate(pages):
        region.memory[index * 4096 : (index + 1) * 4096] = page
    for index in rng.sample(range(len(pages)), len(pages)):
        assert region.memory[index * 4096 : (index + 1) * 4096] == pages[index], index
    stats = region.stats()
    print(stats.faults_awaited > len(pages) // 2, stats.lost_pages)
"""

OUTGROW = """
import random, sys
import userswap

rng, size = random.Random(int(sys.argv[2])), 32 << 20
pages = [rng.randbytes(4096) for _ in range(size // 4096)]
with userswap.Region(size, resident=size // 4, store=sys.argv[1]) as region:
    for index, page in enumerate(pages):
        region.memory[index * 4096 : (index + 1) * 4096] = page
    for index in rng.sample(range(len(pages)), len(pages)):
        assert region.memory[index * 4096 : (index + 1) * 4096] == pages[index], index
    stats = region.stats()
    print(stats.store_full, stats.lost_pages)
"""


def test_a_region_pages_through_it(tmp_path: Path, seed: int) -> None:
    said = run_child(PAGE_THROUGH, args=[url_of(tmp_path / "store"), str(seed)])
    assert (said.stdout, said.returncode) == ("True 0\n", 0), said.stderr


@pytest.mark.privileged
def test_a_region_outgrows_a_full_disk(tmp_path: Path, seed: int) -> None:
    with disk(tmp_path / "disk", "8m") as path:
        said = run_child(OUTGROW, args=[url_of(path / "store"), str(seed)])
        assert (said.stdout, said.returncode) == ("True 0\n", 0), said.stderr
