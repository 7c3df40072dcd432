"""The demonstration: its corpus and its progress anywhere, the whole of it on a small region."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from support import run_child
from userswap.bench import corpus, sorting
from userswap.bench.demo import Outcome, Plan, as_text
from userswap.bench.progress import Progress
from userswap.engine.stats import Latency, RegionStats

PAGE = 4096


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in range(10):
        (tmp_path / f"{number}.bin").write_bytes(os.urandom(1000 * number))
    (tmp_path / "again").hardlink_to(tmp_path / "9.bin")
    (tmp_path / "link").symlink_to("8.bin")
    return tmp_path


# An ordinary user has to ask for what root gets anyway.
USER_MODE_HERE = """
import functools
import userswap
from userswap.engine import probe
limited = probe.service_level(probe.gather()).level == "user_mode_only"
userswap.Region = functools.partial(userswap.Region, user_mode_only=limited)
"""


def nothing(count: int) -> None:
    pass


def test_files_are_chosen_once_and_only_if_they_fit(files: Path) -> None:
    chosen = corpus.choose([files, files], 1 << 20, nothing)
    assert sum(candidate.length for candidate in chosen) == 45000
    assert len(chosen) == 9  # neither the empty file, nor the links
    assert corpus.choose([files], 8500, nothing)[0].length == 1000
    assert corpus.choose([files / "nowhere"], 1 << 20, nothing) == []


def test_pieces_are_intact_until_a_bit_changes(files: Path) -> None:
    chosen = corpus.choose([files], 1 << 20, nothing)
    memory = memoryview(bytearray(45000))
    pieces = corpus.load(memory, chosen, nothing)
    assert all(corpus.intact(memory, piece, nothing) for piece in pieces)
    memory[pieces[3].offset] ^= 1
    bad = [piece for piece in pieces if not corpus.intact(memory, piece, nothing)]
    assert bad == [pieces[3]]


def test_a_file_that_shrank_or_went_is_no_loss(files: Path) -> None:
    chosen = corpus.choose([files], 1 << 20, nothing)
    os.truncate(files / "5.bin", 10)
    (files / "6.bin").unlink()
    memory = memoryview(bytearray(45000))
    pieces = corpus.load(memory, chosen, nothing)
    assert {piece.path.name: piece.length for piece in pieces}["5.bin"] == 10
    assert "6.bin" not in {piece.path.name for piece in pieces}
    assert all(corpus.intact(memory, piece, nothing) for piece in pieces)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "lines"), [(io.StringIO(), 3), (Terminal(), 0)])
def test_progress_is_a_line_at_times_or_one_that_renews_itself(
    stream: io.StringIO, lines: int
) -> None:
    now = 0.0
    progress = Progress(lambda: "7 faults", stream, lambda: now)
    progress.begin("fill", 10 << 20)
    for _ in range(10):
        now += 1
        progress.advance(1 << 20)
    assert progress.end() == 10
    assert stream.getvalue().count("\n") == lines
    assert "fill    50 %  5 of 10 MiB  1 MiB/s  7 faults" in stream.getvalue()


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 5000])
def test_sorting_in_steps_sorts_and_a_changed_number_shows(count: int) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(count, numpy.uint64)
    written = sorting.write(numpy, array, 1, nothing)
    sorting.sort(array, nothing)
    assert sorting.in_order(numpy, array, nothing) == written
    array[-1] += numpy.uint64(1)
    assert sorting.in_order(numpy, array, nothing) != written
    if count > 1:
        array[0] = array[-1] + numpy.uint64(1)
        assert sorting.in_order(numpy, array, nothing) is None


def demo(*arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    code = "import sys; from userswap.engine.cli import main; sys.exit(main(sys.argv[1:]))"
    return run_child(code, args=["demo", *arguments], timeout=timeout)


def test_a_small_demonstration_verifies_every_page() -> None:
    child = demo("--size", "16MiB", "--store", "ram:lz4", "--seed", "3")
    assert child.returncode == 0, child.stderr
    *rows, verdict = child.stdout.splitlines()
    pages = re.fullmatch(r"verified: (\d+) pages, 0 lost", verdict)
    assert pages
    assert int(pages[1]) > 16 * 256 * 0.9
    for name in ("data", "fill", "check", "compression", "memory saved", "pager CPU"):
        assert any(row.startswith(name) for row in rows), name


def test_json_has_a_versioned_schema() -> None:
    child = demo("--size", "8MiB", "--json")
    assert child.returncode == 0, child.stderr
    document = json.loads(child.stdout)
    assert document["schema"] == "userswap.demo/1"
    assert document["lost"] == 0
    assert document["verdict"] == f"verified: {document['pages']} pages, 0 lost"
    assert [phase["name"] for phase in document["phases"]][:2] == ["fill", "check"]
    assert document["saved_bytes"] == document["size"] - sum(document["held_bytes"].values())
    assert document["machine"]["cpus_usable"]


def test_a_wrong_byte_is_found_and_is_exit_code_1() -> None:
    code = """
import sys
from userswap.bench import corpus, demo
from userswap.engine.cli import main

check = corpus.intact

def damage_then_check(memory, piece, advance):
    if piece.offset == 0:
        memory[0] ^= 1
    return check(memory, piece, advance)

corpus.intact = damage_then_check
sys.exit(main(["demo", "--size", "8MiB"]))
"""
    child = run_child(code, timeout=100)
    assert child.returncode == 1, child.stderr
    assert re.search(r"verified: \d+ pages, [1-9]\d* lost", child.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1GB"], "GiB"),
        (["--size", "8MiB", "--store", "rom:"], "unknown store 'rom'"),
        (["--size", "8MiB", "--resident", "0"], "resident"),
        (["--size", "8MiB", "--resident", "1%"], "below the minimum"),
        (["--size", "8MiB", "--store", "ram:lz4?limit=1KiB"], "limit"),
        (["--size", "8MiB", "--store", "zstd"], "did you mean 'ram:zstd'?"),
        (["--size", "0"], "more than 0"),
    ],
)
def test_what_cannot_be_is_exit_code_2_before_any_work(arguments: list[str], message: str) -> None:
    child = demo(*arguments)
    assert child.returncode == 2, child.stderr
    assert child.stderr.startswith("userswap: ")
    assert child.stderr.count("\n") == 1
    assert message in child.stderr


@pytest.mark.parametrize("seed", ["-1", "x", "9" * 5000])
def test_a_seed_that_cannot_be_is_told_in_the_users_words(seed: str) -> None:
    child = demo("--seed", seed)
    assert child.returncode == 2
    assert "--seed: " in child.stderr
    assert "is not an integer from 0 to" in child.stderr


def held_stats(resident: int) -> RegionStats:
    latency = Latency(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    zero = dict.fromkeys((field.name for field in fields(RegionStats)), 0)
    changed = {"native_latency": latency, "awaited_latency": latency, "resident_bytes": resident}
    return RegionStats(**{**zero, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("held", "saved"),
    [(3 << 20, "5MiB of 8MiB (62 %)"), (8 << 20, "none: the"), (9 << 20, "none: the")],
)
def test_only_what_was_saved_is_called_saved(held: int, saved: str) -> None:
    plan = Plan((), 8 << 20, 2 << 20, "ram:", 1, user_mode_only=False, mover="move", notes=())
    text = as_text(plan, Outcome(files_stats=held_stats(held)))
    row = next(line for line in text.splitlines() if line.startswith("memory saved"))
    assert row.removeprefix("memory saved").strip().startswith(saved)
    assert "-" not in row


def pagers_of(pid: int) -> list[int]:
    """The pagers that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid and b"userswap.engine.pager" in command:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_leaves_no_pager(number: signal.Signals, code: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "userswap", "demo", "--size", "192MiB"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (pagers := pagers_of(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert pagers
        time.sleep(0.5)  # into the filling
        os.killpg(child.pid, number)
        assert child.wait(10) == code
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pagers):
            assert time.monotonic() < deadline, "the pager outlived its client"
            time.sleep(0.02)
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def test_the_program_in_the_readme_runs() -> None:
    readme = Path(__file__).parent.parent / "README.md"
    program = readme.read_text().split("```python\n")[1].split("```")[0]
    for written, small in {"1GiB": "32MiB", "256MiB": "8MiB", "128MiB": "4MiB"}.items():
        assert written in program
        program = program.replace(written, small)
    child = run_child(program.replace("import userswap", USER_MODE_HERE))
    assert child.returncode == 0, child.stderr
    count = (32 << 20) // 8
    assert float(child.stdout.split()[0]) == 1.5 * (count + -(-count // 1000))
