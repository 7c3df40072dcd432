"""The kernel's side: swap on zram (lz4) under a memory control group, set up here and put back at
the end.

`require` refuses before anything is changed; `Rig` makes every change through the journal. The
group serves both sides: the kernel's runs with a limit, userswap's without one, only to be
weighed.

Must not know: cases, budgets, what is measured.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from userswap.bench import changes, control_group
from userswap.bench.changes import SwapOn, Sysctl, ZramAdded, ZramConfigured
from userswap.bench.control_group import Group, Hierarchy
from userswap.bench.journal import Journal

ALGORITHM = "lz4"
ROOM = 5 / 4
"""Swap space over the memory under test: swap that runs full would measure something else."""
HOT_ADD = Path("/sys/class/zram-control/hot_add")
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RefusalError(Exception):
    """This machine, or this user, cannot run the comparison."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")
        self.cause = cause
        self.remedy = remedy


def require() -> Hierarchy:
    """The memory controller to use; RefusalError where something is missing."""
    if os.geteuid() != 0:
        raise RefusalError("swap and control groups need root", "run it with sudo")
    for command in ("mkswap", "swapon", "swapoff"):
        if changes.find_command(command) is None:
            raise RefusalError(f"the command {command} is missing", "apt install util-linux mount")
    if not changes.zram_names() and not HOT_ADD.exists():
        raise RefusalError("this kernel has no zram device", "try: modprobe zram")
    hierarchy = control_group.find()
    if hierarchy is None:
        raise RefusalError(
            "no memory control group (version 1 or 2) is mounted here",
            "boot without cgroup_disable=memory; in a container: use the host or a VM",
        )
    if not control_group.writable(hierarchy):
        raise RefusalError(
            f"{hierarchy.root} cannot be written", "in a container: docker run --privileged"
        )
    return hierarchy


class Rig:
    """Group and zram swap, while the context lasts."""

    def __init__(self, journal: Journal, hierarchy: Hierarchy, size: int) -> None:
        self._journal = journal
        self._hierarchy = hierarchy
        self._disk_size = int(size * ROOM) // 4096 * 4096
        self._zram = Path()

    def __enter__(self) -> Rig:
        try:
            self._set_up()
        except OSError as error:
            restore(self._journal)
            raise RefusalError(
                f"the machine does not let itself be set up ({error})",
                "in a container: docker run --privileged",
            ) from error
        except BaseException:
            restore(self._journal)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        restore(self._journal)

    def _set_up(self) -> None:
        name = f"{control_group.NAME}-{os.getpid()}"
        for change in self._hierarchy.changes(name):
            self._journal.make(change)
        self.group = Group(self._hierarchy, name)
        device = self._free_zram()
        self._zram = Path("/sys/block", device)
        listing = (self._zram / "comp_algorithm").read_text()
        if ALGORITHM not in re.findall(r"[\w-]+", listing):
            raise RefusalError(
                f"zram has no {ALGORITHM} here (only: {listing.strip()})",
                f"use a kernel with CONFIG_ZRAM_BACKEND_{ALGORITHM.upper()}",
            )
        current = re.search(r"\[(\S+)\]", listing)
        before = current.group(1) if current else ALGORITHM
        self._journal.make(ZramConfigured(device, ALGORITHM, before, self._disk_size))
        self._journal.make(SwapOn(f"/dev/{device}"))

    def _free_zram(self) -> str:
        """A device that nobody uses; a new one where all are in use."""
        names = changes.zram_names()
        free = [name for name in names if not changes.zram_in_use(name)]
        if not free:
            self._journal.make(ZramAdded(names))
            free = sorted(set(changes.zram_names()) - set(names))
        if not free:
            raise RefusalError("every zram device is in use", "swapoff and reset one of them")
        return free[0]

    @property
    def device(self) -> str:
        return self._zram.name

    def read_ahead(self, page_cluster: int) -> None:
        """Set vm.page-cluster: the kernel's swap reads 2 to the power of it pages at once."""
        change = Sysctl.setting("vm.page-cluster", str(page_cluster))
        if change.before != change.value:
            self._journal.make(change)

    def stored(self) -> tuple[int, int]:
        """Of zram: bytes of pages kept, bytes of memory used for them, all in."""
        fields = (self._zram / "mm_stat").read_text().split()
        return int(fields[0]), int(fields[2])


def restore(journal: Journal) -> list[str]:
    """Put everything back, deaf to a second Ctrl-C meanwhile."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
    try:
        return journal.restore()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
