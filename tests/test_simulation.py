"""The simulator, against a second opinion: libCacheSim's policies on the same touches."""

from __future__ import annotations

import importlib
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from userswap.engine.simulation import Setting, Touches

PAIRS = {"fifo": "FIFO", "clock": "Clock", "s3g": "S3FIFO"}


def skewed(count: int, pages: int, draw: random.Random) -> list[int]:
    by_rank = draw.sample(range(pages), pages)
    weights = [rank**-0.9 for rank in range(1, pages + 1)]
    return draw.choices(by_rank, weights, k=count)


def scans_between(draw: random.Random) -> list[int]:
    touches = []
    for turn in range(8):
        touches += skewed(12_000, 8000, random.Random(1))
        touches += range(10_000 + turn * 500, 13_000 + turn * 500)
    return touches


TRACES: dict[str, Callable[[random.Random], list[int]]] = {
    "skewed": lambda draw: skewed(100_000, 8000, draw),
    "uniform": lambda draw: [draw.randrange(4000) for _ in range(80_000)],
    "scans between": scans_between,
    "sweep": lambda draw: list(range(4000)) * 20,
    "moving": lambda draw: [
        (at // 40 + int(draw.paretovariate(0.6))) % 8000 for at in range(100_000)
    ],
}


def second_opinion(touches: Sequence[int], capacity: int, path: Path) -> dict[str, float]:
    libcachesim: Any = importlib.import_module("libcachesim")
    following, latest = [-1] * len(touches), dict[int, int]()
    for at in range(len(touches) - 1, -1, -1):
        following[at] = latest.get(touches[at], -2) + 1
        latest[touches[at]] = at
    with path.open("wb") as file:
        for page, after in zip(touches, following, strict=True):
            file.write(struct.pack("<IQIq", 0, page, 4096, after))
    found = {}
    for name in (*PAIRS.values(), "Belady"):
        reader = libcachesim.TraceReader(
            str(path),
            libcachesim.TraceType.ORACLE_GENERAL_TRACE,
            libcachesim.ReaderInitParam(ignore_obj_size=True),
        )
        found[name] = getattr(libcachesim, name)(capacity).process_trace(reader)[0]
    return found


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("trace", TRACES)
def test_libcachesim_agrees(trace: str, share: float, seed: int, tmp_path: Path) -> None:
    touches = TRACES[trace](random.Random(seed))
    ours = Touches(touches)
    capacity = int(ours.different * share)
    theirs = second_opinion(touches, capacity, tmp_path / "trace")
    for name, counterpart in PAIRS.items():
        setting = Setting(name, "none", capacity, least=0, hits_seen=True)
        # Ghosts count by departures with us and by entries with them: half a percent at the most.
        apart = 0.005 if name == "s3g" else 1e-9
        assert ours.simulate(setting).miss_ratio == pytest.approx(theirs[counterpart], abs=apart)
    assert ours.best(capacity) / len(ours) == pytest.approx(theirs["Belady"], abs=1e-9)


# --- time, and reading ahead ---


def test_every_miss_waits_for_the_store() -> None:
    touches = Touches([0, 1, 2, 0, 1, 2])
    result = touches.simulate(Setting("fifo", "none", 2, store_ns=1000, fault_ns=10))
    assert (result.misses, result.zeros, result.stall_ns) == (6, 0, 6 * 1010)


def test_pages_that_were_never_written_are_zeros_and_are_not_read() -> None:
    touches = Touches([0, 1, 2, 0, 1, 2])
    result = touches.simulate(Setting("fifo", "none", 2, stored=False, store_ns=1000, fault_ns=10))
    assert (result.misses, result.zeros, result.stall_ns) == (6, 3, 3 * 10 + 3 * 1010)


def test_a_page_that_is_still_on_its_way_is_waited_for() -> None:
    scan = Touches(range(4096))
    slow = Setting("fifo", "streams", 1024, store_ns=100_000, fault_ns=0)
    idle = scan.simulate(slow)
    # Each window comes with the page that asked for it: one wait for up to 32 pages.
    assert idle.stall_ns == idle.misses * 100_000
    assert idle.late == 0
    assert idle.misses < 4096 / 20


def test_what_is_read_ahead_is_either_used_or_wasted(seed: int) -> None:
    draw = random.Random(seed)
    touches = [page + draw.randrange(20) * (draw.random() < 0.1) for page in range(20_000)]
    for eviction in ("fifo", "s3g", "bip", "random"):
        result = Touches(touches).simulate(Setting(eviction, "streams", 500))
        assert result.used + result.wasted <= result.ahead <= result.used + result.wasted + 500
        assert result.used > 5000


def test_what_is_read_ahead_takes_an_eighth_of_the_memory_at_the_most() -> None:
    touches = Touches(list(range(4000, 4100)) + list(range(64)))
    result = touches.simulate(Setting("fifo", "streams", 64))
    assert result.ahead - result.used - result.wasted <= 8


def test_phases_reach_the_policy(seed: int) -> None:
    draw = random.Random(seed)
    working, between = draw.sample(range(4000), 1000), list(range(4000, 8000))
    touches = working + between + working
    phases = [(0, 1), (1000, 2), (5000, 1)]
    before = Touches(touches).simulate(Setting("fifo", "replay", 3500))
    after = Touches(touches, phases).simulate(Setting("fifo", "replay", 3500))
    assert before.misses == 6000
    assert after.misses < 5100


def test_a_tail_is_touched_without_a_read() -> None:
    touches = Touches([0, 1, 2, 3, 0, 4, 0, 5, 0])
    plain = touches.simulate(Setting("clock", "none", 4))
    tail = touches.simulate(Setting("clock", "none", 4, tail=128))
    assert plain.misses > tail.misses
    assert tail.rescued > 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError):
        Touches([1]).simulate(Setting("psychic", "none", 1))
    with pytest.raises(KeyError):
        Touches([1]).simulate(Setting("fifo", "psychic", 1))
