"""Programs of the distribution that tests need: as root they are installed where they are missing.

Tests run in several processes at once, and apt lets one of them at its lists.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = ["-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"]
LOCK = Path(tempfile.gettempdir()) / f"userswap-packages-{os.getuid()}"


CANNOT_BE_HAD = "cannot be had on this machine"
"""In the reason of a skip that `.ci/run` takes."""


class MissingError(Exception):
    """Something is not there and cannot be had; the message says how to get it."""

    def __str__(self) -> str:
        return f"{super().__str__()} ({CANNOT_BE_HAD})"


def provide(packages: dict[str, str]) -> None:
    """Have these programs, each of which is in the package of Debian that is named with it."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [package for program, package in packages.items() if not shutil.which(program)]
        if missing:
            _install(missing)


def _install(missing: list[str]) -> None:
    names = " ".join(missing)
    if os.geteuid() or not shutil.which("apt-get"):
        raise MissingError(f"{names} is missing: apt-get install {names}")
    install = ["apt-get", "install", *OPTIONS, *missing]
    print(f"this machine lacks {names}; running as root: {' '.join(install)}", file=sys.stderr)
    # A server that nobody asked for shall not be started.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["apt-get", "update", "-q"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-500:]
            raise MissingError(f"{names} is missing, and {' '.join(command)} failed: {said}")
