"""Daemons for tests, programs that page to them, and clients that mean them harm.

`python -m daemons FUNCTION ARGUMENT…` runs one of the functions below in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from userswap import Region
from userswap.engine.control import Message
from userswap.engine.errors import UserswapError
from userswap.engine.visitor import ask, look

MIB = 1 << 20
PAGE = 4096
STORES = {"fast": "ram:lz4", "mem": "memory:"}
PLACES = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])


class Daemon:
    """`userswap serve` at a socket of its own."""

    def __init__(self, path: Path | str, resident: str, *options: str) -> None:
        self.path = str(path)
        stores = [text for name, url in STORES.items() for text in ("--store", f"{name}={url}")]
        command = [sys.executable, "-P", "-m", "userswap", "serve", "--json", *stores, *options]
        command += ["--socket", self.path, "--resident", resident]
        self.log = Path(f"{self.path}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "XDG_RUNTIME_DIR": str(Path(self.path).parent)},
            )
        assert self.process.stdout is not None
        self.ready = json.loads(self.process.stdout.readline() or "null")
        assert self.ready is not None, self.log.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if kind is not None:
            print(self.log.read_text())

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def status(self, name: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(dict(line.split(":", 1) for line in text.splitlines())[name].split()[0])

    def clients(self) -> list[Message]:
        found: list[Message] = look(self.path)["clients"]
        return found

    def regions(self) -> list[Message]:
        return [region for client in self.clients() for region in client["regions"]]

    def settled(self, descriptors: int, within: float = 20) -> int:
        """The number of descriptors, once it has come down."""
        wait_for(lambda: self.descriptors() <= descriptors, within)
        return self.descriptors()

    def end(self, number: int = signal.SIGTERM, within: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(within)


def wait_for(condition: Callable[[], bool], within: float = 60) -> bool:
    deadline = time.monotonic() + within
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class Program:
    """One of the functions of this module in a process of its own, told by lines what to do."""

    def __init__(self, function: str, *arguments: object, **options: Any) -> None:
        command = [sys.executable, "-P", "-X", "faulthandler", "-m", "daemons", function]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": PLACES},
            **options,
        )

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def line(self, within: float = 60) -> str:
        """The next line that it prints."""
        ready, _, _ = select.select([self.output], [], [], within)
        if not ready:
            self.process.kill()
        line = self.output.readline().strip()
        if not line:
            _, errors = self.process.communicate(timeout=10)
            raise AssertionError(f"it ended with {self.process.poll()}: {errors}")
        return line

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.line()

    def end(self, within: float = 60) -> None:
        """It must end well, without a word on standard error."""
        _, errors = self.process.communicate(timeout=within)
        assert (self.process.returncode, errors) == (0, ""), (self.process.args, errors)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def programs(count: int, function: str, *arguments: object) -> Iterator[list[Program]]:
    """Several at once; what still runs at the end is killed."""
    made: list[Program] = []
    try:
        made.extend(Program(function, *arguments, number) for number in range(count))
        yield made
    finally:
        for program in made:
            if program.process.poll() is None:
                program.kill()


# --- programs that page ---


def content(number: int, page: int, version: int = 0) -> bytes:
    """What a page holds: some of it like numbers, some of it not to be compressed."""
    made = random.Random(number << 40 | page << 8 | version)
    return made.randbytes(256) * 8 + bytes(2040) + (number << 32 | page).to_bytes(8, "big")


def holds(memory: memoryview, number: int, version: int = 0) -> None:
    """Every page is as it was written; the first that is not ends the process."""
    for page in range(len(memory) // PAGE):
        got = bytes(memory[page * PAGE : (page + 1) * PAGE])
        assert got == content(number, page, version), f"page {page} of {number}"


NOBODY = 65534


def become_nobody() -> None:
    """From root's rights to none; everything that is needed has been loaded."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its own process again


def visit_as_user(path: str, client: int) -> None:
    """What that user sees at a desk, and what he is told when he wants to change it."""
    become_nobody()
    print(json.dumps(look(path)["clients"]))
    try:
        ask(path, "set", client=str(client), weight="9")
    except UserswapError as error:
        print(error)


def false_pager(path: str) -> None:
    """A listener of that user's own."""
    become_nobody()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    time.sleep(60)


def page_as_user(path: str, store: str, size: int, resident: int, number: int) -> None:
    """As an ordinary user may."""
    become_nobody()
    page(path, store, size, resident, number, user_mode_only=True)


def page(
    path: str, store: str, size: int, resident: int, number: int, *, user_mode_only: bool = False
) -> None:
    """Fill a region, and verify it as often as asked."""
    with Region(
        size,
        resident=resident,
        pager=path,
        store=store,
        name=f"r{number}",
        user_mode_only=user_mode_only,
    ) as region:
        memory = region.memory
        for index in range(size // PAGE):
            memory[index * PAGE : (index + 1) * PAGE] = content(number, index)
        print("filled", flush=True)
        for line in sys.stdin:
            match line.strip():
                case "verify":
                    holds(memory, number)
                    print("good", flush=True)
                case "stats":
                    print(json.dumps(region.stats().as_dict()), flush=True)
                case "discard":
                    region.discard(0, PAGE)
                    assert not any(memory[:PAGE])
                    memory[:PAGE] = content(number, 0)
                    print("good", flush=True)
                case "close":
                    break
        holds(memory, number)
        del memory


def touch(path: str, store: str, size: int, resident: int, number: int) -> None:
    """Read at random and verify what is read, until told to stop; how many pages each second."""
    with Region(size, resident=resident, pager=path, store=store, name=f"r{number}") as region:
        memory, rnd, stop = region.memory, random.Random(number), threading.Event()
        for index in range(size // PAGE):
            memory[index * PAGE : (index + 1) * PAGE] = content(number, index)
        print("filled", flush=True)

        def wait() -> None:
            sys.stdin.readline()
            stop.set()

        threading.Thread(target=wait, daemon=True).start()
        count, worst, began = 0, 0.0, time.monotonic()
        while not stop.is_set():
            index = rnd.randrange(size // PAGE)
            before = time.monotonic()
            got = bytes(memory[index * PAGE : (index + 1) * PAGE])
            worst = max(worst, time.monotonic() - before)
            assert got == content(number, index), f"page {index} of {number}"
            count += 1
        print(count / (time.monotonic() - began), worst, flush=True)
        sys.stdin.readline()
        holds(memory, number)
        del memory


def open_many(path: str, store: str, size: int, resident: int, number: int) -> None:
    """Regions one after another, touched and closed, or killed in the middle."""
    rnd = random.Random(number)
    print("filled", flush=True)
    while True:
        with Region(size, resident=resident, pager=path, store=store) as region:
            for index in range(0, size // PAGE, 3):
                region.memory[index * PAGE : (index + 1) * PAGE] = content(number, index)
            for index in rnd.sample(range(0, size // PAGE, 3), 50):
                got = bytes(region.memory[index * PAGE : (index + 1) * PAGE])
                assert got == content(number, index)


def main(arguments: Sequence[str]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    function, *rest = arguments
    values = [int(text) if text.lstrip("-").isdigit() else text for text in rest]
    module, _, name = function.rpartition(".")
    getattr(importlib.import_module(module or "daemons"), name)(*values)
    sys.stdout.flush()
    if module:
        os._exit(0)  # threads of an enemy sleep in faults that nobody answers any more


if __name__ == "__main__":
    main(sys.argv[1:])
