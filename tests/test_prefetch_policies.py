"""Prefetch policies as pure objects: what they cover, how exact they are, what they waste."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from userswap.engine.policies.prefetch import Prefetcher, Replayer, names
from userswap.engine.simulation import Result, Setting, Touches

PAGES = 4096


def interleaved(streams: int, noise: float, draw: random.Random) -> list[int]:
    touches = []
    for _ in range(3):
        for step in range(1024):
            for stream in range(streams):
                touches.append(stream * 4096 + step)
                if draw.random() < noise:
                    touches.append(64 * 1024 + draw.randrange(64 * 1024))
    return touches


def loop(laps: int, drift: int, draw: random.Random) -> list[int]:
    """The same irregular order again and again, of which `drift` pairs change places each time."""
    order, touches = draw.sample(range(PAGES), PAGES), []
    for _ in range(laps):
        touches += order
        for _ in range(drift):
            a, b = draw.randrange(PAGES), draw.randrange(PAGES)
            order[a], order[b] = order[b], order[a]
    return touches


def cover(policy: str, touches: Sequence[int], *, used_seen: bool = False) -> tuple[float, Result]:
    """The share of the misses that the policy spares, with memory for a quarter of the pages."""
    trace = Touches(touches)
    room = trace.different // 4
    before = trace.simulate(Setting("fifo", "none", room)).misses
    after = trace.simulate(Setting("fifo", policy, room, used_seen=used_seen))
    return 1 - after.misses / before, after


def wasted(result: Result) -> float:
    """Pages read for nothing, of all that were read."""
    return result.wasted / (result.misses + result.ahead)


SCANS: dict[str, Callable[[random.Random], Sequence[int]]] = {
    "sequential": lambda draw: list(range(PAGES)) * 3,
    "backwards": lambda draw: list(range(PAGES, 0, -1)) * 3,
    "strided": lambda draw: list(range(0, 7 * PAGES, 7)) * 3,
    "interleaved": lambda draw: interleaved(8, 0, draw),
}


@pytest.mark.parametrize("scan", SCANS)
def test_streams_cover_scans(scan: str, seed: int) -> None:
    covered, result = cover("streams", SCANS[scan](random.Random(seed)))
    assert covered >= 0.9
    assert result.accuracy is not None
    assert result.accuracy >= 0.9


def test_streams_are_found_in_noise(seed: int) -> None:
    draw = random.Random(seed)
    covered, result = cover("streams", interleaved(8, 0.4, draw))
    assert covered >= 0.6  # of at most 1 / 1.4
    assert wasted(result) < 0.02


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize("pages", [1024, 16384])
def test_random_access_wastes_next_to_nothing(policy: str, pages: int, seed: int) -> None:
    draw = random.Random(seed)
    _, result = cover(policy, [draw.randrange(pages) for _ in range(60_000)])
    assert wasted(result) < 0.02
    assert result.ahead < 0.03 * result.misses


@pytest.mark.parametrize("policy", names())
def test_skewed_access_wastes_next_to_nothing(policy: str, seed: int) -> None:
    draw = random.Random(seed)
    ranks, weights = draw.sample(range(PAGES), PAGES), [1 / (rank + 1) for rank in range(PAGES)]
    touches = draw.choices(ranks, weights, k=60_000)
    assert wasted(cover(policy, touches)[1]) < 0.02


@pytest.mark.parametrize("used_seen", [False, True])
def test_linux_covers_what_linux_does(used_seen: bool) -> None:
    # With windows of 8 pages at most 7 of 8 faults; the edge stands for hits that are not seen.
    scan = list(range(PAGES)) * 3
    assert 0.85 < cover("linux", scan, used_seen=used_seen)[0] <= 0.875
    assert cover("linux", scan[::-1], used_seen=used_seen)[0] > 0.85
    assert cover("linux", SCANS["strided"](random.Random()), used_seen=used_seen)[0] == 0


@pytest.mark.parametrize("used_seen", [False, True])
def test_leap_covers_one_trend(used_seen: bool) -> None:
    assert 0.85 < cover("leap", list(range(PAGES)) * 3, used_seen=used_seen)[0] <= 0.89
    assert cover("leap", list(range(0, 7 * PAGES, 7)) * 3, used_seen=used_seen)[0] > 0.85


def test_leap_finds_the_majority_of_distances() -> None:
    leap = Prefetcher("leap")
    page, found = 1000, []
    for step in range(40):
        page += 900 if step % 4 == 3 else 5
        found.append(leap.fault(page))
    assert found[-2] == [page - 900 + 5]


def test_successor_covers_what_comes_again_in_an_irregular_order(seed: int) -> None:
    covered, result = cover("successor", loop(6, 0, random.Random(seed)))
    assert covered > 0.78  # of at most 5/6: the first lap is not known
    assert result.accuracy is not None
    assert result.accuracy > 0.97
    covered, result = cover("successor", loop(6, PAGES // 40, random.Random(seed)))
    assert covered > 0.6
    assert result.accuracy is not None
    assert result.accuracy > 0.85


def test_successor_reads_nothing_before_a_fault_has_borne_it_out() -> None:
    successor = Prefetcher("successor")
    order = [50, 7, 93, 12, 61, 33]
    assert [successor.fault(page) for page in order] == [[]] * 6
    assert successor.fault(50) == []
    assert successor.fault(7) == [93, 12]
    assert successor.fault(61) == [33, 50, 7, 93]  # and so on, where it goes round


def test_replay_reads_what_the_phase_touched(seed: int) -> None:
    draw = random.Random(seed)
    working, other = draw.sample(range(8192), 3000), draw.sample(range(8192, 16384), 3000)
    replay = Replayer()
    for name, pages in ((1, working), (2, other)):
        assert replay.phase(name) == []
        assert [replay.fault(page) for page in pages] == [[]] * 3000
    resident = set(replay.phase(1))
    faults = 0
    for page in working:
        if page not in resident:
            faults += 1
            resident.update([page, *replay.fault(page)])
    assert faults < 0.05 * len(working)
    assert resident == set(working)


def test_a_replay_that_no_longer_fits_ends_and_is_recorded_anew(seed: int) -> None:
    draw = random.Random(seed)
    replay = Replayer()
    replay.phase(1)
    for page in range(4096):
        replay.fault(page)
    read = len(replay.phase(1))
    fresh = draw.sample(range(8192, 16384), 4000)
    for page in fresh:
        read += len(replay.fault(page))
    assert read <= 3 * 128 + 64 * 32  # the lead, and what was still thought to fit
    replay.phase(2)
    assert set(replay.phase(1)) < set(fresh)


def test_a_recording_outlives_its_policy() -> None:
    pages = [5, 900, 6, 7, 4000]
    first = Replayer()
    for page in pages:
        first.fault(page)
    kept = first.recorded(0)
    assert sorted(kept) == sorted(pages)
    restored = Replayer()
    restored.give(0, kept)
    assert restored.fault(5) == sorted(pages)
    assert restored.recorded(3) == []


def test_policies_have_states_of_their_own() -> None:
    one, other = Prefetcher("streams"), Prefetcher("streams")
    for page in range(3):
        one.fault(page)
    assert one.fault(7) != []
    assert other.fault(7) == []
    with pytest.raises(KeyError):
        Prefetcher("psychic")
