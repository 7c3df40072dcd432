"""One pager serves one client after another: what each had goes when it ends, however it ends."""

from __future__ import annotations

from children import good

PAGER = """
import asyncio, socket, sys
from userswap.engine.connection import Connection

async def serve(connection):
    client = Connection(connection)
    client.open()
    await client.ended.wait()
    await client.close()

async def main():
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[1])
    listener.listen(64)
    listener.setblocking(False)
    print("ready", flush=True)
    tasks = []
    while True:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        tasks = [task for task in tasks if not task.done()]
        tasks.append(asyncio.create_task(serve(connection)))

asyncio.run(main())
"""

CLIENTS = """
import os, signal, socket, subprocess, sys, tempfile, time, warnings
import userswap
from userswap.engine import client as clients
from userswap.engine.control import Caller
from userswap.native import check, lib

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork in a process with threads
STORES = ("ram:lz4", "memory:", "ram:zstd")
folder = tempfile.TemporaryDirectory()
path = os.path.join(folder.name, "pager")

class SharedPager:
    returncode = None
    def __init__(self, pid):
        self.pid = pid
    def wait(self, timeout=None):
        return 0

class SharedClient(clients.Client):
    def _start_pager(self):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(path)
        self._process = SharedPager(pager.pid)
        self._caller = Caller(connection)
        self._pidfd = os.pidfd_open(pager.pid)
        self._descriptors.append(self._pidfd)
        check(lib.us_agent_allow(pager.pid))

def work(number):
    path, store = ("native", "asyncio")[number % 2], STORES[number % 3]
    region = userswap.Region("8MiB", resident="2MiB", store=store, fault_path=path)
    for offset in range(0, region.size, 4096):
        region.memory[offset : offset + 8] = (number * offset).to_bytes(8, "big")
    for offset in range(0, region.size, 40960):
        assert region.memory[offset : offset + 8] == (number * offset).to_bytes(8, "big")
    return region

def killed(number):
    child = os.fork()
    if child == 0:
        region = work(number)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

def held():
    status = dict(line.split(":", 1) for line in open(f"/proc/{pager.pid}/status"))
    number = lambda name: int(status[name].split()[0])
    threads, virtual, own = number("Threads"), number("VmSize") >> 10, number("RssAnon")
    return len(os.listdir(f"/proc/{pager.pid}/fd")), threads, virtual, own

def settled(most):
    deadline = time.monotonic() + 10
    while held()[0] > most and time.monotonic() < deadline:
        time.sleep(0.02)
    return held()

def serve(first, last):
    for number in range(first, last):
        killed(number) if number % 4 == 3 else work(number).close()

pager = subprocess.Popen([sys.executable, "-c", sys.argv[1], path], stdout=subprocess.PIPE)
try:
    assert pager.stdout.readline() == b"ready\\n"
    clients.Client = SharedClient
    idle = held()[0]
    serve(0, 48)
    before = settled(idle)
    serve(48, 200)
    after = settled(idle)
    assert pager.poll() is None
    assert before[0] == after[0] == idle, (idle, before, after)
    assert after[1] <= before[1] + 4, (before, after)  # idle threads of the executor
    assert after[2] < before[2] + 1024, (before, after)  # MiB; one client's table is 32 GiB
    assert after[3] < before[3] + 6144, (before, after)  # KiB: it comes and goes
finally:
    pager.kill()
    pager.wait()
    pager.stdout.close()
"""


def test_two_hundred_clients_leave_nothing() -> None:
    good(CLIENTS, PAGER, timeout=110)
