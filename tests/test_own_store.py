"""Region(store=object): the user's own store, in the embedded pager."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import own_scenarios
from proof import Child, call, check, soon


@pytest.mark.parametrize("made", [False, True])
def test_pages_go_to_an_object(made: bool) -> None:
    check(call(own_scenarios.page_to_an_object, made=made))


def test_what_is_no_store_is_refused() -> None:
    print(check(call(own_scenarios.offer_what_is_no_store)))


@pytest.mark.parametrize(("kind", "what"), [("discard", "opening"), ("write", "closing")])
def test_who_waits_for_a_store_that_hangs_is_told_and_may_give_up(kind: str, what: str) -> None:
    with Child(call(own_scenarios.wait_for_a_hung_store, kind=kind)) as child:
        child.said("waits")
        line = f"waited more than 5 s (pager pid {pager_of(child)}): {what} region 'r' waits for"
        assert soon(lambda: line in child.err, 30), child.err
        os.kill(child.pid, signal.SIGINT)
        child.said("gave up")
        assert child.wait(30) == 0
        assert child.left_over(20) == []


def test_a_fault_that_waits_for_a_store_that_takes_nothing_is_spoken_of() -> None:
    with Child(call(own_scenarios.wait_for_room_that_a_hung_store_does_not_make)) as child:
        child.said("waits")
        assert soon(lambda: "waited more than 5 s" in child.err, 30)
        assert "nothing goes out to object, which does not end its writes" in child.err
        child.process.kill()
        assert child.left_over(20) == []
        assert child.err.count("waited") == 1


def pager_of(child: Child) -> int:
    assert soon(lambda: len(child.processes()) == 2, 20)
    return next(pid for pid in child.processes() if pid != child.pid)


def test_a_main_file_that_does_not_guard_its_work_is_told_so(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import userswap\n"
        "from userswap.backends.memory import MemoryStore\n\n\n"
        "def make(geometry):\n"
        "    return MemoryStore(1 << 20)\n\n\n"
        "userswap.Region('4MiB', resident='2MiB', store=make)\n"
    )
    child = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )
    (said,) = [line for line in child.stderr.splitlines() if "ConfigError" in line]
    assert said.endswith(
        "ConfigError: store object: the pager imports the program's main file for it, and that "
        'opens a region as it is imported: guard its work by `if __name__ == "__main__":`, or '
        "put the store into a module of its own"
    )
