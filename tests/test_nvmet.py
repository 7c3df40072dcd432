"""Linux's NVMe/TCP target under hosts and regions of ours, and Linux's host on a target of ours.

Each test has a virtual machine of its own, in which its scenarios run one after the other: a
machine takes seconds to start. What takes longest is left to `make vm`. USERSWAP_SCENARIOS names
those that are wanted, separated by commas.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

import linux_host
import nvmet_host
import nvmet_region
from machine import Machine
from nvmet_vm import Nvmet, target_machine
from packages import MissingError

WANTED = [name for name in os.environ.get("USERSWAP_SCENARIOS", "").split(",") if name]
Scenario = Callable[..., None]


def made(make: Callable[[], Machine]) -> Machine:
    try:
        return make()
    except MissingError as error:
        pytest.skip(f"no virtual machine for NVMe/TCP: {error}")


def perform(machine: Machine, scenarios: Sequence[Scenario], *given: object) -> None:
    """All of them, though one fails."""
    failed = {}
    for scenario in scenarios:
        if WANTED and scenario.__name__ not in WANTED:
            continue
        began = time.monotonic()
        try:
            scenario(*given)
        except Exception:
            failed[scenario.__name__] = traceback.format_exc()
        print(f"{scenario.__name__}: {time.monotonic() - began:.1f} s")
    for name, why in failed.items():
        print(f"--- {name}\n{why}")
    if failed:
        print(machine.run("dmesg | tail -n 40")[1])
    assert list(failed) == []


def on_linux_target(folder: Path, *, everything: bool) -> None:
    with made(partial(target_machine, folder)) as machine:
        nvmet = Nvmet(machine)
        if not everything:
            perform(machine, nvmet_host.SCENARIOS, nvmet)
        regions = nvmet_region.SCENARIOS if everything else nvmet_region.CORE
        perform(machine, regions, nvmet, folder)


@pytest.mark.timeout(600)
def test_linux_target_under_our_host_and_regions(tmp_path: Path) -> None:
    on_linux_target(tmp_path, everything=False)


@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_linux_target_under_regions_in_every_form(tmp_path: Path) -> None:
    on_linux_target(tmp_path, everything=True)


@pytest.mark.timeout(600)
def test_our_target_under_linux_host(tmp_path: Path) -> None:
    with made(partial(linux_host.host_machine, tmp_path, "nvme")) as machine:
        perform(machine, linux_host.CORE, machine)


@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_our_target_under_linux_host_with_file_system_and_fio(tmp_path: Path) -> None:
    with made(partial(linux_host.host_machine, tmp_path, *linux_host.PROGRAMS)) as machine:
        perform(machine, linux_host.SCENARIOS, machine)
