"""`redis:` keeps the contract on a real server, which is stopped, flushed and killed underneath."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packages import MissingError, provide
from support import run_child
from userswap.backends import redis_server
from userswap.backends.conformance import CHECKS, Check, run
from userswap.backends.grammar import GrammarError
from userswap.backends.registry import open_stack
from userswap.backends.store import (
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    StoreFullError,
    TransientError,
)

PAGE = 4096
PACKAGE = "redis-server"


class Machine:
    """A server of the test's own, which can be ended and started again on its port."""

    def __init__(self, program: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.program = program
        self.folder = folder
        self.path = f"/tmp/userswap-{os.getpid()}-{self.port}.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--save", "", "--unixsocket", self.path]
        self._process = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if b"PONG" in self.say("PING") or b"NOAUTH" in self.say("PING"):
                    return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the server does not start")

    def say(self, *words: str) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(65536)

    def end(self, how: int = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None
            Path(self.path).unlink(missing_ok=True)

    def url(self, prefix: str = "test", options: str = "") -> str:
        return f"redis://127.0.0.1:{self.port}/0?prefix={prefix}{options}"


@pytest.fixture(scope="session")
def program() -> str:
    try:
        provide({PACKAGE: PACKAGE})
    except MissingError as error:
        pytest.skip(str(error))
    return shutil.which(PACKAGE) or ""


@pytest.fixture
def machine(program: str, tmp_path: Path) -> Iterator[Machine]:
    server = Machine(program, tmp_path)
    yield server
    server.end()


@pytest.fixture(scope="session")
def shared(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    server = Machine(program, tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.end()


@pytest.fixture(scope="session")
def small(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    server = Machine(program, tmp_path_factory.mktemp("redis"))
    server.start("--maxmemory", "4mb")
    yield server
    server.end()


async def read(store: Store, index: int, pages: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (pages * PAGE))
    await store.read([Run(index, memoryview(buffer))])
    return bytes(buffer)


async def write(store: Store, index: int, data: bytes) -> None:
    await store.write([Run(index, memoryview(data))])


def page(number: int, version: int = 0) -> bytes:
    return (b"%d.%d " % (number, version) * PAGE)[:PAGE]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_conformance(shared: Machine, small: Machine, check: Check, codec: str, seed: int) -> None:
    small.say("FLUSHALL")
    options = f"&codec={codec}"
    limited = small.url("{name}", options)
    run(check, shared.url("{name}", options), limited=limited, seed=seed)


async def test_it_says_what_it_stands_on(shared: Machine) -> None:
    store = await open_stack(shared.url("said"), Geometry(10))
    assert f"127.0.0.1:{shared.port}" in store.space
    assert "zstd" in store.space
    assert not store.durable
    await store.aclose()


async def test_a_socket_in_the_file_system(shared: Machine) -> None:
    store = await open_stack(f"redis:unix:{shared.path}?database=3", Geometry(10))
    await write(store, 1, page(1))
    assert await read(store, 0, 2) == bytes(PAGE) + page(1)
    await store.aclose()
    assert shared.say("EXISTS", "userswap:1").startswith(b":0"), "another database"


@pytest.mark.parametrize("how", ["killed", "flushed"])
async def test_what_vanished_is_lost_and_not_zeros(machine: Machine, how: str) -> None:
    machine.start()
    store = await open_stack(machine.url(), Geometry(100))
    for number in (1, 2, 3, 4):
        await write(store, number, page(number))
    await store.discard(3, 1)
    if how == "killed":
        machine.end()
        with pytest.raises(TransientError, match="no connection"):
            await read(store, 1)
        with pytest.raises(TransientError, match="no connection"):
            await write(store, 50, page(50))
        machine.start()
    else:
        machine.say("FLUSHALL")
    for number in (1, 2):
        with pytest.raises(PageLostError, match="vanished") as caught:
            await read(store, number)
        assert caught.value.page == number
    assert await read(store, 3) == bytes(PAGE)
    assert await read(store, 90, 3) == bytes(3 * PAGE)
    assert await read(store, 50) == bytes(PAGE), "was not answered: old or new"
    await write(store, 1, page(1, 1))
    await store.discard(2, 1)
    assert await read(store, 1, 2) == page(1, 1) + bytes(PAGE)
    with pytest.raises(PageLostError):
        await read(store, 4)
    await store.aclose()


async def test_an_older_state_is_not_taken_for_the_last(machine: Machine) -> None:
    machine.start()
    store = await open_stack(machine.url(), Geometry(100))
    for number in range(6):
        await write(store, number, page(number))
    await store.discard(5, 1)
    machine.say("SAVE")
    await write(store, 1, page(1, 1))
    await store.discard(2, 1)
    await write(store, 5, page(5, 1))
    machine.end()
    machine.start()
    assert await read(store, 0) == page(0)
    assert await read(store, 3, 2) == page(3) + page(4)
    assert await read(store, 2) == bytes(PAGE), "was discarded"
    for number in (1, 5):
        with pytest.raises(PageLostError):
            await read(store, number)
    await store.aclose()


async def test_an_earlier_session_is_believed_while_the_server_lasts(machine: Machine) -> None:
    machine.start()
    store = await open_stack(machine.url(), Geometry(100))
    await write(store, 1, page(1))
    await write(store, 2, page(2))
    await store.aclose()
    store = await open_stack(machine.url(options="&codec=lz4"), Geometry(100))
    assert await read(store, 0, 2) == bytes(PAGE) + page(1)
    await write(store, 3, page(3))
    machine.say("DEL", "test:mark")
    assert await read(store, 3) == page(3)
    for number in (1, 2, 7):
        with pytest.raises(PageLostError):
            await read(store, number)
    await store.aclose()


async def test_a_value_that_is_damaged_or_foreign_is_lost(shared: Machine) -> None:
    store = await open_stack(shared.url("damaged"), Geometry(10))
    for number in range(4):
        await write(store, number, os.urandom(PAGE))
    shared.say("SETRANGE", "damaged:1", "8", "\\xff\\xff")
    shared.say("SETRANGE", "damaged:1", "8", "~~~~")
    shared.say("SET", "damaged:2", "x")
    shared.say("DEL", "damaged:3")
    shared.say("RPUSH", "damaged:3", "x")
    for number in (1, 2, 3):
        with pytest.raises(PageLostError) as caught:
            await read(store, number)
        assert caught.value.page == number
    await store.aclose()


async def test_a_server_that_evicts_is_refused(machine: Machine) -> None:
    machine.start("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with pytest.raises(StoreFailedError, match="CONFIG SET maxmemory-policy noeviction"):
        await open_stack(machine.url(), Geometry(10))


async def test_a_server_that_takes_no_writes_is_full(machine: Machine) -> None:
    machine.start()
    store = await open_stack(machine.url(), Geometry(10))
    await write(store, 1, page(1))
    machine.say("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreFullError, match="maxmemory"):
        await write(store, 1, page(1, 1))
    assert await read(store, 1) == page(1)
    machine.say("CONFIG", "SET", "maxmemory", "0")
    machine.say("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(TransientError, match="read only"):
        await write(store, 1, page(1, 1))
    machine.say("REPLICAOF", "NO", "ONE")
    await write(store, 1, page(1, 1))
    assert await read(store, 1) == page(1, 1)
    await store.aclose()


async def test_a_password(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDISCLI_AUTH", raising=False)
    machine.start("--requirepass", "secret words")
    with pytest.raises(StoreFailedError, match="password_file="):
        await open_stack(machine.url(), Geometry(10))
    file = tmp_path / "password"
    file.write_text("secret words\n")
    file.chmod(0o644)
    url = machine.url(options=f"&password_file={file}")
    with pytest.raises(StoreFailedError, match="chmod 600"):
        await open_stack(url, Geometry(10))
    file.chmod(0o600)
    await (await open_stack(url, Geometry(10))).aclose()
    monkeypatch.setenv("REDISCLI_AUTH", "wrong")
    with pytest.raises(StoreFailedError, match="password_file="):
        await open_stack(machine.url(), Geometry(10))
    monkeypatch.setenv("REDISCLI_AUTH", "secret words")
    await (await open_stack(machine.url(), Geometry(10))).aclose()


async def test_the_lock_of_a_killed_process_expires(shared: Machine) -> None:
    url = shared.url("locked")
    child = run_child(
        """
import asyncio, os, sys
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry
async def main():
    await open_stack(sys.argv[1], Geometry(10))
    os._exit(7)
asyncio.run(main())
""",
        args=[url],
    )
    assert child.returncode == 7, child.stderr
    store = await open_stack(url, Geometry(10))
    with pytest.raises(StoreFailedError, match="choose another prefix"):
        await open_stack(url, Geometry(10))
    shared.say("SET", "locked:lock", "usurped")
    deadline = time.monotonic() + 10
    error: StoreError | None = None
    while error is None and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        try:
            await write(store, 1, page(1))
        except StoreFailedError as failed:
            error = failed
    assert "taken this one's place" in str(error)
    await store.aclose()
    assert b"usurped" in shared.say("GET", "locked:lock")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis:", "needs a server"),
        ("redis://", "needs a server"),
        ("redis://host:99999", "port 99999: ports are 1 to 65535"),
        ("redis://host:0", "ports are 1 to 65535"),
        ("redis://host:123456789/0", "ports are 1 to 65535"),
        ("redis://:word@host", "password does not belong"),
        ("redis://host?prefix=a%20b", "without spaces"),
        ("redis://host?codec=gzip", "unknown value 'gzip'"),
        ("redis://host?port=1", "unknown option 'port'"),
    ],
)
async def test_a_url_that_is_wrong_says_how(url: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        await open_stack(url, Geometry(10))


async def test_no_server_and_no_package(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreFailedError, match=r": no connection: Connection refused: is a Redis"):
        await open_stack(machine.url(), Geometry(10))
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(StoreFailedError, match=r"pip install 'userswap\[redis\]'"):
        redis_server.Server(redis_server.Address(), "x")


# --- under a region ---

REGION = """
import random, subprocess, sys, userswap
PAGE, PAGES = 4096, 4096
page = lambda number: random.Random(number).randbytes(64) * 64
region = userswap.Region(PAGES * PAGE, resident="4MiB", store=sys.argv[1], name="remote")
for number in range(PAGES):
    region.memory[number * PAGE : (number + 1) * PAGE] = page(number)
def check(seed, count):
    for number in random.Random(seed).sample(range(PAGES), count):
        assert region.memory[number * PAGE : (number + 1) * PAGE] == page(number), number
check(1, 1000)
print("touched", flush=True)
sys.stdin.readline()
check(2, 3000)
assert region.stats().lost_pages == 0
print("good", flush=True)
region.close()
"""


def begin(url: str) -> subprocess.Popen[str]:
    child: Any = subprocess.Popen(
        [sys.executable, "-c", REGION, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout.readline() == "touched\n", child.communicate(timeout=60)
    return child  # type: ignore[no-any-return]


def test_a_region_outlives_a_restart_that_keeps_the_pages(machine: Machine) -> None:
    machine.start("--appendonly", "yes", "--appendfsync", "always")
    child = begin(machine.url())
    machine.end()
    assert child.stdin
    child.stdin.write("go on\n")
    child.stdin.flush()
    time.sleep(1)
    assert child.poll() is None, "waits for its store"
    machine.start("--appendonly", "yes", "--appendfsync", "always")
    out, error = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "good\n"), error


def test_a_region_whose_server_forgot_gets_a_signal_and_no_zeros(machine: Machine) -> None:
    machine.start()
    child = begin(machine.url())
    machine.end()
    machine.start()
    _, error = child.communicate("go on\n", timeout=60)
    assert child.returncode == -signal.SIGBUS, error
    assert "vanished" in error
