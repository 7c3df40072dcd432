"""Signs of life on standard error: one line that renews itself on a terminal, else a few lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

TERMINAL_INTERVAL = 0.1
LOG_INTERVAL = 5.0
MIB = 1 << 20


class Progress:
    """The phases of a job, each so many bytes long. `note` adds what else is worth seeing."""

    def __init__(
        self,
        note: Callable[[], str],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._note = note
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._interval = TERMINAL_INTERVAL if self._terminal else LOG_INTERVAL
        self._phase = ""
        self._total = self._done = 0
        self._started = self._shown = clock()

    def begin(self, phase: str, total: int) -> None:
        self._phase, self._total, self._done = phase, total, 0
        self._started = self._shown = self._clock()

    def advance(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if now - self._shown >= self._interval:
            self._shown = now
            self._show(self._line(now))

    def end(self) -> float:
        """Close the phase; the seconds it took."""
        now = self._clock()
        if self._terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()
        else:
            self._show(self._line(now))
        return now - self._started

    def _line(self, now: float) -> str:
        seconds = now - self._started
        share = 100 * self._done // max(self._total, 1)
        rate = self._done / MIB / max(seconds, 1e-9)
        amount = f"{self._done // MIB} of {self._total // MIB} MiB"
        return f"{self._phase:6} {share:3} %  {amount}  {rate:.0f} MiB/s  {self._note()}".rstrip()

    def _show(self, line: str) -> None:
        self._stream.write(f"\r{line}\033[K" if self._terminal else f"{line}\n")
        self._stream.flush()
