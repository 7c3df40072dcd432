"""The journal of what a benchmark changed on the machine, so that even kill -9 leaves nothing
behind for good.

Every change is written down before it is made, and undone in reverse order at the end of the run,
or at the next start where the run did not come to its end. One run at a time: the lock is held
for as long as there is something to undo, and it goes with the process that holds it.

Must not know: what the changes are for.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from userswap.bench import changes
from userswap.bench.changes import Change


class BusyError(Exception):
    """Another run has the machine."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"another benchmark is running (process {pid})")
        self.pid = pid


class Journal:
    """Make changes through `make`; `restore` puts all of them back."""

    def __init__(self, folder: Path | None = None) -> None:
        """Take the lock (BusyError) and read what an earlier run may have left."""
        self._folder = folder or _default_folder()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = self._folder / "bench.journal"
        self._lock = _lock(self._folder / "bench.lock")
        self._changes = self._read()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def pending(self) -> tuple[Change, ...]:
        """Changes that are, or may be, in force."""
        return tuple(self._changes)

    def make(self, change: Change) -> None:
        """Write the change down, then make it. One that failed half-way is undone by `restore`,
        too."""
        self._changes.append(change)
        self._write()
        change.apply()

    def restore(self) -> list[str]:
        """Undo all changes, the latest first; what was put back. OSError names what would not go
        back: that and what depends on it stay in the journal."""
        lines = []
        while self._changes:
            line = self._changes[-1].undo()
            self._changes.pop()
            self._write()
            if line is not None:
                lines.append(line)
        self._path.unlink(missing_ok=True)
        return lines

    def close(self) -> None:
        """Let the lock go. Does not restore."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _read(self) -> list[Change]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return []
        except ValueError:
            # `_write` replaces the file whole, so this is not a torn write of ours.
            raise OSError(
                f"{self._path} is damaged; remove it after a look at /proc/swaps"
            ) from None
        if content["boot"] != _boot_id():
            return []  # a reboot has undone everything
        return [changes.from_json(fields) for fields in content["changes"]]

    def _write(self) -> None:
        content: dict[str, Any] = {
            "boot": _boot_id(),
            "pid": os.getpid(),
            "changes": [changes.to_json(change) for change in self._changes],
        }
        fresh = self._path.with_suffix(".new")
        with fresh.open("w") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self._path)


def _default_folder() -> Path:
    return next(_candidates()) / "userswap"


def _candidates() -> Iterator[Path]:
    """Places that live as long as the changes do, the best first."""
    for name in ("/run", os.environ.get("XDG_RUNTIME_DIR", ""), "/var/tmp"):
        if name and os.access(name, os.W_OK | os.X_OK):
            yield Path(name)
    raise OSError("no place for the journal: neither /run nor /var/tmp can be written")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _lock(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = int(os.read(lock, 32) or b"0")
        os.close(lock)
        raise BusyError(pid) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
