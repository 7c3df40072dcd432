"""Telling systemd how the daemon is: one datagram to the socket that NOTIFY_SOCKET names.

Must not know: what the daemon does.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(**state: str) -> None:
    """Send READY="1", STATUS="…" and the like; without systemd nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    message = "\n".join(f"{name}={value}" for name, value in state.items())
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
    ):
        out.setblocking(False)
        out.sendto(message.encode(), address.replace("@", "\0", 1))


def watchdog_period() -> float | None:
    """Seconds between two WATCHDOG="1" that systemd wants, half of what it allows; None: none."""
    micros, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not micros.isdigit() or int(micros) <= 0 or (pid and pid != str(os.getpid())):
        return None
    return int(micros) / 2e6
