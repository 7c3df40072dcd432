"""What each store adds to the contract, which test_conformance.py is about; and the registry."""

import mmap
import random
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
FULL_URLS = (
    "memory:?limit=1MiB",
    "ram:lz4?limit=1MiB",
    "ram:zstd?limit=1MiB",
    "ram:none?limit=1MiB",
)


def content(rng: random.Random, pages: int) -> bytes:
    noise = [rng.randrange(PAGE + 1) for _ in range(pages)]
    return b"".join(rng.randbytes(length) + bytes(PAGE - length) for length in noise)


async def read(store: Store, index: int, pages: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (pages * PAGE))
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes) -> None:
    await store.write([Run(index, memoryview(data))])


@pytest.mark.parametrize("url", FULL_URLS)
async def test_a_limit_is_kept_to_and_named(url: str, seed: int) -> None:
    rng = random.Random(seed)
    store = await open_stack(url, Geometry(PAGES))
    kept = 0
    error: StoreFullError | None = None
    while error is None:
        try:
            await write(store, kept * 2, rng.randbytes(PAGE))
            kept += 1
        except StoreFullError as full:
            error = full
    assert 200 <= kept <= 256
    assert error.page == kept * 2
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
        ("qq:", "there are: .*memory, "),
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
