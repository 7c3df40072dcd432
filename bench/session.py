"""One measured run: starts the touching process, weighs its control group while it runs, adds up
everybody's CPU.

The total of a side is what its group is charged with since the memory was opened, plus what the
kernel keeps for it elsewhere (zram). CPU seconds are those of every process in the group: the
toucher and, for userswap, its pager.

Must not know: budgets, repetitions, which of the sides is the better one.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from userswap.bench.control_group import Group

SAMPLE_SECONDS = 0.02
PATIENCE_SECONDS = 900.0
"""Longer than any step: a pager that hangs must end the benchmark, not the user's patience."""


class ToucherError(Exception):
    """The touching process failed or was ended."""


class OutOfMemoryError(ToucherError):
    """The OOM killer ended it: the budget was too small for the kernel to work with."""


@dataclass(slots=True)
class Weights:
    """Samples of what the run weighs: (seconds since the start, group's charge, kept outside of
    the group)."""

    samples: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max((charge + outside for _, charge, outside in self.samples), default=0)

    @property
    def peak_outside(self) -> int:
        return max((outside for _, _, outside in self.samples), default=0)


class Session:
    """A touching process in a group. A context manager: at its end nothing of it runs any
    more."""

    def __init__(self, group: Group, outside: Callable[[], int], cpus: Sequence[int]) -> None:
        """`outside`: bytes held for the run that its group is not charged with. `cpus`: where the
        touching process may run from its first instruction on; a CPU that it has once run on is
        one that the kernel has to interrupt whenever it takes a page away."""
        self._group = group
        self._outside = outside
        self._kills = group.kills()
        self._began = time.monotonic()
        self._floor = 0
        self._outside_floor = 0
        self.weights = Weights()
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "userswap.bench.toucher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends it in order
            )
        finally:
            os.sched_setaffinity(0, everywhere)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._input: IO[str] = self._child.stdin
        self._output: IO[str] = self._child.stdout

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self._input.close()
        try:
            self._child.wait(0.0 if exception[0] else PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._output.close()
        self._wait_until_empty()

    def _wait_until_empty(self, patience: float = 10.0) -> None:
        """A pager ends with its last client; what it holds must not weigh on the next run."""
        deadline = time.monotonic() + patience
        while members := self._group.members():
            if time.monotonic() > deadline:
                self._group.empty()
                raise ToucherError(f"the pager (process {members[0]}) outlived its client")
            time.sleep(0.005)

    def open(self, plan: dict[str, Any]) -> None:
        """Prepare, enter the group, make the memory; from here on the group is weighed.

        The pager's own process is not in the weight, what it holds for the memory is."""
        self.ask("prepare", plan=plan)
        self._group.admit(self._child.pid)
        stats = self.ask("open")
        held = stats.get("pool_bytes", 0) + stats.get("table_bytes", 0)
        self._floor = self._group.usage() - held
        self._outside_floor = self._outside()

    def weigh(self) -> None:
        moment = time.monotonic() - self._began
        outside = self._outside() - self._outside_floor
        self.weights.samples.append((moment, self._group.usage() - self._floor, outside))

    def step(self, name: str) -> dict[str, Any]:
        """Run a step of the plan; its result, with the CPU time that its own processes took, and
        that everybody else on the machine took meanwhile."""
        own, everybody = self.cpu_seconds(), busy_seconds() - time.process_time()
        result = self.ask("step", name=name)
        self.weigh()
        used = self.cpu_seconds() - own
        others = busy_seconds() - time.process_time() - everybody - used
        return {**result, "cpu_seconds": used, "others_cpu_seconds": max(0.0, others)}

    def cpu_seconds(self) -> float:
        """CPU time so far of all processes in the group."""
        return sum(cpu_seconds(pid) for pid in self._group.members())

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer; the group is weighed while it is carried out."""
        try:
            print(json.dumps({"command": command, **arguments}), file=self._input, flush=True)
        except BrokenPipeError:
            raise self._ended(command) from None
        self._wait_for_answer(command)
        line = self._output.readline()
        if not line:
            raise self._ended(command)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ToucherError(f"{command}: {answer['error']}")
        return answer

    def _wait_for_answer(self, command: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while not selector.select(SAMPLE_SECONDS):
                if command == "step":
                    self.weigh()
                if time.monotonic() > deadline:
                    raise ToucherError(f"{command}: no answer within {PATIENCE_SECONDS:.0f} s")

    def _ended(self, command: str) -> ToucherError:
        code = self._child.wait()
        if self._group.kills() > self._kills:
            return OutOfMemoryError(f"{command}: ended by the OOM killer")
        return ToucherError(f"{command}: the touching process ended with {code}")


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond (/proc counts in ticks)."""
    clock = (~pid << 3) | 2
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0  # it has just ended


def busy_seconds() -> float:
    """CPU time that the machine's CPUs were not idle, or were taken from it by its host."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, *interrupts_and_steal = map(int, fields[:8])
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")


def vmstat(name: str) -> int:
    for line in Path("/proc/vmstat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
