"""The one thread that writes the database of `lmdb:`.

Responsible for: making values of blocks off the event loop, and what becomes of a transaction. It
commits what has queued up, in order of keys; a write that fails takes no other along. What is
discarded where there is no room even for that (a deletion copies pages, too) is remembered in
`forgotten`, to be deleted when there is room.

Must not know: pages, reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import lmdb

from userswap.backends.grammar import format_size
from userswap.backends.lmdb_file import NAME, Database, block_key, is_full
from userswap.backends.store import StoreError, StoreFailedError, StoreFullError
from userswap.backends.values import ZEROS, Codec
from userswap.native import lib

COMMIT_BLOCKS = 64
"""In one transaction; more gains no speed, and makes the others wait."""
DISCARD_BLOCKS = 1024


class _Write(NamedTuple):
    future: asyncio.Future[StoreError | None]
    blocks: list[tuple[int, memoryview]]


class _Order(NamedTuple):
    """Something else that only this thread may do."""

    future: asyncio.Future[StoreError | None]
    act: Callable[[], None]


_Answer = tuple["asyncio.Future[StoreError | None]", StoreError | None]


class Writer:
    """Its public methods are the event loop's; each returns a future of what went
    wrong, which is never to be cancelled."""

    def __init__(
        self,
        database: Database,
        codec: Codec,
        per_page: int,
        committed: Callable[[list[int]], None],
    ) -> None:
        """`committed`, called by the thread, is told the blocks that have values now."""
        self.forgotten: set[int] = set()
        """Discarded blocks that are not deleted yet."""
        self._database = database
        self._env = database.env
        self._codec = codec
        self._committed = committed
        self._per_page = per_page
        self._unsynced = False
        self._may_have_room = False
        """Something was deleted since a write found no room."""
        self._failure = ""
        self._queue: SimpleQueue[_Write | _Order | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="lmdb-write", daemon=True)
        self._thread.start()

    def write(self, blocks: list[tuple[int, memoryview]]) -> asyncio.Future[StoreError | None]:
        """Keep blocks; an error names the first of them as its page."""
        future: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
        self._queue.put(_Write(future, blocks))
        return future

    def discard(self, first: int, end: int) -> asyncio.Future[StoreError | None]:
        return self._order(lambda: self._delete(first, end))

    def settle(self, *, sync: bool) -> asyncio.Future[StoreError | None]:
        """After everything before: delete what was forgotten; bring it all to the medium."""
        return self._order(lambda: self._settle(sync))

    def end(self) -> None:
        """Do what is queued, then end the thread; blocks."""
        self._queue.put(None)
        self._thread.join()

    def _order(self, act: Callable[[], None]) -> asyncio.Future[StoreError | None]:
        future: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
        self._queue.put(_Order(future, act))
        return future

    def _work(self) -> None:
        lib.us_place_freely()
        jobs: deque[_Write | _Order | None] = deque()
        while True:
            if not jobs:
                jobs.append(self._queue.get())
            with contextlib.suppress(Empty):
                while True:
                    jobs.append(self._queue.get_nowait())
            if jobs[0] is None:
                return
            _answer(self._do_first(jobs))

    def _do_first(self, jobs: deque[_Write | _Order | None]) -> list[_Answer]:
        """Do the first job; if it is a write, with those that follow it."""
        job = jobs.popleft()
        if isinstance(job, _Order):
            return [(job.future, self._tried(job.act))]
        assert job is not None
        writes, blocks = [job], len(job.blocks)
        while jobs and isinstance(jobs[0], _Write) and blocks < COMMIT_BLOCKS:
            writes.append(jobs[0])
            blocks += len(jobs[0].blocks)
            jobs.popleft()
        # Where that fails, one by one, so that each comes to its own end.
        if self._tried(lambda: self._put(writes)) is None:
            answers: list[_Answer] = [(write.future, None) for write in writes]
        else:
            answers = [(write.future, self._put_alone(write)) for write in writes]
        for write in writes:
            write.blocks.clear()  # the buffers are the callers' again before they are told
        return answers

    def _put_alone(self, write: _Write) -> StoreError | None:
        error = self._tried(lambda: self._put([write]))
        if isinstance(error, StoreFullError) and self._may_have_room:
            self._tried(self._make_room)
            error = self._tried(lambda: self._put([write]))
        if error is not None and write.blocks:
            error.page = write.blocks[0][0] // self._per_page
        return error

    def _put(self, writes: list[_Write]) -> None:
        values = sorted(
            (block_key(block), self._codec.encode(content), block)
            for write in writes
            for block, content in write.blocks
        )
        tails, most = self._database.tails, self._database.value_max
        with self._env.begin(write=True) as txn:
            has_tails = txn.stat(tails)["entries"] > 0
            with txn.cursor(self._database.values) as cursor:
                cursor.putmulti((key, value[:most]) for key, value, _ in values if value != ZEROS)
            for key, value, _ in values:
                if value == ZEROS:
                    txn.delete(key, db=self._database.values)
                if len(value) > most:
                    txn.put(key, value[most:], db=tails)
                elif has_tails:
                    txn.delete(key, db=tails)
        self._unsynced = True
        if self.forgotten:
            self.forgotten.difference_update(block for _, _, block in values)
            self._forget_for_good()
        self._committed([block for _, value, block in values if value != ZEROS])

    def _delete(self, first: int, end: int) -> None:
        """Delete [first, end), in several transactions, so that none gets long."""
        while first < end:
            keys = self._keys(first, end)
            if not keys:
                return
            self.forgotten.update(int.from_bytes(key) for key in keys)
            self._forget_for_good()
            first = int.from_bytes(keys[-1]) + 1

    def _keys(self, first: int, end: int) -> list[bytes]:
        """The first keys of blocks in [first, end)."""
        last = block_key(end)
        keys: list[bytes] = []
        with self._env.begin() as txn, txn.cursor(self._database.values) as cursor:
            if cursor.set_range(block_key(first)):
                for key in cursor.iternext(values=False):
                    if key >= last or len(keys) == DISCARD_BLOCKS:
                        break
                    keys.append(key)
        return keys

    def _forget_for_good(self) -> None:
        """Delete what was discarded, as far as there is room to: even a deletion copies pages."""
        most = DISCARD_BLOCKS
        while self.forgotten:
            some = sorted(itertools.islice(self.forgotten, most))
            try:
                self._delete_blocks(some)
            except lmdb.Error as error:
                if not is_full(error, self._env.path()):
                    raise
                if most == 1:
                    return
                most = max(1, min(most, len(some)) // 8)
            else:
                self.forgotten.difference_update(some)

    def _make_room(self) -> None:
        """Delete what has to be, and commit once more: LMDB gives pages out again that were freed
        two transactions ago."""
        self._forget_for_good()
        with self._env.begin(write=True) as txn:
            txn.put(b"full", b"", db=self._database.about)
        self._may_have_room = bool(self.forgotten)

    def _delete_blocks(self, blocks: list[int]) -> None:
        with self._env.begin(write=True) as txn:
            has_tails = txn.stat(self._database.tails)["entries"] > 0
            for block in blocks:
                txn.delete(block_key(block), db=self._database.values)
                if has_tails:
                    txn.delete(block_key(block), db=self._database.tails)
        self._unsynced = self._may_have_room = True

    def _settle(self, sync: bool) -> None:
        self._forget_for_good()
        if self.forgotten:
            raise StoreFullError("no room to delete what was discarded", store=NAME)
        if sync and self._unsynced:
            self._env.sync(True)
            self._unsynced = False

    def _tried(self, act: Callable[[], None]) -> StoreError | None:
        """Do it; what went wrong, in the terms of a store."""
        if self._failure:
            return StoreFailedError(self._failure, store=NAME)
        try:
            act()
        except StoreError as error:
            return error
        except lmdb.Error as error:
            if isinstance(error, lmdb.MapFullError):
                size = format_size(self._env.info()["map_size"])
                return StoreFullError(f"the map is full (map_size={size})", store=NAME)
            if is_full(error, self._env.path()):
                return StoreFullError(f"no room on the medium: {error}", store=NAME)
            return self._fail(str(error))
        except MemoryError:
            return StoreFullError("no memory left to write with", store=NAME)
        except Exception as error:
            return self._fail(f"{type(error).__name__}: {error}")
        return None

    def _fail(self, reason: str) -> StoreFailedError:
        self._failure = reason
        return StoreFailedError(reason, store=NAME)


def _answer(answers: list[_Answer]) -> None:
    def resolve() -> None:
        for future, error in answers:
            future.set_result(error)
        answers.clear()  # an error would hold on to the caller's buffers until the thread went on

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        answers[0][0].get_loop().call_soon_threadsafe(resolve)
