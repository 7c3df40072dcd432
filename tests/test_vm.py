"""Debian's own kernels in virtual machines (tests/vm.sh): hours where the machine is emulated.

Not among the tests that run by default: `make vm ARGS=tests/test_vm.py` asks for them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.privileged, pytest.mark.timeout(4 * 3600)]


@pytest.mark.parametrize(("series", "mover"), [("6.1", "protect"), ("6.12", "move")])
def test_the_loss_tests_and_the_demonstration(series: str, mover: str) -> None:
    script = Path(__file__).parent / "vm.sh"
    ran = subprocess.run([script, series], capture_output=True, text=True, check=False)
    print(ran.stdout, ran.stderr)
    assert ran.returncode == 0
    assert re.search(
        rf"^== Linux {re.escape(series)}\.\S+, mover {mover}, .*\bmemory\b", ran.stdout, re.M
    )
    assert re.search(r"^\d+ passed", ran.stdout, re.M)
    assert re.search(r"^verified: \d+ pages, 0 lost", ran.stdout, re.M)
    assert ("O_DIRECT" in ran.stdout) == (mover == "protect")
