"""The pool: what goes in comes out, objects move under nobody's hands, and memory comes back."""

import errno
import fcntl
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from userswap.native import check, codecs, ffi, lib

PAGE = 4096
MIB = 1024**2
SAME = lib.US_HANDLE_SAME
CODEC = codecs.open_codec("lz4").number
AUTO = int(lib.US_SHUFFLE_AUTO)
# AddressSanitizer's shadow alone is terabytes.
LIMITS = ("FSIZE",) if "asan" in os.environ.get("LD_PRELOAD", "") else ("FSIZE", "AS")
SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, SHRINK, GROW; fcntl has their names from 3.13 on


def sample(rng: random.Random) -> bytes:
    """A page as memory has them: mostly compressible, to every size there is, some not at all."""
    kind = rng.random()
    if kind < 0.05:
        return rng.randbytes(4) * (PAGE // 4)
    noise = PAGE if kind > 0.97 else int(rng.betavariate(1.2, 3) * PAGE)
    return rng.randbytes(noise) + b"userswap" * ((PAGE - noise) // 8) + bytes((PAGE - noise) % 8)


class Pool:
    """A native pool whose references are a dict: slot -> handle."""

    def __init__(self, rng: random.Random, limit: int = 0) -> None:
        out = ffi.new("struct us_pool **")
        check(lib.us_pool_create(out, CODEC, 1, AUTO, limit))
        self.pool: Any = out[0]
        self.handles: dict[int, int] = {}
        self.rng = rng
        self.refuse = 0.0
        self._callback = ffi.callback("us_relocate_fn", self._relocate)
        lib.us_pool_set_owner(self.pool, self._callback, ffi.NULL)

    def _relocate(self, owner: object, slot: int, old: int, new: int) -> int:
        if self.handles.get(slot) != old or self.rng.random() < self.refuse:
            return 0
        self.handles[slot] = new
        return 1

    def try_put(self, slot: int, page: bytes) -> int:
        handle = ffi.new("uint64_t *")
        rc = int(lib.us_pool_put(self.pool, page, slot, handle))
        if rc == 0:
            self.free(slot)
            self.handles[slot] = int(handle[0])
        return rc

    def put(self, slot: int, page: bytes) -> None:
        check(self.try_put(slot, page))

    def get(self, slot: int) -> bytes:
        return self.content(self.handles[slot])

    def try_content(self, handle: int) -> tuple[int, bytes]:
        page = ffi.new(f"uint8_t[{PAGE}]")
        return int(lib.us_pool_get(self.pool, handle, page)), bytes(ffi.buffer(page))

    def content(self, handle: int) -> bytes:
        rc, page = self.try_content(handle)
        check(rc)
        return page

    def free(self, slot: int) -> None:
        lib.us_pool_free(self.pool, self.handles.pop(slot, 0))

    def compact(self, moves: int = 1 << 30) -> int:
        return int(lib.us_pool_compact(self.pool, moves))

    @property
    def stats(self) -> Any:
        stats = ffi.new("struct us_pool_stats *")
        lib.us_pool_stats(self.pool, stats)
        return stats

    @property
    def held(self) -> int:
        return int(lib.us_pool_held(self.pool))

    def overhead(self) -> float:
        """Memory held beyond the compressed pages and their headers, as a share of these."""
        stats = self.stats
        return float(stats.file_bytes / (stats.payload_bytes + 8 * stats.objects) - 1)


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def pool(rng: random.Random) -> Iterator[Pool]:
    made = Pool(rng)
    yield made
    lib.us_pool_destroy(made.pool)


def test_history_equals_a_dict(pool: Pool, rng: random.Random) -> None:
    model: dict[int, bytes] = {}
    pool.refuse = 0.2
    for step in range(12_000):
        slot = rng.randrange(1500) << rng.choice((0, 30))
        growing = step % 3000 < 1500
        if rng.random() < (0.8 if growing else 0.3):
            model[slot] = sample(rng)
            pool.put(slot, model[slot])
        elif slot in model:
            assert pool.get(slot) == model.pop(slot)
            pool.free(slot)
        if rng.random() < 0.02:
            pool.compact(rng.randrange(200))
        if step % 1000 == 0:
            assert pool.handles.keys() == model.keys()
            assert all(pool.get(slot) == page for slot, page in model.items())
            assert pool.held == pool.stats.file_bytes
    assert pool.stats.moved > 100
    same = sum(handle & SAME > 0 for handle in pool.handles.values())
    assert pool.stats.same_filled == same > 0
    assert pool.stats.objects == len(model) - same
    costs = sum(lib.us_pool_cost(pool.pool, handle) for handle in pool.handles.values())
    assert pool.stats.object_bytes == costs


def test_every_size_of_object_survives(pool: Pool, rng: random.Random) -> None:
    pages = {noise: rng.randbytes(noise) + bytes(PAGE - noise) for noise in range(0, PAGE + 1, 7)}
    for noise, page in pages.items():
        pool.put(noise, page)
    assert all(pool.get(noise) == page for noise, page in pages.items())
    assert pool.stats.whole_pages > 0
    assert lib.us_pool_cost(pool.pool, pool.handles[4095]) == PAGE


def test_same_filled_pages_cost_nothing(pool: Pool) -> None:
    before = pool.held
    for slot, pattern in enumerate((b"\0\0\0\0", b"\xff\xff\xff\xff", b"abcd")):
        pool.put(slot, pattern * (PAGE // 4))
        assert pool.handles[slot] == SAME | int.from_bytes(pattern, "little")
        assert pool.get(slot) == pattern * (PAGE // 4)
        assert lib.us_pool_cost(pool.pool, pool.handles[slot]) == 0
    for place in (0, 2047, 4095):
        page = bytearray(PAGE)
        page[place] = 1
        pool.put(10 + place, bytes(page))
        assert not pool.handles[10 + place] & SAME
    assert pool.stats.same_filled == 3
    assert pool.held > before


def test_fragmentation_stays_low(pool: Pool, rng: random.Random) -> None:
    pages = [sample(rng) for _ in range(2000)]
    slots = range(16_000)
    for slot in slots:
        pool.put(slot, rng.choice(pages))
    assert pool.overhead() < 0.05
    for _ in range(20_000):
        pool.put(rng.choice(slots), rng.choice(pages))
        if lib.us_pool_wants_compaction(pool.pool):
            pool.compact(64)
    assert pool.overhead() < 0.08
    pool.compact()
    assert pool.overhead() < 0.05
    for slot in rng.sample(slots, len(slots) // 2):
        pool.free(slot)
    while lib.us_pool_wants_compaction(pool.pool):
        assert pool.compact(1000) > 0
    pool.compact()
    assert pool.overhead() < 0.05
    assert pool.held == pool.stats.file_bytes


def test_memory_comes_back(pool: Pool, rng: random.Random) -> None:
    for slot in range(4000):
        pool.put(slot, sample(rng))
    full = pool.held
    for slot in range(3990):
        pool.free(slot)
    assert pool.held < full / 2  # without being asked
    while pool.compact(100):
        pass
    assert pool.held < MIB / 2
    for slot in range(3990, 4000):
        pool.free(slot)
    pool.compact()
    assert pool.stats.objects == pool.stats.payload_bytes == pool.stats.object_bytes == 0
    assert pool.held <= 64 * 1024  # the tables'


def test_references_in_use_are_not_moved(pool: Pool, rng: random.Random) -> None:
    for slot in range(3000):
        pool.put(slot, sample(rng))
    for slot in rng.sample(range(3000), 2000):
        pool.free(slot)
    before = dict(pool.handles)
    pool.refuse = 1.0
    objects = pool.stats.objects
    assert pool.compact() == 0
    assert pool.handles == before
    assert pool.stats.objects == objects
    pool.refuse = 0.0
    assert pool.compact() > 0


def test_the_limit_is_kept_and_fills_well(rng: random.Random) -> None:
    pool = Pool(rng, limit=4 * MIB)
    model: dict[int, bytes] = {}
    full = 0
    for step in range(12_000):
        slot, page = rng.randrange(20_000), sample(rng)
        rc = pool.try_put(slot, page)
        if rc == 0:
            model[slot] = page
        else:
            assert rc == -errno.ENOSPC
            full += 1
            for victim in rng.sample(sorted(model), 20):
                pool.free(victim)
                del model[victim]
        assert pool.held <= 4 * MIB, step
    assert full > 20
    assert pool.stats.file_bytes == pool.held <= pool.stats.limit_bytes
    assert pool.stats.payload_bytes > 0.85 * 4 * MIB
    assert all(pool.get(slot) == page for slot, page in model.items())
    lib.us_pool_destroy(pool.pool)


def test_no_handle_but_a_live_one_is_believed(pool: Pool, rng: random.Random) -> None:
    for slot in range(500):
        pool.put(slot, sample(rng))
    live = set(pool.handles.values())
    freed = pool.handles[7]
    pool.free(7)
    held = pool.held
    wrong = [freed, 0, 1, 4095, 4096, SAME - 1, 1 << 40, 2**64 - SAME - 1]
    wrong += [rng.randrange(1 << rng.randrange(1, 36)) & (SAME - 1) for _ in range(5000)]
    wrong += [handle + rng.choice((-1, 1)) for handle in live if not handle & SAME]
    for handle in set(wrong) - (live - {freed}):
        if handle & SAME:
            continue
        assert pool.try_content(handle)[0] == -errno.EILSEQ
    assert pool.held == held  # looking at a hole allocates nothing


def test_damaged_memory_is_an_error_or_wrong_but_never_a_crash(
    pool: Pool, rng: random.Random
) -> None:
    for slot in range(200):
        pool.put(slot, sample(rng))
    handles = [handle for handle in pool.handles.values() if not handle & SAME]
    descriptor = lib.us_pool_fd(pool.pool)
    with mmap.mmap(descriptor, 64 * MIB) as memory:
        for handle in handles:
            place = handle * 16
            cost = lib.us_pool_cost(pool.pool, handle)
            original = memory[place : place + cost]
            for _ in range(10):
                memory[place + rng.randrange(min(cost, 24))] = rng.randrange(256)
                assert pool.try_content(handle)[0] in (0, -errno.EILSEQ)
            memory[place : place + cost] = original


def test_the_memfd_cannot_be_resized(pool: Pool) -> None:
    descriptor = lib.us_pool_fd(pool.pool)
    assert fcntl.fcntl(descriptor, 1034) == SEALS  # F_GET_SEALS
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)


def test_a_codec_that_is_not_open_is_refused() -> None:
    out = ffi.new("struct us_pool **")
    assert lib.us_pool_create(out, 99, 1, 0, 0) == -errno.EINVAL
    assert lib.us_pool_create(out, -1, 1, 0, 0) == -errno.EINVAL
    assert lib.us_pool_create(out, CODEC, 1, 3, 0) == -errno.EINVAL


@pytest.mark.parametrize("limit", LIMITS)
def test_it_takes_no_more_addresses_than_the_process_may_have(limit: str) -> None:
    script = (
        "import resource\n"
        "from userswap.native import check, codecs, ffi, lib\n"
        "number, out = codecs.open_codec('lz4').number, ffi.new('struct us_pool **')\n"
        f"resource.setrlimit(resource.RLIMIT_{limit}, (1 << 30, 1 << 30))\n"
        "check(lib.us_pool_create(out, number, 1, 0, 0))\n"
        "handle = ffi.new('uint64_t *')\n"
        "check(lib.us_pool_put(out[0], bytes(range(256)) * 16, 0, handle))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_threads_read_and_write_while_objects_move(seed: int) -> None:
    """Four threads own a quarter of the pages each; a fifth compacts all the time."""
    rng = random.Random(seed)
    pages, quarter, run = 2048, 512, 16
    kit = [sample(rng) for _ in range(300)]
    pool = Pool(rng)
    table = ffi.new("struct us_ram **")
    check(lib.us_ram_create(table, pool.pool, pages))
    done = threading.Event()
    wrong: list[int] = []

    def work(number: int) -> None:
        own = random.Random(seed + number)
        model = {index: bytes(PAGE) for index in range(number * quarter, (number + 1) * quarter)}
        error, buffer = ffi.new("int *"), ffi.new(f"uint8_t[{run * PAGE}]")
        for _ in range(500):
            first = number * quarter + own.randrange(quarter - run)
            what = own.random()
            if what < 0.4:
                content = own.choices(kit, k=run)
                model.update(zip(range(first, first + run), content, strict=True))
                lib.us_ram_write(table[0], first, run, b"".join(content), error)
            elif what < 0.5:
                model.update(dict.fromkeys(range(first, first + run), bytes(PAGE)))
                lib.us_ram_discard(table[0], first, run)
            else:
                read = lib.us_ram_read(table[0], first, run, buffer, error)
                expected = b"".join(model[index] for index in range(first, first + run))
                if read != run or bytes(ffi.buffer(buffer)) != expected:
                    wrong.append(first)

    def compact() -> None:
        while not done.is_set():
            pool.compact(256)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    compactor = threading.Thread(target=compact)
    for thread in (compactor, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    compactor.join()
    assert not wrong
    assert pool.stats.moved > 0
    lib.us_ram_destroy(table[0])
    lib.us_pool_destroy(pool.pool)
