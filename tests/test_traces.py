"""Traces as files: what goes in comes out, whatever a kill, damage or rotation left of them."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userswap.engine.traces import (
    BLOCK_RECORDS,
    HEADER,
    Head,
    Kind,
    Outcome,
    Records,
    TraceError,
    Writer,
    numbered,
    read,
    read_oracle,
    write_oracle,
)

HEAD = Head(1 << 20, resident=77, all_touches=True)
RECORD = st.tuples(
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from(Kind),
    st.sampled_from(Outcome),
)


def records_of(rows: list[tuple[int, int, int, Kind, Outcome]]) -> Records:
    records = Records()
    for page, thread, time_ns, kind, outcome in rows:
        records.append(page, thread=thread, time_ns=time_ns, kind=kind, outcome=outcome)
    return records


def some(count: int, draw: random.Random) -> Records:
    records, now = Records(), 1 << 60
    for _ in range(count):
        now += int(draw.expovariate(1e-4))
        page, kind = draw.randrange(1 << 20), draw.choice((Kind.READ, Kind.WRITE))
        outcome = Outcome(draw.randrange(len(Outcome)))
        records.append(page, thread=draw.randrange(4), time_ns=now, kind=kind, outcome=outcome)
    return records


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORD, max_size=50))
def test_what_goes_in_comes_out(
    tmp_path: Path, rows: list[tuple[int, int, int, Kind, Outcome]]
) -> None:
    path = tmp_path / "trace"
    path.unlink(missing_ok=True)
    rows.sort(key=lambda row: row[2])  # times do not go back
    with Writer(path, HEAD) as writer:
        writer.write(records_of(rows))
        writer.write(records_of(rows))
    trace = read(path)
    assert list(trace.records) == rows + rows
    assert (trace.head, trace.lost_bytes) == (HEAD, 0)


def test_a_record_takes_few_bytes(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with Writer(tmp_path / "random", HEAD) as writer:
        writer.write(some(50_000, draw))
    assert (tmp_path / "random").stat().st_size < 8 * 50_000
    scan = Records()
    for page in range(50_000):
        scan.append(page, time_ns=page * 100)
    with Writer(tmp_path / "scan", HEAD) as writer:
        writer.write(scan)
    assert (tmp_path / "scan").stat().st_size < 2.1 * 50_000


def test_every_torn_end_costs_at_most_a_block(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "trace"
    with Writer(path, HEAD) as writer:
        for _ in range(4):
            writer.write(some(50, draw))
    whole, records = path.read_bytes(), list(read(path).records)
    for length in range(HEADER.size, len(whole), 7):
        path.write_bytes(whole[:length])
        trace = read(path)
        found = list(trace.records)
        assert found == records[: len(found)]
        assert len(found) % 50 == 0
        assert trace.lost_bytes < len(whole) / 3


def test_damage_is_never_taken_for_records(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "trace"
    with Writer(path, HEAD) as writer:
        writer.write(some(200, draw))
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(HEADER.size, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert len(read(path).records) == 0
    for at in range(HEADER.size):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(TraceError):
            read(path)


WRITE_FOR_EVER = """
import sys
from userswap.engine.traces import Head, Records, Writer
number = 0
with Writer(sys.argv[1], Head(1 << 32)) as writer:
    while True:
        records = Records()
        for _ in range(3000):
            records.append(number, time_ns=number)
            number += 1
        writer.write(records)
        print(number, flush=True)
"""


def test_a_killed_writer_leaves_what_it_has_written(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(5)][-1]
        os.kill(writer.pid, signal.SIGKILL)
    records = read(path).records
    assert len(records) >= said
    assert records.page == array("I", range(len(records)))


def test_rotation_keeps_the_newest(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path, parts = tmp_path / "trace", [some(1000, draw) for _ in range(12)]
    with Writer(path, HEAD, rotate_bytes=16_000, keep=2) as writer:
        for part in parts:
            writer.write(part)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["trace", "trace.1", "trace.2"]
    assert all(each.stat().st_size <= 16_000 for each in tmp_path.iterdir())
    trace = read(path)
    written = [row for part in parts for row in part]
    assert trace.files == 3
    assert list(trace.records) == written[-len(trace.records) :]
    assert len(read(numbered(path, 1)).records) < len(trace.records)


def test_a_trace_is_never_overwritten(tmp_path: Path) -> None:
    with Writer(tmp_path / "trace", HEAD), pytest.raises(TraceError, match="exists"):
        Writer(tmp_path / "trace", HEAD)
    with pytest.raises(TraceError, match="No such file"):
        Writer(tmp_path / "nowhere" / "trace", HEAD)
    with pytest.raises(TraceError, match="No such file"):
        read(tmp_path / "none")
    (tmp_path / "else").write_text("something else altogether")
    with pytest.raises(TraceError, match="no trace of ours"):
        read(tmp_path / "else")


def test_what_is_no_touch_is_told_apart(tmp_path: Path) -> None:
    records = Records()
    records.append(5, kind=Kind.PHASE)
    records.append(10)
    records.append(900, kind=Kind.RESIDENT)
    records.append(11, kind=Kind.WRITE)
    records.append(6, kind=Kind.PHASE)
    with Writer(tmp_path / "trace", HEAD) as writer:
        writer.write(records)
    trace = read(tmp_path / "trace")
    assert trace.touches() == (array("I", [10, 11]), [(0, 5), (2, 6)])
    assert trace.resident == 900


def test_oracle_general_there_and_back(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    pages = array("I", (draw.randrange(50) for _ in range(2 * BLOCK_RECORDS)))
    write_oracle(tmp_path / "oracle", pages, range(len(pages)))
    rows = list(struct.iter_unpack("<IQIq", (tmp_path / "oracle").read_bytes()))
    for at, (_, page, size, after) in enumerate(rows):
        assert (page, size) == (pages[at], 4096)
        rest = pages[at + 1 :]
        assert after == (at + 2 + rest.index(page) if page in rest else -1)
    trace = read_oracle(tmp_path / "oracle")
    assert trace.records.page == pages
    assert trace.head == Head(max(pages) + 1, all_touches=True, stored=True)


def test_large_numbers_are_squeezed_and_neighbours_stay_so(tmp_path: Path) -> None:
    numbers = [1 << 50, (1 << 50) + 1, (1 << 50) + 3, 1 << 60, 7]
    packed = b"".join(struct.pack("<IQIq", 0, number, 1, -1) for number in numbers)
    (tmp_path / "oracle").write_bytes(packed)
    pages = read_oracle(tmp_path / "oracle").records.page
    assert [page - pages[0] for page in pages[:3]] == [0, 1, 3]
    assert pages[3] - pages[2] > 64
    assert pages[0] - pages[4] > 64
    (tmp_path / "oracle").write_bytes(packed[:-1])
    with pytest.raises(TraceError, match="not oracleGeneral"):
        read_oracle(tmp_path / "oracle")
