"""Volumes: extents that never overlap, media that are left alone, and crashes at any moment."""

import asyncio
import contextlib
import random
import struct
import uuid
from collections.abc import Sequence

import pytest

from crash_store import CrashStore, Medium
from userswap.backends.grammar import GrammarError
from userswap.backends.medium import VolumeError, examine
from userswap.backends.memory import MemoryStore
from userswap.backends.ranges import Ranges
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run, Store, StoreError, StoreFullError, TransientError
from userswap.backends.superblock import NAME_BYTES, VERSION, TablePage
from userswap.backends.volume import Extent, Volume, format_volume, open_volume

PAGE = 4096
PAGES = 4096
FOREVER = 1 << 60
NAME = "the volume"


async def read(store: Store, index: int, pages: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (pages * store.page_size))
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes) -> None:
    await store.write([Run(index, memoryview(data))])


def apart(extents: Sequence[Extent]) -> bool:
    ordered = sorted((extent.base, extent.base + extent.pages) for extent in extents)
    ends = [0, *(end for _, end in ordered)]
    return all(start >= end for (start, _), end in zip(ordered, ends, strict=False))


def medium_of(pages: dict[int, bytes], page_count: int = PAGES) -> Medium:
    medium = Medium(random.Random(1), page_count)
    medium.safe.update(pages)
    return medium


async def opened(medium: Medium) -> Volume:
    return await open_volume(CrashStore(medium, FOREVER), name=NAME)


# --- what it is for ---


async def test_an_extent_reads_as_zeros_also_where_another_one_was(seed: int) -> None:
    volume = await open_volume(MemoryStore(PAGES), name=NAME)
    noise = random.Random(seed).randbytes(10 * PAGE)
    first = await volume.allocate("one", 10)
    second = await volume.allocate("two", 10)
    await write(volume.store, first.base, noise)
    await write(volume.store, second.base, noise)
    await volume.release(first)
    again = await volume.allocate("three", 10)
    assert again.base == first.base
    assert again.uuid != first.uuid
    assert await read(volume.store, again.base, 10) == bytes(10 * PAGE)
    assert await read(volume.store, second.base, 10) == noise
    assert [extent.name for extent in volume.extents] in (["two", "three"], ["three", "two"])
    await volume.release(first)  # long gone, which does no harm
    assert len(volume.extents) == 2
    await volume.aclose()


async def test_pages_that_a_format_left_behind_are_discarded_before_use(seed: int) -> None:
    noise = random.Random(seed).randbytes(PAGE)
    medium = medium_of({})
    volume = await opened(medium)
    base = (await volume.allocate("one", 100)).base
    await volume.aclose()
    medium.safe[base + 50] = noise  # where nobody looks when the volume is opened
    volume = await opened(medium)
    await volume.reclaim(volume.stale[0])
    extent = await volume.allocate("two", 100)
    assert await read(volume.store, extent.base, 100) == bytes(100 * PAGE)


@pytest.mark.parametrize("url", ["memory:", "ram:lz4"])
async def test_volumes_on_stores_without_a_size(url: str) -> None:
    volume = await open_volume(await open_stack(url, Geometry()), name=url)
    extents = [await volume.allocate(f"region {number}", 1 << 20) for number in range(3)]
    assert apart(extents)
    for extent in extents:
        await volume.release(extent)
    assert volume.extents == []
    await volume.aclose()


@pytest.mark.parametrize("page_size", [4096, 65536, 2 * 1024**2])
async def test_every_page_size(page_size: int) -> None:
    medium = Medium(random.Random(1), 64, page_size)
    volume = await open_volume(CrashStore(medium, FOREVER), name=NAME)
    extent = await volume.allocate("big", 50)
    volume = await open_volume(CrashStore(medium, FOREVER), name=NAME)
    assert volume.stale == [extent]
    assert extent.base + extent.pages <= 64


@pytest.mark.parametrize(
    "name", ["", " ", "a\nb", "tab\t", "\x1b[2J", "x" * (NAME_BYTES + 1), "\udc80", " x"]
)
async def test_names_are_checked(name: str) -> None:
    volume = await open_volume(MemoryStore(PAGES), name=NAME)
    with pytest.raises(GrammarError, match="name"):
        await volume.allocate(name, 1)
    assert volume.extents == []


async def test_the_longest_name_comes_back() -> None:
    medium = medium_of({})
    name = "ä" * (NAME_BYTES // 2)
    await (await opened(medium)).allocate(name, 1)
    assert [extent.name for extent in (await opened(medium)).stale] == [name]


async def test_no_room_is_said_and_changes_nothing() -> None:
    volume = await open_volume(MemoryStore(PAGES), name=NAME)
    kept = await volume.allocate("kept", PAGES // 2)
    with pytest.raises(StoreFullError, match="1 extents are in use"):
        await volume.allocate("too much", PAGES)
    assert volume.extents == [kept]


# --- stale extents ---


async def test_stale_extents_are_kept_until_their_room_is_needed(seed: int) -> None:
    noise = random.Random(seed).randbytes(PAGE)
    medium = medium_of({})
    before = await opened(medium)
    old = [await before.allocate(f"old {number}", 1000) for number in range(3)]
    for extent in old:
        await write(before.store, extent.base + 5, noise)
    volume = await opened(medium)
    assert sorted(volume.stale, key=lambda extent: extent.base) == old
    new = await volume.allocate("new", 500)
    assert len(volume.stale) == 3
    assert await read(volume.store, old[0].base + 5) == noise
    larger = await volume.allocate("larger", 1800)
    assert apart([new, larger, *volume.stale])
    assert len(volume.stale) == 1
    assert await read(volume.store, larger.base, 1800) == bytes(1800 * PAGE)
    assert await read(volume.store, volume.stale[0].base + 5) == noise
    await volume.reclaim(volume.stale[0])
    assert volume.stale == []
    with pytest.raises(VolumeError, match="no stale extent"):
        await volume.reclaim(old[0])
    with pytest.raises(VolumeError, match="no stale extent"):
        await volume.reclaim(new)


async def test_what_could_not_be_made_room_for_costs_no_stale_extent() -> None:
    medium = medium_of({})
    await (await opened(medium)).allocate("old", 1000)
    volume = await opened(medium)
    with pytest.raises(StoreFullError):
        await volume.allocate("more than there is", PAGES)
    assert len(volume.stale) == 1


async def test_who_only_looks_costs_no_stale_extent() -> None:
    medium = medium_of({})
    await (await opened(medium)).allocate("old", 3000)
    volume = await opened(medium)
    with pytest.raises(StoreFullError, match="1 extents are in use"):
        await volume.allocate("a measurement", 2000, reclaim=False)
    await volume.allocate("a measurement", 1000, reclaim=False)
    assert len(volume.stale) == 1


async def test_an_extent_waits_for_one_that_is_being_released() -> None:
    volume = await opened(medium_of({}))
    first = await volume.allocate("one", 4000)
    _, second = await asyncio.gather(volume.release(first), volume.allocate("two", 4000))
    assert volume.extents == [second]


async def test_a_cancelled_operation_leaves_a_stale_extent() -> None:
    medium = medium_of({})
    volume = await opened(medium)
    kept = await volume.allocate("kept", 10)
    for _ in range(50):
        task = asyncio.ensure_future(volume.allocate("cancelled", 100))
        for _ in range(medium.rng.randrange(12)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert apart(volume.extents)
    await volume.aclose()
    again = await opened(medium)
    assert kept in again.stale
    assert apart(again.stale)
    assert {extent.name for extent in again.stale} <= {"kept", "cancelled"}


# --- many ---


async def test_thousands_of_extents_at_a_bounded_cost() -> None:
    count = 3000
    medium = medium_of({}, 4 * 1024**2)
    store = CrashStore(medium, FOREVER)
    volume = await open_volume(store, name=NAME)
    extents = await asyncio.gather(*(volume.allocate(f"r{n}", 1 + n % 7) for n in range(count)))
    assert apart(extents)
    batched = store.writes
    assert batched < count // 10
    await asyncio.gather(*(volume.release(extent) for extent in extents[::2]))
    assert store.writes - batched < count // 10
    written, flushed = store.writes, store.flushes
    one = await volume.allocate("one more", 3)
    assert (store.writes - written, store.flushes - flushed) == (1, 1)
    again = await opened(medium)
    expected = [*extents[1::2], one]
    assert {extent.uuid for extent in again.stale} == {extent.uuid for extent in expected}


async def test_the_table_has_an_end() -> None:
    volume = await open_volume(MemoryStore(1000), name=NAME)
    extents = [await volume.allocate("small", 1) for _ in range(31)]
    with pytest.raises(StoreFullError, match="31 extents, the most"):
        await volume.allocate("one too many", 1)
    await volume.release(extents[7])
    await volume.allocate("fits", 1)


def test_ranges_equal_a_set(seed: int) -> None:
    rng = random.Random(seed)
    ranges, model = Ranges(), set[int]()
    for _ in range(3000):
        first, count = rng.randrange(100), rng.randrange(1, 12)
        pages = set(range(first, first + count))
        if rng.random() < 0.5:
            ranges.add(first, count)
            model |= pages
        else:
            ranges.remove(first, count)
            model -= pages
        found = [page for start, length in ranges for page in range(start, start + length)]
        assert found == sorted(model)
        assert ranges.covers(first, count) == (pages <= model)
        starts = [n for n in range(110) if set(range(n, n + count)) <= model]
        assert ranges.find(count) == (starts[0] if starts else None)


async def test_what_an_earlier_attempt_left_in_the_table_is_not_believed() -> None:
    medium = medium_of({})
    volume = await opened(medium)
    ghost = Extent(500, 100, "ghost", uuid.uuid4(), 0)
    for number in (0, 1):
        left = TablePage(volume.uuid, number, 9, [ghost]).pack(PAGE)
        medium.safe.update({2 + 2 * number: left, 3 + 2 * number: left})
    extents: list[Extent] = []
    for upto in (1, 32):  # one entry alone in the first page of the table, and in the second
        extents += [await volume.allocate("real", 1) for _ in range(len(extents), upto)]
        assert set((await opened(medium)).stale) == set(extents)


async def test_what_failed_is_stale_until_the_table_is_written() -> None:
    medium = medium_of({})
    store = CrashStore(medium, FOREVER)
    volume = await open_volume(store, name=NAME)
    store.flaky = 1
    with pytest.raises(TransientError):
        await volume.allocate("one", 10)
    (failed,) = volume.stale
    store.flaky = 0
    other = await volume.allocate("two", 10)
    assert apart([failed, other])
    store.flaky = 1
    with pytest.raises(TransientError):
        await volume.release(other)
    assert set(volume.stale) == {failed, other}
    store.flaky = 0
    await volume.release(other)
    await volume.reclaim(failed)
    assert volume.extents == (await opened(medium)).stale == []


# --- media ---


SIGNATURES = {
    "ext2": {0: struct.pack("1080x2s3014x", b"\x53\xef")},
    "btrfs": {16: b"x" * 64 + b"_BHRfS_M" + bytes(4024)},
    "GPT": {0: bytes(512) + b"EFI PART" + bytes(3576)},
    "LUKS": {0: b"LUKS\xba\xbe" + bytes(4090)},
    "swap space": {0: bytes(4086) + b"SWAPSPACE2"},
    "something else": {PAGES - 1: b"a backup of a partition table".ljust(PAGE, b"\0")},
    "something else (at 4KiB)": {1: bytes(4095) + b"x"},
    "(at 8MiB)": {2048: b"in the middle".ljust(PAGE, b"\0")},
}


@pytest.mark.parametrize("what", SIGNATURES)
async def test_a_foreign_medium_is_refused_and_left_alone(what: str) -> None:
    medium = medium_of(SIGNATURES[what])
    for offered in (open_volume, format_volume):
        store = CrashStore(medium, FOREVER)
        with pytest.raises(VolumeError, match=r"not blank.*Nothing was written.*--force") as caught:
            await offered(store, name=NAME)
        assert what in str(caught.value)
        assert (store.writes, store.flushes, store.discarded) == (0, 0, [])
    assert medium.safe == SIGNATURES[what]
    await format_volume(CrashStore(medium, FOREVER), name=NAME, force=True)
    volume = await opened(medium)
    extent = await volume.allocate("new", PAGES - 100)
    assert await read(volume.store, extent.base, extent.pages) == bytes(extent.pages * PAGE)


async def test_a_volume_is_formatted_again_only_by_force() -> None:
    medium = medium_of({})
    volume = await opened(medium)
    await volume.allocate("one", 10)
    with pytest.raises(VolumeError, match="holds a volume already"):
        await format_volume(CrashStore(medium, FOREVER), name=NAME)
    await format_volume(CrashStore(medium, FOREVER), name=NAME, force=True)
    again = await opened(medium)
    assert again.stale == []
    assert again.uuid != volume.uuid


async def test_a_damaged_volume_is_refused_with_the_remedy() -> None:
    medium = medium_of({})
    volume = await opened(medium)
    for _ in range(2):
        await volume.allocate("one", 10)
    good = dict(medium.safe)
    for copies in ((0, 1), (2, 3)):
        medium.safe = dict(good)
        for copy in copies:
            page = bytearray(medium.safe[copy])
            page[40] ^= 1
            medium.safe[copy] = bytes(page)
        with pytest.raises(VolumeError, match=r"damaged volume: .*checksum.*store format --force"):
            await opened(medium)
    for copy in (0, 1):
        medium.safe = {**good, copy: bytes(PAGE)}
        assert len((await opened(medium)).stale) == 2


async def test_a_newer_version_is_refused_with_the_remedy() -> None:
    medium = medium_of({})
    await opened(medium)
    for copy in (0, 1):
        page = bytearray(medium.safe[copy])
        page[8:10] = (VERSION + 1).to_bytes(2, "little")
        medium.safe[copy] = bytes(page)
    with pytest.raises(VolumeError, match=f"version {VERSION + 1}.*newer userswap"):
        await opened(medium)


async def test_other_pages_and_a_smaller_medium_are_named() -> None:
    medium = medium_of({})
    volume = await opened(medium)
    await volume.allocate("one", 3000)
    medium.page_count = 2000
    with pytest.raises(VolumeError, match=r"has 7.81MiB now, but extents up to .*size back"):
        await opened(medium)
    wide = Medium(random.Random(1), PAGES // 16, 65536)
    wide.safe[0] = b"".join(medium.page(index) for index in range(16))
    with pytest.raises(VolumeError, match="pages of 4KiB; it was opened with pages of 64KiB"):
        await open_volume(CrashStore(wide, FOREVER), name=NAME)
    with pytest.raises(VolumeError, match="too small"):
        await open_volume(MemoryStore(4), name=NAME)


async def test_looking_writes_nothing() -> None:
    medium = medium_of({})
    store = CrashStore(medium, FOREVER)
    assert await examine(store, name=NAME) is None
    extent = await (await opened(medium)).allocate("one", 10)
    contents = await examine(store, name=NAME)
    assert contents is not None
    assert contents.extents == [extent]
    assert store.writes == 0


# --- crashes ---


class History:
    """What one process did with a volume, as far as it was told."""

    def __init__(self, rng: random.Random, volume: Volume) -> None:
        self.rng = rng
        self.volume = volume
        self.live: dict[Extent, bytes] = {}
        """Extents that were handed out, and what their first page holds for certain."""
        self.doubtful: set[Extent] = set()
        self.gone: set[Extent] = set()

    async def run(self) -> None:
        while True:
            steps = [self._step() for _ in range(self.rng.randrange(1, 6))]
            results = await asyncio.gather(*steps, return_exceptions=True)
            errors = [result for result in results if result is not None]
            for error in errors:
                assert isinstance(error, StoreError), error
            if any(not isinstance(error, TransientError) for error in errors):
                return
            assert apart(self.volume.extents)

    async def _step(self) -> None:
        if self.live and self.rng.random() < 0.45:
            extent = self.rng.choice(list(self.live))
            del self.live[extent]
            self.doubtful.add(extent)
            await self.volume.release(extent)
            self.gone.add(extent)
        elif self.volume.stale and self.rng.random() < 0.3:
            extent = self.rng.choice(self.volume.stale)
            await self.volume.reclaim(extent)
            self.gone.add(extent)
        else:
            extent = await self.volume.allocate("region", self.rng.randrange(1, 9))
            self.live[extent] = b""
            assert await read(self.volume.store, extent.base, extent.pages) == bytes(
                extent.pages * PAGE
            )
            content = self.rng.randbytes(PAGE)
            await write(self.volume.store, extent.base, content)
            await self.volume.store.flush()
            if extent in self.live:
                self.live[extent] = content


@pytest.mark.parametrize("part", range(4))
async def test_a_crash_at_any_moment(part: int, seed: int) -> None:
    """Torn and lost writes of every page: what was handed out is listed and whole, what was
    released is not listed, nothing overlaps, and new extents read as zeros."""
    for round_ in range(60):
        rng = random.Random(seed * 1000 + round_)
        medium = Medium(rng, rng.choice((40, 300)))
        await opened(medium)
        for _ in range(6):
            operations = rng.randrange(6, rng.choice((20, 120)))
            store = CrashStore(medium, operations)
            volume = await open_volume(store, name=NAME)
            store.flaky = rng.choice((0, 0.02))
            history = History(rng, volume)
            await history.run()
            if rng.random() < 0.7:
                medium.lose_power()
            looking = await examine(CrashStore(medium, FOREVER), name=NAME)
            assert looking is not None
            assert apart(looking.extents)
            listed = set(looking.extents)
            assert history.live.keys() <= listed
            assert not history.gone & listed
            for extent, content in history.live.items():
                assert not content or medium.page(extent.base) == content


async def test_a_kill_and_then_a_power_cut(seed: int) -> None:
    """What a killed process left unflushed is safe before its successor writes anything."""
    for round_ in range(600):
        rng = random.Random(seed * 1000 + round_)
        medium = Medium(rng, 40)
        volume = await opened(medium)
        kept = [await volume.allocate("kept", 1) for _ in range(2)]
        for _ in range(2):
            with contextlib.suppress(StoreError):
                volume = await open_volume(CrashStore(medium, rng.randrange(3, 12)), name=NAME)
                await volume.allocate("doubtful", 1)
        medium.lose_power()
        assert set(kept) <= set((await opened(medium)).stale)
