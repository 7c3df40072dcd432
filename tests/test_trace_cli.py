"""`userswap trace`: what it says of a trace, and of what it refuses to speak."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from userswap.engine.cli import main
from userswap.engine.traces import Head, Kind, Outcome, Records, Writer

PAGE = 4096


def write(path: Path, pages: list[int], head: Head, *, gap_ns: int = 100_000) -> str:
    records = Records()
    for at, page in enumerate(pages):
        records.append(page, time_ns=at * gap_ns, kind=Kind.READ, outcome=Outcome.LOAD)
    with Writer(path, head) as writer:
        writer.write(records)
    return str(path)


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    return write(tmp_path / "sweep", list(range(2000)) * 10, Head(2000, all_touches=True))


def said(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["trace", *command, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *command: str, code: int = 2) -> str:
    assert main(["trace", *command]) == code
    return capsys.readouterr().err


def test_simulate_tells_policies_apart(capsys: pytest.CaptureFixture[str], sweep: str) -> None:
    found = said(capsys, "simulate", sweep, "--resident", "25%,50%", "--store-latency", "1ms")
    assert (found["touches"], found["pages"], found["refused"]) == (20_000, 2000, {})
    results = {
        (each["eviction"], each["prefetch"], each["resident_bytes"] // PAGE): each
        for each in found["results"]
    }
    assert len(results) == 6 * 2 * 2
    assert results["fifo", "none", 1000]["miss_ratio"] == 1
    assert results["bip", "none", 1000]["miss_ratio"] < 0.6
    assert results["fifo", "streams", 1000]["miss_ratio"] < 0.1
    assert results["fifo", "none", 500]["stall_ns"] == 20_000 * (1_000_000 + 5000)
    best = {each["resident_bytes"] // PAGE: each["misses"] for each in found["optimum"]}
    assert best[1000] < best[500] < 20_000
    assert found["run_seconds"] == pytest.approx(2.0 - 0.1, rel=0.01)


def test_simulate_shows_tables_and_gives_advice(
    capsys: pytest.CaptureFixture[str], sweep: str
) -> None:
    assert main(["trace", "simulate", sweep, "--prefetch", "none,streams"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{sweep}: 20,000 touches of 2,000 pages (7.81MiB), in 1.9 s")
    tables = [line for line in lines if line.startswith("resident")]
    assert len(tables) == 5
    assert all(line.split()[1:] == [f"{share}%" for share in range(10, 100, 10)] for line in tables)
    assert "resident costs" in lines[-1]
    assert "prefetch streams" in lines[-1]
    assert max(map(len, lines[1:])) < 120


def test_advice_is_the_smallest_budget_that_costs_little(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, seed: int
) -> None:
    # A hot tenth that is touched all the time; each of the rest once in a while.
    draw = random.Random(seed)
    hot, cold = range(500), range(500, 5000)
    pages = [draw.choice(hot if draw.random() < 0.999 else cold) for _ in range(100_000)]
    path = write(tmp_path / "hot", pages, Head(5000, all_touches=True))
    found = said(capsys, "simulate", path, "--eviction", "s3g,fifo", "--run-time", "10s")
    size = 500 * PAGE / (1 << 20)
    assert float(found["advice"].split("MiB")[0]) == pytest.approx(size, rel=0.4)
    assert "%" in found["advice"]


def test_budgets_that_the_trace_hides_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "spared", list(range(2000)) * 4, Head(2000, resident=900))
    found = said(capsys, "simulate", path, "--resident", "10%..90%")
    assert sorted(found["refused"]) == ["10%", "20%", "30%", "40%"]
    assert "3.52MiB resident" in found["refused"]["10%"]
    assert "tells of no budget" in refused(capsys, "simulate", path, "--resident", "1MiB")
    assert "fit" in refused(capsys, "simulate", path, "--resident", "1GiB")
    full = write(tmp_path / "full", list(range(2000)), Head(2000, all_touches=True))
    assert "minimum" in refused(capsys, "simulate", full, "--resident", "40KiB")


@pytest.mark.parametrize(
    ("options", "about"),
    [
        (["--eviction", "lru"], "lru"),
        (["--prefetch", "stream"], "streams"),
        (["--resident", "90%..10%"], "smallest"),
        (["--resident", "x%..10%"], "percent"),
        (["--store-latency", "80"], "unit"),
        (["--tail", "90%"], "at most half"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], sweep: str, options: list[str], about: str
) -> None:
    assert about in refused(capsys, "simulate", sweep, *options)


def test_show(capsys: pytest.CaptureFixture[str], sweep: str) -> None:
    found = said(capsys, "show", sweep, "--records", "2")
    assert (found["touches"], found["pages"], found["all_touches"]) == (20_000, 2000, True)
    assert found["kinds"] == {"read": 20_000}
    assert found["outcomes"] == {"load": 20_000}
    assert [each["page"] for each in found["records"]] == [0, 1]
    with open(sweep, "ab") as file:
        file.write(b"torn")
    assert main(["trace", "show", sweep]) == 0
    assert "4 bytes after the last whole block" in capsys.readouterr().out


def test_import_and_export(capsys: pytest.CaptureFixture[str], sweep: str, tmp_path: Path) -> None:
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    assert said(capsys, "export", sweep, there)["touches"] == 20_000
    assert said(capsys, "import", there, back)["touches"] == 20_000
    ours, theirs = (
        said(capsys, "simulate", path, "--resident", "50%")["results"] for path in (sweep, back)
    )
    assert [each["misses"] for each in ours] == [each["misses"] for each in theirs]
    assert "no trace of ours" in refused(capsys, "show", there, code=1)
    assert "exists" in refused(capsys, "import", there, back, code=1)
