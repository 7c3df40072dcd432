"""What a benchmark changes on the machine, each change with its own way back.

A change is a few plain values, so that bench/journal.py can write it down before it is made.
Invariant: `undo` is right in every state that a crash can leave behind: not yet made, half made,
made, or undone already. It touches nothing that is not ours: a swap device carries our label, a
control group our name.

Must not know: when changes are made, or why.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

LABEL = "userswap-bench"
_LABEL_OFFSET = 1052
"""Where the swap header keeps its 16 bytes of label."""
_SECTOR = 512


class Change(ABC):
    """One change of the machine; subclasses are dataclasses of JSON values."""

    kind: ClassVar[str]

    @abstractmethod
    def apply(self) -> None: ...

    @abstractmethod
    def undo(self) -> str | None:
        """Put it back; a line that says what was put back, or None where nothing was to do."""


@dataclass(frozen=True, slots=True)
class Sysctl(Change):
    kind: ClassVar[str] = "sysctl"
    path: str
    before: str
    value: str

    @classmethod
    def setting(cls, name: str, value: str) -> Sysctl:
        path = Path("/proc/sys", *name.split("."))
        return cls(str(path), path.read_text().strip(), value)

    def apply(self) -> None:
        Path(self.path).write_text(self.value)

    def undo(self) -> str | None:
        if Path(self.path).read_text().strip() == self.before:
            return None
        Path(self.path).write_text(self.before)
        return f"{self.path} is {self.before} again"


@dataclass(frozen=True, slots=True)
class ControlGroup(Change):
    kind: ClassVar[str] = "control-group"
    path: str

    def apply(self) -> None:
        Path(self.path).mkdir()

    def undo(self) -> str | None:
        """Whatever still runs in it was started by the benchmark; ends that first."""
        folder = Path(self.path)
        if not folder.is_dir():
            return None
        end_members(folder)
        folder.rmdir()
        return f"control group {folder.name} removed"


def end_members(folder: Path, patience: float = 10.0) -> None:
    """End every process of a control group of ours."""
    deadline = time.monotonic() + patience
    while members := (folder / "cgroup.procs").read_text().split():
        for member in members:
            try:
                os.kill(int(member), signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise OSError(f"processes {', '.join(members)} do not leave {folder}")
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class GroupController(Change):
    """Version 2 only: lets groups below the root have the memory controller."""

    kind: ClassVar[str] = "group-controller"
    path: str

    def apply(self) -> None:
        Path(self.path).write_text("+memory")

    def undo(self) -> str | None:
        if "memory" not in Path(self.path).read_text().split():
            return None
        Path(self.path).write_text("-memory")
        return f"{self.path} without memory again"


@dataclass(frozen=True, slots=True)
class ZramAdded(Change):
    """A further zram device. Its number is known only once it exists, hence the list of those
    before."""

    kind: ClassVar[str] = "zram-added"
    before: list[str]

    def apply(self) -> None:
        Path("/sys/class/zram-control/hot_add").read_text()

    def undo(self) -> str | None:
        removed = []
        for name in zram_names():
            if name not in self.before and not zram_in_use(name):
                control = Path("/sys/class/zram-control/hot_remove")
                _write_when_free(control, name.removeprefix("zram"))
                removed.append(name)
        return f"{', '.join(removed)} removed" if removed else None


@dataclass(frozen=True, slots=True)
class ZramConfigured(Change):
    kind: ClassVar[str] = "zram-configured"
    name: str
    algorithm: str
    algorithm_before: str
    size: int

    def apply(self) -> None:
        folder = Path("/sys/block", self.name)
        (folder / "comp_algorithm").write_text(self.algorithm)
        (folder / "disksize").write_text(str(self.size))

    def undo(self) -> str | None:
        """A device with contents but without our label has become somebody else's since: left
        alone."""
        folder = Path("/sys/block", self.name)
        if not folder.is_dir():
            return None
        empty = (folder / "mm_stat").read_text().split()[0] == "0"
        if zram_in_use(self.name) and not empty and not carries_label(Path("/dev", self.name)):
            return None
        was_set_up = zram_in_use(self.name)
        _write_when_free(folder / "reset", "1")
        (folder / "comp_algorithm").write_text(self.algorithm_before)
        return f"{self.name} reset" if was_set_up else None


@dataclass(frozen=True, slots=True)
class SwapOn(Change):
    """Swap on a device of ours, before any other swap of the machine."""

    kind: ClassVar[str] = "swap-on"
    device: str

    def apply(self) -> None:
        _command("mkswap", "-L", LABEL, self.device)
        _command("swapon", "-p", "32767", self.device)

    def undo(self) -> str | None:
        active = any(line.split()[0] == self.device for line in swaps())
        if not active or not carries_label(Path(self.device)):
            return None
        _command("swapoff", self.device)
        return f"swap on {self.device} off"


def _write_when_free(path: Path, text: str, patience: float = 5.0) -> None:
    """A device that came or went is looked at by udev, and busy for as long."""
    deadline = time.monotonic() + patience
    while True:
        try:
            path.write_text(text)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def find_command(name: str) -> str | None:
    """Where a command of the system is, also for a root whose PATH is a user's."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _command(name: str, *words: str) -> None:
    command = [find_command(name) or name, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")


def swaps() -> list[str]:
    """The lines of /proc/swaps, one per active swap area."""
    return Path("/proc/swaps").read_text().splitlines()[1:]


def carries_label(device: Path) -> bool:
    try:
        with device.open("rb") as stream:
            header = stream.read(_LABEL_OFFSET + _SECTOR)
    except OSError:
        return False
    return header[_LABEL_OFFSET : _LABEL_OFFSET + 16].rstrip(b"\0") == LABEL.encode()


def zram_names() -> list[str]:
    return sorted(path.name for path in Path("/sys/block").glob("zram*"))


def zram_in_use(name: str) -> bool:
    return Path("/sys/block", name, "disksize").read_text().strip() != "0"


KINDS: dict[str, type[Change]] = {
    each.kind: each
    for each in (Sysctl, ControlGroup, GroupController, ZramAdded, ZramConfigured, SwapOn)
}


def to_json(change: Change) -> dict[str, Any]:
    return {"kind": change.kind, **asdict(change)}  # type: ignore[call-overload]


def from_json(fields: dict[str, Any]) -> Change:
    values = dict(fields)
    return KINDS[values.pop("kind")](**values)
