"""`userswap bench kernel`: arithmetic, the touching program, and a machine put back."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from userswap.bench import cases, changes, control_group, goals, kernel, order, sample
from userswap.bench.changes import Sysctl
from userswap.bench.histogram import Histogram
from userswap.bench.journal import BusyError, Journal
from userswap.bench.measure import Budget, Options, Run, touching_cpus
from userswap.bench.report import CaseResult, Result, as_json, as_text
from userswap.bench.toucher import OPERATIONS
from userswap.engine import cli, machine
from userswap.native import check, ffi, lib

PAGE = sample.PAGE
PAGES = 64
PATIENCE = 60.0


def options_of(*words: str) -> Options:
    argv = ["bench", "kernel", *words]
    return kernel.make_options(cli.make_parser(argv).parse_args(argv))


# --- options, cases, arithmetic ---


def test_options_have_defaults_and_a_quick_form() -> None:
    full = options_of()
    assert (full.size, full.resident, full.repetitions) == (512 << 20, 256 << 20, 5)
    quick = options_of("--quick", "--resident", "25%")
    assert (quick.size, quick.resident, quick.repetitions) == (128 << 20, 32 << 20, 2)
    assert options_of("--quick", "--size", "1GiB").size == 1 << 30


def test_wrong_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--cases", "nonsense"], ["--repetitions", "0"], ["--size", "512MB"]):
        assert cli.main(["bench", "kernel", *words]) == cli.USAGE_ERROR
    assert "random-read" in capsys.readouterr().err


def test_cases_are_chosen_by_name_and_group_in_the_order_of_the_table() -> None:
    assert kernel.chosen(["all"]) == list(cases.CASES)
    assert kernel.chosen(["bare"]) == list(cases.AGAINST_BARE)
    assert [case.name for case in kernel.chosen(["fill", "random-read"])] == ["random-read", "fill"]


def test_touching_threads_are_pinned_as_the_case_says() -> None:
    assert touching_cpus(cases.named("random-read"), (2, 5)) == [2]
    assert touching_cpus(cases.named("two-threads"), (2, 5)) == [2, 5]
    assert touching_cpus(cases.named("sixteen-threads"), (2, 5)) == [-1] * 16


def test_a_percentile_is_within_a_bucket_of_the_truth(seed: int) -> None:
    generator = random.Random(seed)
    latencies = sorted(int(generator.lognormvariate(8, 2)) for _ in range(10_000))
    buckets = [0] * 1216
    floors = [lib.us_touch_bucket_floor(bucket) for bucket in range(1216)]
    assert floors == sorted(set(floors))
    for latency in latencies:
        buckets[max(i for i, floor in enumerate(floors) if floor <= latency)] += 1
    histogram = Histogram.from_buckets(buckets, latencies[-1])
    for share in (0.5, 0.99, 0.999):
        truth = latencies[int(share * len(latencies)) - 1]
        assert truth * 31 / 32 - 1 <= histogram.percentile(share) <= truth
    again = Histogram.from_pairs(json.loads(json.dumps(histogram.to_pairs())), histogram.highest)
    assert again == histogram


def test_orders_are_repeatable_and_keep_threads_apart() -> None:
    for pattern in ("sequential", "random", "zipf"):
        visits = order.build(pattern, 1000, 4000, threads=4)
        assert visits == order.build(pattern, 1000, 4000, threads=4)
        for thread in range(4):
            own = visits[1000 * thread : 1000 * (thread + 1)]
            assert all(250 * thread <= page < 250 * (thread + 1) for page in own)
    assert sorted(order.build("once", 100, 100)) == list(range(100))
    assert len(set(order.build("scattered", 1 << 28, 1000))) == 1000


def test_zipf_has_few_hot_pages_far_apart() -> None:
    counts = Counter(order.build("zipf", 10_000, 100_000))
    hottest = [page for page, _ in counts.most_common(100)]
    assert 0.3 < sum(counts[page] for page in hottest) / 100_000 < 0.6
    assert max(hottest) - min(hottest) > 5_000


def test_the_kernels_limit_moves_until_the_totals_agree() -> None:
    share, size = 0.4, 1000 << 20
    budget = Budget(total=700 << 20, limit=600 << 20)
    for _ in range(2):
        peak = int(budget.limit + share * (size - budget.limit))
        run = Run("kernel", budget.limit, peak_bytes=peak)
        run.stored_bytes, run.compressed_bytes = 1000, 400
        budget.learn(run)
    assert abs(peak / budget.total - 1) < 0.001  # type: ignore[operator]
    assert budget.verdict(run) == ""


def test_a_run_off_its_budget_is_void() -> None:
    budget = Budget(total=1000 << 20, limit=0)
    assert "over" in budget.verdict(Run("userswap", 0, peak_bytes=1011 << 20))
    assert "under" in budget.verdict(Run("kernel", 0, peak_bytes=989 << 20))
    assert budget.verdict(Run("userswap", 0, peak_bytes=500 << 20)) == ""


def run_of(side: str, seconds: float, **fields: Any) -> Run:
    latencies = Histogram({int(seconds * 1000): 10}, 1)
    steps = {"run": {"accesses": 10}}
    values: dict[str, Any] = {
        "accesses": 10,
        "cpu_seconds": seconds,
        "latencies": latencies,
        "steps": steps,
    }
    return Run(side, 0, valid=True, seconds=seconds, **(values | fields))


def result_of(*runs: Run) -> Result:
    each = CaseResult(cases.named("random-read"), [0], runs=list(runs))
    return Result(machine.gather(), "6.18", "unknown", 20.0, "zram0", options_of(), [each])


def test_goals_compare_medians() -> None:
    ours = [run_of("userswap", seconds) for seconds in (1.0, 2.0, 9.0)]
    theirs = [run_of("kernel", seconds) for seconds in (3.0, 4.0, 5.0)]
    void = run_of("kernel", 100.0, reason="over")
    void.valid = False
    found = {goal.name: goal for goal in result_of(*ours, *theirs, void).goals}
    assert found["random-read: time"].value == 0.5
    assert found["random-read: time"].reached
    assert found["random-read: p99"].value == 0.5
    assert goals.summarize([void], "kernel") is None


def test_the_result_is_a_table_and_a_document() -> None:
    result = result_of(run_of("userswap", 1.0), run_of("kernel", 2.0))
    text = as_text(result)
    assert "random read" in text
    assert "verified: 20 accesses, 0 bad pages" in text
    document = json.loads(json.dumps(as_json(result)))
    assert document["schema"] == "userswap.bench.kernel/1"
    assert document["good"]
    assert document["cases"][0]["runs"][1]["seconds"] == 2.0


def test_a_bad_page_makes_the_result_bad() -> None:
    result = result_of(run_of("userswap", 1.0, bad=3))
    assert not as_json(result)["good"]
    assert "3 pages did not hold what was written" in as_text(result)


# --- the touching program ---


class Memory:
    """Ordinary memory for the touching program."""

    def __init__(self, pages: int = PAGES) -> None:
        self.bytes = bytearray(pages * PAGE)
        self.versions = array("I", bytes(4 * pages))
        self.sample = sample.load("records")

    def touch(self, operation: str, visits: array[int], threads: int = 1) -> Any:
        plan, result = ffi.new("struct us_touch_plan *"), ffi.new("struct us_touch_result *")
        plan.memory = memory = ffi.from_buffer("uint8_t[]", self.bytes)
        plan.sample = content = ffi.from_buffer("uint8_t[]", self.sample)
        plan.order = numbers = ffi.from_buffer("uint32_t[]", visits)
        plan.versions = versions = ffi.from_buffer("uint32_t[]", self.versions)
        plan.sample_pages = len(self.sample) // PAGE
        plan.count, plan.threads = len(visits), threads
        plan.operation = OPERATIONS[operation]
        plan.cpus[0:threads] = [-1] * threads
        check(lib.us_touch_run(plan, result))
        for view in (memory, content, numbers, versions):
            ffi.release(view)
        return result


@pytest.mark.parametrize("threads", [1, 4])
def test_what_was_written_is_verified(threads: int) -> None:
    memory = Memory()
    every = order.build("sequential", PAGES, PAGES, threads)
    assert memory.touch("zero", every, threads).bad == 0
    assert memory.touch("fill", every, threads).bad == 0
    for operation in ("read", "update", "write", "update", "read", "check"):
        visits = order.build("random", PAGES, 1000, threads, seed=7)
        visits = every if operation == "check" else visits
        result = memory.touch(operation, visits, threads)
        assert result.bad == 0
        assert result.accesses == len(visits) == sum(result.histogram)
    assert sum(memory.versions) == 3000


def test_a_lost_page_a_stale_page_and_a_changed_byte_are_seen() -> None:
    memory = Memory()
    every = order.build("sequential", PAGES, PAGES)
    memory.touch("fill", every)
    old = memory.bytes[5 * PAGE : 6 * PAGE]
    memory.touch("update", every)
    memory.bytes[0:PAGE] = bytes(PAGE)
    memory.bytes[5 * PAGE : 6 * PAGE] = old
    memory.bytes[9 * PAGE + 2048] ^= 1
    assert memory.touch("read", array("I", [0, 5])).bad == 2
    result = memory.touch("check", every)
    assert (result.bad, result.first_bad_page) == (3, 0)
    assert memory.touch("zero", array("I", [0, 1])).bad == 1


def test_the_touching_program_refuses_what_it_cannot_do() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        Memory().touch("read", array("I", [0]), threads=0)


@pytest.mark.parametrize("data", sample.DATA)
def test_samples_are_whole_pages_and_compress_as_memory_does(data: sample.Data) -> None:
    content = sample.load(data)
    assert len(content) % PAGE == 0
    check(lib.us_codec_open(lib.US_CODEC_LZ4, ffi.NULL))
    room = ffi.new("uint8_t[]", PAGE)
    total = 0
    pages = range(0, min(len(content), 256 * PAGE), PAGE)
    for start in pages:
        page = ffi.from_buffer(content[start : start + PAGE])
        total += check(lib.us_compress(lib.US_CODEC_LZ4, 1, page, room, PAGE)) or PAGE
    assert 1.5 < len(pages) * PAGE / total < 4


# --- the machine is put back ---


def state_of_machine() -> dict[str, Any]:
    """Everything that the benchmark may change."""
    zrams = {name: changes.zram_in_use(name) for name in changes.zram_names()}
    hierarchy = control_group.find()
    groups = sorted(path.name for path in hierarchy.root.glob("userswap*")) if hierarchy else []
    cluster = Path("/proc/sys/vm/page-cluster").read_text()
    return {"swaps": changes.swaps(), "zrams": zrams, "groups": groups, "page_cluster": cluster}


@pytest.fixture
def machine_unchanged() -> Iterator[None]:
    before = state_of_machine()
    yield
    assert state_of_machine() == before


def test_the_journal_outlives_its_writer(tmp_path: Path) -> None:
    setting = tmp_path / "setting"
    setting.write_text("3\n")
    journal = Journal(tmp_path)
    journal.make(Sysctl(str(setting), "3", "0"))
    journal.make(Sysctl(str(setting), "0", "8"))
    assert setting.read_text() == "8"
    with pytest.raises(BusyError) as refusal:
        Journal(tmp_path)
    assert refusal.value.pid == os.getpid()
    journal.close()
    successor = Journal(tmp_path)
    assert len(successor.pending) == 2
    assert len(successor.restore()) == 2
    assert setting.read_text() == "3"
    successor.close()
    assert Journal(tmp_path).pending == ()


def test_a_change_that_failed_is_undone_with_the_rest(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(FileNotFoundError):
        journal.make(changes.ControlGroup(str(tmp_path / "missing" / "group")))
    assert journal.restore() == []
    journal.close()


def test_a_reboot_has_undone_everything(tmp_path: Path) -> None:
    content = {"boot": "another", "changes": [{"kind": "swap-on", "device": "/dev/zram0"}]}
    (tmp_path / "bench.journal").write_text(json.dumps(content))
    journal = Journal(tmp_path)
    assert journal.pending == ()
    journal.close()


def test_both_versions_of_control_groups_are_read(tmp_path: Path) -> None:
    files = {
        1: {
            "memory.usage_in_bytes": "4096",
            "memory.stat": "cache 1\nswap 8192\n",
            "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        },
        2: {
            "memory.current": "4096",
            "memory.swap.current": "8192",
            "memory.events": "low 0\noom 4\noom_kill 3\n",
        },
    }
    for version, contents in files.items():
        hierarchy = control_group.Hierarchy(version, tmp_path)
        folder = tmp_path / f"version-{version}"
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_text(content)
        group = control_group.Group(hierarchy, folder.name)
        assert (group.usage(), group.swapped(), group.kills()) == (4096, 8192, 3)
        group.limit(1 << 20)
        group.limit(None)
    assert (tmp_path / "version-1" / "memory.limit_in_bytes").read_text() == "-1"
    assert (tmp_path / "version-2" / "memory.max").read_text() == "max"


def test_version_2_hands_the_controller_down_where_needed(tmp_path: Path) -> None:
    hierarchy = control_group.Hierarchy(2, tmp_path)
    control = tmp_path / "cgroup.subtree_control"
    control.write_text("cpu memory\n")
    assert [change.kind for change in hierarchy.changes("group")] == ["control-group"]
    control.write_text("cpu\n")
    kinds = [change.kind for change in hierarchy.changes("group")]
    assert kinds == ["group-controller", "control-group"]


def test_it_refuses_with_cause_and_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(control_group, "find", lambda: None)
    monkeypatch.setattr(changes, "find_command", str)
    monkeypatch.setattr(changes, "zram_names", lambda: ["zram0"])
    assert cli.main(["bench", "kernel"]) == cli.UNSUPPORTED
    assert "no memory control group" in capsys.readouterr().err
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert cli.main(["bench", "kernel"]) == cli.UNSUPPORTED
    assert "run it with sudo" in capsys.readouterr().err


KILLED = """
import sys
from pathlib import Path
from userswap.bench import baseline
from userswap.bench.journal import Journal
with baseline.Rig(Journal(Path(sys.argv[1])), baseline.require(), 32 << 20) as rig:
    rig.read_ahead(1)
    rig.group.admit(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(rig.device, flush=True)
    sys.stdin.read()
"""


@pytest.mark.privileged
@pytest.mark.usefixtures("machine_unchanged")
def test_the_next_start_puts_back_what_kill_9_left(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "600"])
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(sleeper.pid)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    device = child.stdout.readline().strip()
    child.kill()
    child.communicate()
    assert any(line.startswith(f"/dev/{device} ") for line in changes.swaps())
    assert Path("/proc/sys/vm/page-cluster").read_text() == "1\n"
    journal = Journal(tmp_path)
    restored = journal.restore()
    journal.close()
    assert sleeper.wait(PATIENCE) == -signal.SIGKILL
    assert [line for line in restored if device in line]


@pytest.mark.privileged
@pytest.mark.usefixtures("machine_unchanged")
def test_a_killed_command_is_cleared_up_by_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sides", "kernel", "--size", "32MiB", "--cases", "zipf-update"]
    with bench_process(*words, "--repetitions", "50") as child:
        child.kill()
        child.wait()
    assert cli.main(["bench", "kernel", *words, "--repetitions", "1"]) == 0
    assert "left by an interrupted run: swap on /dev/zram" in capsys.readouterr().err


class bench_process:  # noqa: N801
    """A benchmark that is in the middle of its work; killed at the end of the context."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "userswap", "bench", "kernel", *words]
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> subprocess.Popen[str]:
        assert self._child.stderr is not None
        assert any("us per access" in line for line in self._child.stderr)
        return self._child

    def __exit__(self, *exception: object) -> None:
        self._child.kill()
        self._child.communicate()


@pytest.mark.privileged
@pytest.mark.usefixtures("machine_unchanged")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(number: signal.Signals) -> None:
    words = ["--sides", "kernel", "--size", "32MiB", "--cases", "random-read"]
    with bench_process(*words, "--repetitions", "1000") as child:
        assert cli.main(["bench", "kernel", *words]) == cli.UNSUPPORTED  # one at a time
        child.send_signal(number)
        assert child.wait(PATIENCE) == 128 + number


@pytest.mark.privileged
@pytest.mark.usefixtures("machine_unchanged")
def test_a_tiny_run_of_the_kernels_side(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sides", "kernel", "--size", "32MiB", "--repetitions", "2", "--json"]
    began = time.monotonic()
    assert cli.main(["bench", "kernel", *words, "--cases", "sequential-write", "two-threads"]) == 0
    assert time.monotonic() - began < PATIENCE
    document = json.loads(capsys.readouterr().out)
    assert document["good"]
    for case in document["cases"]:
        runs = [run for run in case["runs"] if run["valid"]]
        assert len(runs) == 2
        for run in runs:
            assert run["bad"] == 0
            assert run["swapped_out_pages"] > 0
            assert run["peak_bytes"] > run["limit_bytes"]
            assert sum(count for _, count in run["steps"]["run"]["latencies_ns"]) == 3 * 8192


@pytest.mark.privileged
@pytest.mark.usefixtures("machine_unchanged")
def test_a_tiny_run_of_the_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sides", "bare", "--size", "32MiB", "--repetitions", "1", "--json"]
    assert cli.main(["bench", "kernel", *words, "--cases", "fault", "terabyte"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [case["runs"][0]["bad"] for case in document["cases"]] == [0, 0]


@pytest.mark.privileged
@pytest.mark.usefixtures("machine_unchanged")
def test_a_tiny_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "32MiB", "--repetitions", "1", "--json", "--cases"]
    assert cli.main(["bench", "kernel", *words, "random-update", "fault"]) == 0
    document = json.loads(capsys.readouterr().out)
    for case in document["cases"]:
        assert {run["side"] for run in case["runs"] if run["valid"]} == set(case["summary"])
        assert len(case["summary"]) == 2
        ours = [run for run in case["runs"] if run["side"] == "userswap"]
        assert [(run["bad"], run["swapped_bytes"]) for run in ours if run["valid"]] == [(0, 0)]
    assert "random-update: time" in {goal["name"] for goal in document["goals"]}
