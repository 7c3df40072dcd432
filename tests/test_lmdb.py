"""`lmdb:` beside what every store is held to: who waits, what survives, whose file it is."""

import asyncio
import contextlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import lmdb
import pytest

from databases import MIB, PAGE, PAGES, open_at, read, url_of, write
from support import run_child
from userswap.backends.grammar import GrammarError
from userswap.backends.lmdb import INLINE_BLOCKS, LmdbStore
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    PageLostError,
    Run,
    StoreError,
    StoreFailedError,
    StoreFullError,
)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    opened = await open_at(tmp_path / "store", "map_size=1GiB")
    yield opened
    await opened.aclose()


# --- who waits ---


async def test_what_is_cold_is_read_beside_the_loop(
    store: LmdbStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [random.Random(seed + i).randbytes(PAGE) for i in range(INLINE_BLOCKS + 1)]
    await write(store, 0, b"".join(pages))
    places: list[str] = []
    original = store._get

    def watched(wanted: list[tuple[int, memoryview]]) -> StoreError | None:
        places.append(threading.current_thread().name)
        return original(wanted)

    monkeypatch.setattr(store, "_get", watched)
    assert await read(store, 3) == pages[3]
    assert places.pop() == threading.current_thread().name
    monkeypatch.setattr("userswap.backends.lmdb.lib", ColdMemory())
    assert await read(store, 3) == pages[3]
    assert places.pop().startswith("lmdb-read")
    monkeypatch.undo()
    monkeypatch.setattr(store, "_get", watched)
    buffer = bytearray(len(pages) * PAGE)
    await store.read([Run(0, memoryview(buffer))])
    assert places.pop().startswith("lmdb-read")
    assert bytes(buffer) == b"".join(pages)


def at_hand(store: LmdbStore, index: int) -> bool:
    return store.read_now([Run(index, memoryview(bytearray(PAGE)))])


class ColdMemory:
    """A core to which nothing is resident."""

    def __getattr__(self, name: str) -> object:
        from userswap.native import lib

        return (lambda place: 0) if name == "us_is_resident" else getattr(lib, name)


async def test_pages_dropped_from_the_page_cache_are_seen_to_be(tmp_path: Path, seed: int) -> None:
    """The real thing, where the file system lets a file's pages go."""
    store = await open_at(tmp_path / "store", "durability=commit")
    noise = random.Random(seed).randbytes(PAGE)
    await write(store, 5, noise)
    assert at_hand(store, 5)
    await store.aclose()
    store = await open_at(tmp_path / "store")
    assert not at_hand(store, 5)  # nobody has seen it yet
    assert await read(store, 5) == noise
    assert at_hand(store, 5)
    await store.aclose()


async def test_the_loop_turns_while_much_is_written(store: LmdbStore, seed: int) -> None:
    rng = random.Random(seed)
    kit = [rng.randbytes(2000) + bytes(PAGE - 2000) for _ in range(512)]
    writing = asyncio.gather(
        *(store.write([Run(at, memoryview(b"".join(kit)))]) for at in range(0, 4096, 512))
    )
    turns = 0
    while not writing.done():
        await asyncio.sleep(0)
        turns += 1
    await writing
    print(turns)
    assert turns > 100  # if the loop did the work, as many as there are calls


async def test_a_cancelled_write_has_let_go_of_its_buffer(store: LmdbStore, seed: int) -> None:
    old, new = b"o" * PAGE, random.Random(seed).randbytes(PAGE)
    await write(store, 1, old)
    buffer = bytearray(new)
    task = asyncio.create_task(store.write([Run(1, memoryview(buffer))]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    buffer[:] = b"x" * PAGE
    assert await read(store, 1) in (old, new)


async def test_errors_hold_on_to_no_buffer(tmp_path: Path, seed: int) -> None:
    store = await open_at(tmp_path / "store", "map_size=1MiB")
    buffer = bytearray(random.Random(seed).randbytes(400 * PAGE))
    try:
        await store.write([Run(2, memoryview(buffer))])
    except StoreFullError as error:
        page = error.page
    await asyncio.sleep(0)  # the loop's own turn ends
    assert page == 2
    buffer.clear()  # a BufferError while anybody has a view of it
    await store.aclose()


# --- what survives ---

CHILD = """
import asyncio, os, sys
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run

async def main():
    store = await open_stack(sys.argv[1], Geometry(1 << 20))
    for round in range(1000):
        stamp = round.to_bytes(4, "little")
        data = b"".join(stamp + os.urandom(2044) + bytes(2048) for _ in range(64))
        await store.write([Run(round % 8 * 64, memoryview(data))])
        await store.flush()
        print(round, flush=True)

asyncio.run(main())
"""


def flushed_before_kill(url: str) -> int:
    """The last round that a child said it had flushed before it was killed."""
    command = [sys.executable, "-c", CHILD, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        rounds = []
        for line in child.stdout:
            rounds.append(int(line))
            if rounds[-1] == 20:
                child.send_signal(signal.SIGKILL)
        return rounds[-1]


@pytest.mark.parametrize("options", ["durability=commit", "durability=interval&interval=5ms", ""])
async def test_what_was_flushed_survives_kill_9(tmp_path: Path, options: str) -> None:
    path = tmp_path / "store"
    flushed = flushed_before_kill(url_of(path, options))
    store = await open_at(path)
    for slot in range(8):
        rounds = {
            int.from_bytes((await read(store, slot * 64 + i))[:4], "little") for i in range(64)
        }
        # Written after the last line that came out: whole or not at all.
        latest = flushed - (flushed - slot) % 8
        assert rounds in ({latest}, {latest + 8})
    await store.aclose()


@pytest.mark.parametrize("page_size", [16 * 1024, 2 * MIB])
async def test_larger_pages_come_back(tmp_path: Path, page_size: int, seed: int) -> None:
    path = tmp_path / "store"
    store = await open_at(path, page_size=page_size)
    data = random.Random(seed).randbytes(page_size)
    await write(store, PAGES - 1, data)
    await store.aclose()
    with pytest.raises(StoreFailedError, match=r"holds pages of .*, not of 4KiB"):
        await open_at(path)
    store = await open_at(path, "codec=none", page_size=page_size)
    assert await read(store, PAGES - 1) == data
    assert await read(store, PAGES - 2) == bytes(page_size)
    await store.aclose()


# --- whose file it is ---


OPENER = """
import asyncio, resource, sys
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry

resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
try:
    asyncio.run(open_stack(sys.argv[1], Geometry(9)))
except Exception as error:
    print(error)
"""


async def test_it_is_taken_by_one_opener(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = await open_at(path)
    with pytest.raises(StoreFailedError, match="in use"):
        await open_at(path)
    assert "in use" in run_child(OPENER, args=[url_of(path)]).stdout
    await store.aclose()
    await (await open_at(path)).aclose()
    for name in ("data.mdb", "lock.mdb"):
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


async def test_a_forked_child_neither_uses_nor_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = await open_at(path)
    await write(store, 0, b"p" * PAGE)
    child, said = forked(store)
    try:
        assert "another process" in said
        assert await read(store, 0) == b"p" * PAGE
        await store.aclose()
        store = await open_at(path)
        assert await read(store, 0) == b"p" * PAGE
        await store.aclose()
    finally:
        reap(child)


def forked(store: LmdbStore) -> tuple[int, str]:
    """A child of this process that goes on living, and what it is told when it uses the store."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            try:
                store._check()
            except StoreFailedError as error:
                os.write(into, str(error).encode())
            time.sleep(30)
        os._exit(0)
    os.close(into)
    with open(out) as pipe:
        return child, pipe.read(len("lmdb: was opened by another process"))


def reap(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


async def test_what_is_not_ours_is_refused_untouched(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "data.mdb").write_bytes(b"somebody's letters" * 1000)
    with pytest.raises(StoreFailedError, match="not an LMDB database"):
        await open_at(text)
    assert (text / "data.mdb").read_bytes() == b"somebody's letters" * 1000
    foreign = tmp_path / "foreign"
    with lmdb.open(str(foreign), max_dbs=2) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    before = (foreign / "data.mdb").read_bytes()
    with pytest.raises(StoreFailedError, match="not userswap's"):
        await open_at(foreign)
    assert (foreign / "data.mdb").read_bytes() == before
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreFailedError, match="not a directory"):
        await open_at(tmp_path / "file")
    with pytest.raises(StoreFailedError, match="No such file"):
        await open_at(tmp_path / "nowhere" / "store")
    with pytest.raises(GrammarError, match="path of a directory"):
        await open_stack("lmdb:", Geometry(9))
    with pytest.raises(GrammarError, match="unknown option 'interval'"):
        await open_stack(f"lmdb:{tmp_path / 'x'}?interval=1s", Geometry(9))


async def test_a_damaged_database_says_so(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "store"
    store = await open_at(path, "codec=none")
    rng = random.Random(seed)
    pages = [rng.randbytes(PAGE) for _ in range(64)]
    await write(store, 0, b"".join(pages))
    await store.aclose()
    file = path / "data.mdb"
    whole = file.read_bytes()
    place = whole.index(b"\0" + pages[7][:64])
    file.write_bytes(whole[:place] + b"\x77" + whole[place + 1 :])
    store = await open_at(path)
    with pytest.raises(PageLostError) as lost:
        await read(store, 7)
    assert lost.value.page == 7
    assert await read(store, 8) == pages[8]
    await write(store, 7, pages[0])
    assert await read(store, 7) == pages[0]
    await store.aclose()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreFailedError, match="cut short"):
        await open_at(path)
    file.write_bytes(b"\0" * 8192 + whole[8192:])
    with pytest.raises(StoreFailedError, match="not an LMDB database"):
        await open_at(path)


async def test_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await (await open_at(path)).aclose()
    with lmdb.open(str(path), max_dbs=3) as env:
        about = env.open_db(b"userswap")
        with env.begin(write=True) as txn:
            txn.put(b"about", json.dumps({"format": 9, "page_size": PAGE}).encode(), db=about)
    with pytest.raises(StoreFailedError, match="format 9, this version's is 1"):
        await open_at(path)


def test_a_map_that_has_no_room_is_named(tmp_path: Path) -> None:
    assert "map_size=1TiB" in run_child(OPENER, args=[url_of(tmp_path / "store")]).stdout


async def test_a_directory_of_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()  # a file system of the store's own has it
    url = f"lmdb:{tmp_path}"
    theirs = tmp_path / "letter.txt"
    theirs.write_text("dear reader")
    with pytest.raises(StoreFailedError, match=r"other files \(letter.txt\): .*/swap$"):
        await open_stack(url, Geometry(PAGES))
    assert sorted(os.listdir(tmp_path)) == ["letter.txt", "lost+found"]
    theirs.unlink()
    await (await open_stack(url, Geometry(PAGES))).aclose()
    theirs.write_text("came later")  # the pages that are there are worth more than the rule
    await (await open_stack(url, Geometry(PAGES))).aclose()
