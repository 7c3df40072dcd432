"""Scenarios in processes of their own: how the loss tests start, watch and end them.

A scenario is a function of scenarios.py. Its process, its pager and whatever else it starts carry
one mark in their environment, by which they are found and ended: a pager leads a session of its
own, so that no group or session holds them all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self

P = ParamSpec("P")

TESTS = Path(__file__).resolve().parent
MARK = "USERSWAP_TEST_MARK"
LOST = 10
"""Exit status of a scenario that read what it did not write."""
STUCK = 11
"""Exit status of a scenario whose threads stand still."""
SLOW = float(os.environ.get("USERSWAP_TEST_SLOW", "1"))
"""How many times as long as usual things may take, as on an emulated machine; long histories are
shorter there."""


def call(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> str:
    """Source of a child that calls a function of this folder."""
    named = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    assert not args, "scenarios are called by keyword"
    module = function.__module__
    return f"import {module}\n{module}.{function.__name__}({named})\n"


def fewer(count: int, least: int = 1) -> int:
    """How many of a long history's steps are enough on a slow machine."""
    return count if SLOW <= 1 else max(least, int(2 * count / SLOW))


def marked(mark: str) -> list[int]:
    """The processes that carry a mark, zombies left out."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def soon(condition: Callable[[], bool], within: float) -> bool:
    """Wait until a condition holds; False when the time is up."""
    deadline = time.monotonic() + within * SLOW
    while not condition():
        if time.monotonic() > deadline:
            return condition()
        time.sleep(0.01)
    return True


class Child:
    """A scenario's process. Nothing that it started outlives the `with` block."""

    def __init__(
        self, source: str, *, canary: int = 0, env: Mapping[str, str] | None = None
    ) -> None:
        self._source = source
        self._mark = uuid.uuid4().hex
        self._env = {**os.environ, **(env or {}), MARK: self._mark}
        self._env["USERSWAP_CANARY"] = str(canary)
        self._stack = contextlib.ExitStack()
        self.report = ""
        """A file of the child's own that a scenario and its store may write."""

    def __enter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        information = folder / "userswap_trial-0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: userswap-trial\nVersion: 0\n"
        )
        (information / "entry_points.txt").write_text(
            "[userswap.stores]\ntrial = trial_store:open_store\n"
        )
        self.report = str(folder / "report")
        self._folder = folder
        given = os.environ.get("PYTHONPATH", "")
        self._env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), str(folder), given)))
        self._env["USERSWAP_TEST_REPORT"] = self.report
        # Files, not pipes: a process left behind cannot hold them open against us.
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", self._source],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=self._env,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
        if value is not None:
            print(f"--- the child's output:\n{self.out}{self.err}")
        self._stack.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text()

    def reports(self) -> str:
        path = Path(self.report)
        return path.read_text() if path.exists() else ""

    def go_on(self) -> None:
        """End a scenario's wait for its standard input."""
        assert self.process.stdin
        self.process.stdin.close()

    def said(self, word: str, within: float = 20) -> str:
        """Wait for a line that begins with a word; returns the rest of it."""

        def lines() -> list[str]:
            return [line for line in self.out.splitlines(True) if line.startswith(word)]

        ready = soon(
            lambda: self.process.poll() is not None or bool(lines() and lines()[0][-1] == "\n"),
            within,
        )
        assert ready, f"the child did not say {word!r} in {within} s"
        assert lines(), f"the child ended with {self.process.poll()}"
        return lines()[0].removeprefix(word).strip()

    def wait(self, timeout: float = 60) -> int:
        """Its exit status; STUCK when the time is up."""
        try:
            return self.process.wait(timeout * SLOW)
        except subprocess.TimeoutExpired:
            print(f"ended after {timeout} s")
            self.end()
            return STUCK

    def processes(self) -> list[int]:
        """Everything that carries its mark."""
        return marked(self._mark)

    def left_over(self, within: float = 3) -> list[int]:
        """What still runs of it, its pager first of all, after some time to go."""
        soon(lambda: not marked(self._mark), within)
        return marked(self._mark)

    def end(self) -> None:
        """End everything that the child started, by pid, and itself."""
        deadline = time.monotonic() + 10
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        while (left := marked(self._mark)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def check(source: str, *, timeout: float = 60, env: Mapping[str, str] | None = None) -> str:
    """Run a scenario that must pass and leave nothing behind; returns what it said."""
    with Child(source, env=env) as child:
        status = child.wait(timeout)
        assert status == 0, f"exit status {status}"
        assert child.left_over() == []
        return child.out
