"""Linux's NVMe/TCP target, in a virtual machine, under hosts of ours.

All scenarios share one machine, since it takes seconds to start, and one test, since tests are
spread over processes. USERSWAP_SCENARIOS names those that are wanted, separated by commas.
"""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import pytest

import nvmet_host
from nvmet_vm import Nvmet, target_machine
from packages import MissingError

WANTED = [name for name in os.environ.get("USERSWAP_SCENARIOS", "").split(",") if name]


@pytest.mark.timeout(600)
def test_hosts_of_ours_and_linux_as_the_target(tmp_path: Path) -> None:
    try:
        machine = target_machine(tmp_path)
    except MissingError as error:
        pytest.skip(f"no virtual machine with Linux's NVMe/TCP target here: {error}")
    failed = {}
    with machine:
        nvmet = Nvmet(machine)
        for scenario in nvmet_host.SCENARIOS:
            if WANTED and scenario.__name__ not in WANTED:
                continue
            began = time.monotonic()
            try:
                scenario(nvmet)
            except Exception:
                failed[scenario.__name__] = traceback.format_exc()
            print(f"{scenario.__name__}: {time.monotonic() - began:.1f} s")
        for name, why in failed.items():
            print(f"--- {name}\n{why}")
        if failed:
            print(machine.run("dmesg | tail -n 40")[1])
    assert list(failed) == []
