"""Region(store=object): the user's own store, in the embedded pager."""

import subprocess
import sys
from pathlib import Path

import pytest

import own_scenarios
from proof import call, check


@pytest.mark.parametrize("made", [False, True])
def test_pages_go_to_an_object(made: bool) -> None:
    check(call(own_scenarios.page_to_an_object, made=made))


def test_what_is_no_store_is_refused() -> None:
    print(check(call(own_scenarios.offer_what_is_no_store)))


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
