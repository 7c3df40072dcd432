"""The contract of a store (backends/store.py), clause by clause, on every store there is."""

import mmap
import random
from collections.abc import AsyncIterator
from importlib.metadata import EntryPoint

import pytest

from userswap.backends import memory, registry
from userswap.backends.grammar import GrammarError, LayerSpec
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Below,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    StoreFullError,
    TransientError,
)
from userswap.native import lib

PAGE = 4096
PAGES = 1000
MIB = 1024**2
URLS = ("memory:", "memory:?limit=50%25", "ram:", "ram:lz4", "ram:zstd?level=3", "ram:none")
FULL_URLS = (
    "memory:?limit=1MiB",
    "ram:lz4?limit=1MiB",
    "ram:zstd?limit=1MiB",
    "ram:none?limit=1MiB",
)


@pytest.fixture(params=URLS)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    opened = await open_stack(request.param, Geometry(PAGES))
    yield opened
    await opened.aclose()


def content(rng: random.Random, pages: int) -> bytes:
    noise = [rng.randrange(PAGE + 1) for _ in range(pages)]
    return b"".join(rng.randbytes(length) + bytes(PAGE - length) for length in noise)


async def read(store: Store, index: int, pages: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (pages * PAGE))
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes) -> None:
    await store.write([Run(index, memoryview(data))])


async def test_zeros_before_the_first_write(store: Store) -> None:
    assert store.page_size == PAGE
    assert store.page_count == PAGES
    assert await read(store, 0) == bytes(PAGE)
    assert await read(store, PAGES - 3, 3) == bytes(3 * PAGE)


async def test_what_was_written_is_read(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    first, last, middle = content(rng, 1), content(rng, 1), content(rng, 20)
    await store.write([Run(0, memoryview(first)), Run(PAGES - 1, memoryview(last))])
    await write(store, 500, middle)
    assert await read(store, 0) == first
    assert await read(store, PAGES - 1) == last
    assert await read(store, 499, 22) == bytes(PAGE) + middle + bytes(PAGE)
    buffers = [bytearray(PAGE) for _ in range(20)]
    await store.read([Run(500 + i, memoryview(buffer)) for i, buffer in enumerate(buffers)])
    assert b"".join(buffers) == middle


async def test_a_run_overwritten_in_part(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    old, new = content(rng, 10), content(rng, 4)
    await write(store, 10, old)
    await write(store, 13, new)
    assert await read(store, 10, 10) == old[: 3 * PAGE] + new + old[7 * PAGE :]


async def test_discarded_pages_read_as_zeros(store: Store, seed: int) -> None:
    data = content(random.Random(seed), 10)
    await write(store, 100, data)
    await store.discard(102, 5)
    await store.discard(0, PAGES - 900)
    await store.discard(7, 0)
    assert await read(store, 100, 10) == data[: 2 * PAGE] + bytes(5 * PAGE) + data[7 * PAGE :]


async def test_the_buffer_is_the_callers_again(store: Store, seed: int) -> None:
    data = content(random.Random(seed), 4)
    buffer = bytearray(data)
    await write(store, 5, memoryview(buffer))  # type: ignore[arg-type]
    buffer[:] = b"\xff" * len(buffer)
    assert await read(store, 5, 4) == data
    buffer.clear()  # refused while anybody exports it


async def test_history_equals_a_dict(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    model: dict[int, bytes] = {}
    for _ in range(600):
        index, pages = rng.randrange(200), rng.randrange(1, 9)
        action = rng.random()
        if action < 0.45:
            data = content(rng, pages)
            await write(store, index, data)
            model.update((index + i, data[i * PAGE : (i + 1) * PAGE]) for i in range(pages))
        elif action < 0.6:
            await store.discard(index, pages)
            for page in range(index, index + pages):
                model.pop(page, None)
        else:
            expected = b"".join(model.get(index + i, bytes(PAGE)) for i in range(pages))
            assert await read(store, index, pages) == expected
        if rng.random() < 0.02:
            await store.flush()


async def test_pages_that_do_not_exist_are_the_callers_bug(store: Store) -> None:
    for index, length in ((PAGES, PAGE), (-1, PAGE), (PAGES - 1, 2 * PAGE), (0, 100)):
        run = Run(index, memoryview(bytearray(length)))
        with pytest.raises(AssertionError):
            await store.read([run])
        with pytest.raises(AssertionError):
            await store.write([run])
    for index, count in ((PAGES, 1), (-1, 2), (0, PAGES + 1), (5, -1)):
        with pytest.raises(AssertionError):
            await store.discard(index, count)


async def test_closed_twice_and_used_after(store: Store) -> None:
    await write(store, 1, bytes(range(256)) * 16)
    await store.aclose()
    await store.aclose()
    run = Run(1, memoryview(bytearray(PAGE)))
    for call in (
        store.read([run]),
        store.write([run]),
        store.discard(1, 1),
        store.flush(),
    ):
        with pytest.raises(StoreFailedError, match="closed"):
            await call


@pytest.mark.parametrize("url", FULL_URLS)
async def test_a_full_store_keeps_what_it_has(url: str, seed: int) -> None:
    rng = random.Random(seed)
    store = await open_stack(url, Geometry(PAGES))
    old = {index: rng.randbytes(PAGE) for index in range(0, PAGES, 2)}
    kept = 0
    error: StoreFullError | None = None
    while error is None:
        try:
            await write(store, kept * 2, old[kept * 2])
            kept += 1
        except StoreFullError as full:
            error = full
    assert 200 <= kept <= 256
    assert error.page == kept * 2
    with pytest.raises(StoreFullError):
        await write(store, kept * 2 - 2, b"".join(rng.randbytes(PAGE) for _ in range(3)))
    survivors = list(old.items())[: kept - 1]
    for index, data in survivors:
        assert await read(store, index) == data
    assert await read(store, kept * 2) == bytes(PAGE)
    await store.discard(0, 40)
    await write(store, 0, old[0])
    assert await read(store, 0) == old[0]
    await store.aclose()


async def test_a_damaged_page_is_lost_alone(seed: int) -> None:
    rng = random.Random(seed)
    store = await open_stack("ram:zstd", Geometry(PAGES))
    assert store.native is not None
    data = content(rng, 1)
    await write(store, 3, data)
    await write(store, 8, bytes(range(256)) * 16)
    with mmap.mmap(store.native.fd, MIB) as memory:
        # What page 8 compresses to is tiny: it and page 3 are in different blocks of 64 KiB.
        headers = [place for place in range(65536, MIB, 65536) if any(memory[place : place + 8])]
        slots = {int.from_bytes(memory[at : at + 8], "little") >> 17: at for at in headers}
        memory[slots[8] : slots[8] + 2] = b"\xff\xff"
    with pytest.raises(PageLostError) as caught:
        await read(store, 7, 3)
    assert caught.value.page == 8
    assert "page 8" in str(caught.value)
    assert await read(store, 3) == data
    await store.aclose()


async def test_compressed_ram_says_what_the_fault_server_needs() -> None:
    store = await open_stack("ram:zstd?limit=512MiB", Geometry(PAGES))
    assert store.native is not None
    assert lib.us_pool_fd(store.native.pool) == store.native.fd
    assert store.native.description.startswith("zstd ")
    assert "512MiB" in store.native.description
    await store.aclose()
    assert store.native is None
    assert (await open_stack("memory:", Geometry(PAGES))).native is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rma:lz4", "did you mean 'ram'"),
        ("disk:", "there are: memory, ram"),
        ("ram:lz5", "did you mean 'lz4'"),
        ("ram:lz4?level=2", "unknown option 'level'"),
        ("ram:zstd?level=99", "from -50 to 22"),
        ("ram:lz4?limit=4KiB", "at least 1MiB"),
        ("ram:lz4?limit=1MB", "MiB"),
        ("memory:target", "takes no target"),
        ("cheksum::ram:lz4", "did you mean 'checksum'"),
    ],
)
async def test_a_url_that_is_wrong_says_how(url: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        await open_stack(url, Geometry(PAGES))


class Doubled(memory.MemoryStore):
    """Stands for a filter: remembers what it was put over."""

    under: Store


async def open_filter(layer: LayerSpec, geometry: Geometry, below: Below) -> Store:
    if layer.options:
        raise layer.error("takes no options")
    under = await below.open(geometry)
    opened = Doubled(under.page_count)
    opened.under = under
    return opened


def open_nothing(layer: LayerSpec, geometry: Geometry, below: Below) -> object:
    return layer


async def test_filters_are_opened_from_the_inside_out(monkeypatch: pytest.MonkeyPatch) -> None:
    group = registry.FILTERS_GROUP
    here = {
        "twice": EntryPoint("twice", f"{__name__}:open_filter", group),
        "absent": EntryPoint("absent", "nowhere.at_all:open_filter", group),
        "nothing": EntryPoint("nothing", f"{__name__}:open_nothing", group),
    }
    monkeypatch.setattr(registry, "filters", lambda: here)
    outer = await open_stack("twice::twice::ram:lz4", Geometry(PAGES))
    assert isinstance(outer, Doubled)
    assert isinstance(outer.under, Doubled)
    assert outer.under.under.native is not None
    with pytest.raises(StoreFailedError, match="nowhere"):
        await open_stack("absent::ram:lz4", Geometry(PAGES))
    with pytest.raises(StoreFailedError, match="which is no store"):
        await open_stack("nothing::memory:", Geometry(PAGES))
    with pytest.raises(GrammarError, match="takes no options"):
        await open_stack("twice?a=b::memory:", Geometry(PAGES))


def test_errors_name_the_store_and_the_page() -> None:
    error = PageLostError("bad checksum", store="checksum", page=7)
    assert str(error) == "checksum: page 7: bad checksum"
    assert str(TransientError("again", store="tcp")) == "tcp: again"
    assert all(
        issubclass(kind, StoreError)
        for kind in (TransientError, PageLostError, StoreFullError, StoreFailedError)
    )
