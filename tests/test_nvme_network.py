"""A region on another machine's memory, over a network that is slow, loses packets, and is cut."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from nvme_socket import exporting
from nvme_wire import TARGET, Machines, machines
from support import kill_session

pytestmark = pytest.mark.privileged

CUT_S = 5
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

    def __init__(self, on: Machines, url: str) -> None:
        command = [*on.on(on.host), sys.executable, "-P", "-c", TOUCHER, url, str(PAGES)]
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
            patience = "ctrl_loss_tmo=1min&reconnect_delay=200ms&keep_alive_tmo=2s"
            toucher = Toucher(on, f"{said['url']}?hostnqn={host}&{patience}")
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
