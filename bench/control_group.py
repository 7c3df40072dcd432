"""A memory control group of version 1 or 2: how the kernel's side gets its budget, and how both
sides are weighed.

Must not know: what runs in the group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from userswap.bench.changes import Change, ControlGroup, GroupController, end_members

NAME = "userswap-bench"
"""What the names of our groups begin with."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where the memory controller is mounted."""

    version: int
    root: Path

    def changes(self, name: str) -> list[Change]:
        """What it takes to have a group of that name."""
        wanted: list[Change] = []
        control = self.root / "cgroup.subtree_control"
        if self.version == 2 and "memory" not in control.read_text().split():
            wanted.append(GroupController(str(control)))
        return [*wanted, ControlGroup(str(self.root / name))]


def find() -> Hierarchy | None:
    """The mounted memory controller, whichever version has it; None where there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Hierarchy(1, Path(place))
        if kind == "cgroup2":
            controllers = Path(place, "cgroup.controllers").read_text().split()
            if "memory" in controllers:
                return Hierarchy(2, Path(place))
    return None


class Group:
    """One group, made before by a `ControlGroup` change."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self.folder = hierarchy.root / name
        first = hierarchy.version == 1
        # The limit is written often and the usage is read many times a second.
        self._limit = self.folder / ("memory.limit_in_bytes" if first else "memory.max")
        self._no_limit = "-1" if first else "max"
        self._usage = self.folder / ("memory.usage_in_bytes" if first else "memory.current")
        self._events = self.folder / ("memory.oom_control" if first else "memory.events")
        self._swapped = "swap" if first else None

    def admit(self, pid: int) -> None:
        """Move a process in. What it has touched before stays charged to the group that it came
        from."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def members(self) -> list[int]:
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    def empty(self) -> None:
        """End what still runs in it."""
        end_members(self.folder)

    def limit(self, amount: int | None) -> None:
        self._limit.write_text(self._no_limit if amount is None else str(amount))

    def usage(self) -> int:
        return int(self._usage.read_text())

    def swapped(self) -> int:
        """Bytes of the group that are in kernel swap."""
        if self._swapped:
            return _field(self.folder / "memory.stat", self._swapped)
        path = self.folder / "memory.swap.current"
        return int(path.read_text()) if path.exists() else 0

    def kills(self) -> int:
        """How many processes of the group the OOM killer has ended so far."""
        return _field(self._events, "oom_kill")


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def writable(hierarchy: Hierarchy) -> bool:
    return os.access(hierarchy.root, os.W_OK)
