"""Linux's target under regions that are touched and verified all the while it is broken and mended.

Each function is given a target that runs and a folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import IO, Self

from daemons import PLACES, wait_for
from machine import SLOW
from nvmet_host import FRIEND
from nvmet_vm import Nvmet, Subsystem

PAGE = 4096
PATIENCE_S = 60 * SLOW
OUTAGE_S = 1.0
"""How long something stays broken; nothing depends on it but how much piles up meanwhile."""
ENOUGH = 200  # touches, after which every part of a region was swapped
UPHEAVALS = 25
QUICK = "reconnect_delay=100ms"


class Toucher:
    """`toucher.py` in a process of its own, on these stores."""

    def __init__(self, folder: Path, *urls: str) -> None:
        self._progress = folder / "progress"
        self._progress.write_bytes(bytes(8))
        self._said = folder / "said"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "toucher", str(self._progress), *urls],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**os.environ, "PYTHONPATH": PLACES},
                start_new_session=True,
            )
        try:
            assert self._line() == "filled", self.said()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def said(self) -> str:
        """What it and its pager wrote on standard error."""
        return self._said.read_text()

    @property
    def touches(self) -> int:
        return int.from_bytes(self._progress.read_bytes(), "little")

    def goes_on(self, count: int = ENOUGH) -> None:
        """Wait until it has touched so many more."""
        wanted = self.touches + count
        wait_for(lambda: self.touches >= wanted or self.ended, PATIENCE_S)
        assert self.touches >= wanted, f"{self.touches} of {wanted}: {self.said()}"

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def status(self) -> int:
        """Wait for its end."""
        return self._process.wait(PATIENCE_S)

    def ask(self, what: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        output: IO[str] | None = self._process.stdout
        assert output is not None
        os.set_blocking(output.fileno(), False)
        line = ""

        def complete() -> bool:
            nonlocal line
            line += output.readline()
            return line.endswith("\n") or self.ended

        wait_for(complete, PATIENCE_S)
        assert line.endswith("\n"), f"{line!r}, {self._process.poll()}: {self.said()}"
        return line.strip()

    def holds_everything(self) -> None:
        assert self.ask("verify") == "good"
        for stats in json.loads(self.ask("stats")):
            assert stats["lost_pages"] == stats["vanished_pages"] == 0
            assert stats["faults_awaited"] > 0

    def end(self) -> None:
        self.holds_everything()
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.flush()
        assert self._process.wait(PATIENCE_S) == 0, self.said()
        assert "Traceback" not in self.said(), self.said()


@contextlib.contextmanager
def touched(folder: Path, subsystem: Subsystem, *options: str) -> Iterator[Toucher]:
    """A region on a subsystem, which is touched until the end, and holds everything then."""
    with Toucher(folder, subsystem.url("&".join((QUICK, *options)))) as toucher:
        toucher.goes_on()
        yield toucher
        toucher.goes_on()
        toucher.end()


def regions_in_every_form(nvmet: Nvmet, folder: Path) -> None:
    """Both block sizes, all digests, five queues, with and without flow control, at once."""
    with contextlib.ExitStack() as stack:
        urls = []
        for block in (512, PAGE):
            for header, data in product(("off", "on"), repeat=2):
                subsystem, _ = stack.enter_context(nvmet.exported(block_size=block))
                urls.append(
                    subsystem.url(
                        f"hdr_digest={header}&data_digest={data}&nr_io_queues=5"
                        f"&disable_sqflow={'on' if block == PAGE else 'off'}"
                    )
                )
        with Toucher(folder, *urls) as toucher:
            toucher.goes_on()
            assert toucher.ask("flush") == "good"
            toucher.goes_on()
            toucher.end()


def the_namespace_goes_and_returns(nvmet: Nvmet, folder: Path) -> None:
    with (
        nvmet.exported(block_size=512) as (subsystem, _),
        touched(folder, subsystem, "hdr_digest=on") as toucher,
    ):
        for _ in range(2):
            subsystem.take()
            time.sleep(OUTAGE_S)
            subsystem.give()
            toucher.goes_on()


def the_port_goes_and_returns(nvmet: Nvmet, folder: Path) -> None:
    """First the subsystem alone, where another one listens still, then all of the port."""
    with (
        nvmet.exported() as (subsystem, _),
        nvmet.exported() as (other, _),
        touched(folder, subsystem, "hdr_digest=on&data_digest=on&nr_io_queues=5") as toucher,
    ):
        for alone in (False, True):
            if alone:
                other.hide()
            subsystem.hide()
            time.sleep(OUTAGE_S)
            subsystem.listen()
            toucher.goes_on()
        other.listen()


def a_medium_that_forgets_everything(nvmet: Nvmet, folder: Path) -> None:
    """Under the same name: whoever touches a page of it gets a signal, and no zeros."""
    with nvmet.exported() as (subsystem, device), Toucher(folder, subsystem.url(QUICK)) as toucher:
        toucher.goes_on()
        subsystem.take()
        device.forget()
        subsystem.give()
        assert toucher.status() == -signal.SIGBUS, toucher.said()
        assert "come back without what was written" in toucher.said()


def anything_at_any_time(nvmet: Nvmet, folder: Path) -> None:
    """Short and long outages of all kinds, one into another, in an order that a seed gives."""
    seed = int(os.environ.get("USERSWAP_SEED", "1"))
    rng = random.Random(seed)
    print(f"seed {seed}")
    how = "keep_alive_tmo=1s", "ctrl_loss_tmo=off", QUICK
    with (
        nvmet.exported(block_size=512) as (first, _),
        nvmet.exported(write_cache=True) as (second, _),
        Toucher(
            folder,
            first.url("&".join((*how, "hdr_digest=on&nr_io_queues=1"))),
            second.url("&".join((*how, "data_digest=on&nr_io_queues=5"))),
        ) as toucher,
    ):
        for _ in range(UPHEAVALS):
            with contextlib.ExitStack() as mended:
                for _ in range(rng.randrange(1, 4)):
                    mended.enter_context(outage(nvmet, rng, rng.choice((first, second))))
                    time.sleep(rng.choice((0.01, 0.1, 0.3, 1.0)))
            if rng.randrange(2):
                toucher.goes_on(rng.randrange(50))
            if rng.randrange(4) == 0:
                assert toucher.ask("flush") == "good"
        toucher.end()


@contextlib.contextmanager
def outage(nvmet: Nvmet, rng: random.Random, subsystem: Subsystem) -> Iterator[None]:
    match rng.randrange(4):
        case 0:
            subsystem.take()
            yield
            subsystem.give()
        case 1 | 2:
            if not subsystem.is_listening:
                yield
                return
            subsystem.hide()
            yield
            subsystem.listen()
        case _:
            with nvmet.machine.frozen():
                time.sleep(rng.choice((0.1, 0.5, 1.5, 3.0)))
            yield


def a_slow_medium(nvmet: Nvmet, folder: Path) -> None:
    with (
        nvmet.exported(delay_us=5000) as (subsystem, _),
        touched(folder, subsystem, "data_digest=on") as toucher,
    ):
        assert toucher.ask("flush") == "good"


def silence(nvmet: Nvmet, folder: Path) -> None:
    """The target stands still for longer than keep-alive allows, and wakes up again."""
    with (
        nvmet.exported() as (subsystem, _),
        touched(folder, subsystem, "keep_alive_tmo=1s") as toucher,
    ):
        with nvmet.machine.frozen():
            time.sleep(3 * OUTAGE_S)
        toucher.goes_on()


def bad_blocks(nvmet: Nvmet, folder: Path) -> None:
    """What lies there is lost, and nothing else."""
    with (
        nvmet.exported() as (subsystem, device),
        Toucher(folder, subsystem.url()) as toucher,
    ):
        toucher.goes_on()
        device.damage(512 * 8, 516 * 8 - 1)
        (lost,) = json.loads(toucher.ask("lost"))
        assert 1 <= len(lost) <= 4
        assert lost == sorted(set(range(lost[0], lost[0] + 4)) & set(lost))


def only_friends(nvmet: Nvmet, folder: Path) -> None:
    with nvmet.exported(FRIEND) as (subsystem, _):
        status, said = userswap("store", "explain", subsystem.url())
        assert (status, "connect invalid host" in said) == (1, True), (status, said)
        with touched(folder, subsystem, f"hostnqn={FRIEND}") as toucher:
            # Who is in stays; who has to connect again does not come in, until it may.
            subsystem.forbid(FRIEND)
            subsystem.hide()
            subsystem.listen()
            time.sleep(OUTAGE_S)
            subsystem.allow(FRIEND)
            toucher.goes_on()


def store_check(nvmet: Nvmet, folder: Path) -> None:
    """The conformance suite."""
    for block, options in ((512, "hdr_digest=on"), (PAGE, "data_digest=on&nr_io_queues=5")):
        with nvmet.exported(block_size=block) as (subsystem, _):
            status, said = userswap("store", "check", subsystem.url(options))
            print(said)
            assert status == 0, said


def userswap(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "userswap", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


CORE: list[Callable[[Nvmet, Path], None]] = [
    the_namespace_goes_and_returns,
    the_port_goes_and_returns,
    silence,
    bad_blocks,
    a_medium_that_forgets_everything,
]
SCENARIOS = [
    *CORE,
    regions_in_every_form,
    anything_at_any_time,
    a_slow_medium,
    only_friends,
    store_check,
]
