"""A region on another machine: a network that is slow, loses packets, is cut; a killed target."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nvme_socket import exporting
from nvme_wire import TARGET, machines
from support import kill_session
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, Run, Store, StoreFailedError

T = TypeVar("T")

pytestmark = pytest.mark.privileged

CUT_S = 5
PATIENCE = "ctrl_loss_tmo=1min&reconnect_delay=200ms&keep_alive_tmo=2s"
PAGES = 1024
TOUCHER = """
import json, random, sys
import userswap

PAGES, PAGE = int(sys.argv[2]), 4096
rng = random.Random(1)
versions = [0] * PAGES

def content(page):
    return random.Random(f"{page} {versions[page]}").randbytes(PAGE)

def touch(memory, page):
    held = bytes(memory[page * PAGE : page * PAGE + PAGE])
    assert held == content(page), page
    if rng.random() < 0.5:
        versions[page] += 1
        memory[page * PAGE : page * PAGE + PAGE] = content(page)

with userswap.Region(PAGES * PAGE, resident=3 * PAGES * PAGE // 8, store=sys.argv[1]) as region:
    memory = region.memory
    for page in range(PAGES):
        memory[page * PAGE : page * PAGE + PAGE] = content(page)
    print("filled", flush=True)
    touched = 0
    for line in sys.stdin:
        wanted = int(line)
        for _ in range(wanted):
            touch(memory, rng.randrange(PAGES))
        touched += wanted
        print(touched, flush=True)
    for page in range(PAGES):
        touch(memory, page)
    stats = region.stats()
    loads, lost = stats.faults_awaited, stats.lost_pages
    del memory
print(json.dumps({"awaited": loads, "lost": lost}), flush=True)
"""


class Toucher:
    """A program on the host's machine whose memory is the target's."""

    def __init__(self, url: str, prefix: Sequence[str] = ()) -> None:
        command = [*prefix, sys.executable, "-P", "-c", TOUCHER, url, str(PAGES)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout

    def ask(self, count: int) -> None:
        """Touch so many pages; `answer` waits for it."""
        self._stdin.write(f"{count}\n")
        self._stdin.flush()

    def answer(self) -> str:
        return self._stdout.readline().strip()

    def finish(self) -> dict[str, int]:
        """Verify all of it."""
        out, errors = self.process.communicate(timeout=90)
        assert self.process.returncode == 0, errors
        said: dict[str, int] = json.loads(out.splitlines()[-1])
        return said

    def kill(self) -> None:
        kill_session(self.process.pid)
        self.process.communicate()


@pytest.mark.parametrize(
    ("delay", "loss", "cut"),
    [(0.001, 0.01, False), (0.01, 0.0, True)],
    ids=["1 ms, 1 % lost", "10 ms, cut for 5 s"],
)
def test_no_page_is_lost_on_the_way(delay: float, loss: float, cut: bool) -> None:
    host = "nqn.2026-01.test:far"
    with machines() as on:
        listen = ("--listen", f"{TARGET}:4420", "--allow-host", host)
        with exporting("ram:lz4", *listen, prefix=on.on(on.target)) as (_, _, said):
            on.tell(f"delay {delay}")
            on.tell(f"loss {loss}")
            url = f"{said['url']}?hostnqn={host}&{PATIENCE}"
            toucher = Toucher(url, on.on(on.host))
            try:
                assert toucher.answer() == "filled", toucher.process.communicate()[1]
                toucher.ask(60)
                assert toucher.answer() == "60"
                before = on.tell("cut" if cut else f"delay {delay}")
                toucher.ask(60)
                if cut:
                    time.sleep(CUT_S)
                    on.tell("mend")
                assert toucher.answer() == "120"  # faults resume
                dropped = on.tell(f"loss {loss}") - before
                found = toucher.finish()
            finally:
                toucher.kill()
    assert found["lost"] == 0
    assert found["awaited"] > 60
    assert bool(dropped) == (cut or bool(loss))


def quiet_port() -> int:
    """A free one that no connection is given by chance while nobody listens there."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def test_a_killed_target_that_comes_back_has_every_page(tmp_path: Path) -> None:
    medium, listen = f"file:{tmp_path}/medium", f"127.0.0.1:{quiet_port()}"
    toucher: Toucher | None = None
    try:
        for life in range(3):
            with exporting(medium, "--listen", listen) as (target, _, said):
                if toucher is None:
                    toucher = Toucher(f"{said['url']}?{PATIENCE}")
                    assert toucher.answer() == "filled", toucher.process.communicate()[1]
                else:
                    assert toucher.answer() == str(400 * life)  # faults resume
                toucher.ask(200)
                assert toucher.answer() == str(400 * life + 200)
                toucher.ask(200)
                target.kill()
                target.wait()
                target.returncode = 0  # `exporting` wants it to end well
        assert toucher is not None
        with exporting(medium, "--listen", listen, size=""):
            assert toucher.answer() == "1200"
            assert toucher.finish()["lost"] == 0
    finally:
        if toucher is not None:
            toucher.kill()


async def test_a_target_that_lost_its_memory_gives_no_zeros() -> None:
    """What ram: held ended with the process: a host that comes back is not told it is there."""
    listen = f"127.0.0.1:{quiet_port()}"

    def export(work: Callable[[dict[str, Any]], T]) -> T:
        with exporting("ram:lz4", "--listen", listen) as (_, _, said):
            return work(said)

    loop = asyncio.get_running_loop()

    async def fill(url: str) -> Store:
        store = await open_stack(f"{url}?{PATIENCE}", Geometry(64))
        await store.write([Run(0, memoryview(b"x" * 4096))])
        await store.flush()
        return store

    def filled(said: dict[str, Any]) -> Store:
        return asyncio.run_coroutine_threadsafe(fill(said["url"]), loop).result(60)

    store = await asyncio.to_thread(export, filled)

    async def read() -> None:
        await store.read([Run(0, memoryview(bytearray(4096)))])

    def again(said: dict[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(read(), loop).result(60)

    with pytest.raises(StoreFailedError, match="is another one now"):
        await asyncio.to_thread(export, again)
    await store.aclose()
