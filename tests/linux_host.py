"""Linux's own NVMe/TCP host in a virtual machine, with nvme-cli, ext4 and fio, on our target.

The target is `userswap nvme export` on this machine's loopback address, which the machine reaches
as 10.0.2.2. Each function is given a machine that runs and makes the exports that it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from machine import SLOW, Files, Machine, program
from nvme import SUBSYSTEM
from nvme_socket import Address, exported, exporting
from packages import provide
from userswap.backends.nvme_tcp.server import Server

MODULES = ["configfs", "crc32c_generic", "crct10dif_generic", "nvme_tcp", "ext4"]
PROGRAMS = {
    "nvme": "nvme-cli",
    "mkfs.ext4": "e2fsprogs",
    "fsck.ext4": "e2fsprogs",
    "fio": "fio",
}
DISK = "/dev/nvme0n1"
LONG_S = 300 * SLOW
IDENTITY: Files = {
    "etc/nvme/hostnqn": (
        0o644,
        b"nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555\n",
    ),
    "etc/nvme/hostid": (0o644, b"11111111-2222-3333-4444-555555555555\n"),
}


def host_machine(folder: Path, *programs: str) -> Machine:
    """With these programs of this machine's."""
    provide({name: PROGRAMS[name] for name in programs})
    files = dict(IDENTITY)
    for name in programs:
        files |= program(name)
    return Machine(folder, modules=MODULES, files=files, memory_mib=512)


@contextlib.contextmanager
def connected(machine: Machine, address: Address, *options: str) -> Iterator[str]:
    """Our subsystem as Linux's first controller: its disk."""
    how = f"-t tcp -a 10.0.2.2 -s {address[1]}"
    machine.say(f"nvme connect {how} -n {SUBSYSTEM} {' '.join(options)}")
    wait_for_disk(machine, there=True)
    yield DISK
    said = machine.say(f"nvme disconnect -n {SUBSYSTEM}")
    assert "disconnected 1 controller" in said
    assert machine.run("ls /dev/nvme0*")[0] != 0


def wait_for_disk(machine: Machine, *, there: bool) -> None:
    test = f"[ -b {DISK} ]" if there else f"[ ! -e {DISK} ]"
    machine.say(f"for i in $(seq 300); do if {test}; then exit 0; fi; usleep 100000; done; exit 1")


def copy_and_compare(machine: Machine, mib: int = 1) -> None:
    """Random data to the disk and back, in pieces of several sizes, past the page cache."""
    machine.say(f"dd if=/dev/urandom of=/tmp/data bs=1M count={mib} 2>/dev/null")
    for size in (4, 16, 128, 1024):
        count = mib * 1024 // size
        machine.say(
            f"dd if=/tmp/data of={DISK} bs={size}k oflag=direct 2>/dev/null\n"
            f"dd if={DISK} bs={size}k count={count} iflag=direct 2>/dev/null | cmp - /tmp/data\n"
            f"dd if=/dev/zero of={DISK} bs=1M count={mib} oflag=direct 2>/dev/null"
        )


def discover_connect_identify(machine: Machine) -> None:
    with exporting("ram:lz4", size="64MiB") as (_, address, _):
        found = machine.say(f"nvme discover -t tcp -a 10.0.2.2 -s {address[1]}")
        assert re.search(rf"^subnqn: +{re.escape(SUBSYSTEM)}$", found, re.M), found
        with connected(machine, address):
            controller = machine.say("nvme id-ctrl /dev/nvme0")
            assert re.search(r"^mn +: userswap", controller, re.M), controller
            assert re.search(rf"^subnqn +: {re.escape(SUBSYSTEM)}$", controller, re.M), controller
            namespace = machine.say(f"nvme id-ns {DISK}")
            assert re.search(r"^nsze +: 0x4000$", namespace, re.M), namespace
            assert re.search(r"lbads:12 .*\(in use\)", namespace), namespace
            for command in (
                "list-ns /dev/nvme0",
                f"ns-descs {DISK}",
                "smart-log /dev/nvme0",
                "error-log /dev/nvme0",
                "changed-ns-list-log /dev/nvme0",
                "get-log /dev/nvme0 --log-id=5 --log-len=4096",
                "get-feature /dev/nvme0 -f 7",
                "get-property /dev/nvme0 -o 0",
            ):
                machine.say(f"nvme {command}")
            copy_and_compare(machine)


def every_form(machine: Machine) -> None:
    """Both block sizes, all digests; several queues are asked for, and one CPU has one."""
    for block in (512, 4096):
        options = ("--listen", "127.0.0.1:0", "--block-size", str(block))
        with exporting("ram:lz4", *options) as (_, address, _):
            for header, data in product(("", "--hdr-digest"), ("", "--data-digest")):
                with connected(machine, address, header, data, "--nr-io-queues=5"):
                    copy_and_compare(machine)
                    machine.say(f"blkdiscard {DISK}")
                    rest = machine.say(f"dd if={DISK} bs=1M count=4 2>/dev/null | tr -d '\\0'")
                    assert rest == ""


def controller_reset(machine: Machine) -> None:
    with exporting("ram:lz4") as (_, address, _), connected(machine, address):
        machine.say(f"dd if=/dev/urandom of=/tmp/data bs=1M count=4; cp /tmp/data {DISK}; sync")
        for _ in range(2):
            machine.say(f"cmp -n 4194304 {DISK} /tmp/data & nvme reset /dev/nvme0; wait $!")
        state = machine.say("cat /sys/class/nvme/nvme0/state")
        assert state.strip() == "live"
        machine.say(f"echo 3 >/proc/sys/vm/drop_caches; cmp -n 4194304 {DISK} /tmp/data")


def a_namespace_goes_and_returns(machine: Machine) -> None:
    """The host is told, and its disk goes and comes."""

    def work(server: Server) -> None:
        def change(namespace: object) -> None:
            done = threading.Event()

            def on_the_loop() -> None:
                server.target.set_namespace(1, namespace)  # type: ignore[arg-type]
                server.settle()
                done.set()

            server.loop.call_soon_threadsafe(on_the_loop)
            assert done.wait(20)

        with connected(machine, server.address):
            machine.say(f"dd if=/dev/urandom of=/tmp/data bs=1M count=2; cp /tmp/data {DISK}; sync")
            for _ in range(2):
                change(None)
                wait_for_disk(machine, there=False)
                change(server.blocks.namespace)
                wait_for_disk(machine, there=True)
                machine.say(f"cmp -n 2097152 {DISK} /tmp/data")

    asyncio.run(exported(work))


def the_target_ends_and_returns(machine: Machine) -> None:
    """Its host waits, connects again by itself, and finds everything."""
    store = f"file:{machine.folder}/exported"
    with exporting(store) as (_, address, _):
        how = f"-t tcp -a 10.0.2.2 -s {address[1]} -n {SUBSYSTEM}"
        machine.say(f"nvme connect {how} --reconnect-delay=1 --ctrl-loss-tmo=120")
        wait_for_disk(machine, there=True)
        machine.say(f"dd if=/dev/urandom of=/tmp/data bs=1M count=4; cp /tmp/data {DISK}; sync")
    machine.say(
        f"echo 3 >/proc/sys/vm/drop_caches\n(cmp -n 4194304 {DISK} /tmp/data; echo $? >/tmp/same) &"
    )
    with exporting(store, "--listen", f"127.0.0.1:{address[1]}", size=""):
        machine.say("for i in $(seq 600); do [ -s /tmp/same ] && break; usleep 100000; done")
        assert machine.say("cat /tmp/same").strip() == "0"
        machine.say(f"nvme disconnect -n {SUBSYSTEM}; rm /tmp/same")


def a_file_system(machine: Machine) -> None:
    """ext4 made, mounted with discard, filled, emptied, and found clean; mounted again."""
    with exporting("ram:lz4", size="128MiB") as (_, address, _):
        with connected(machine, address, "--hdr-digest", "--data-digest"):
            machine.say(
                f"mkfs.ext4 -q {DISK}\n"
                f"mount -t ext4 -o discard {DISK} /mnt\n"
                "dd if=/dev/urandom of=/mnt/a bs=1M count=16\n"
                "for n in $(seq 200); do echo $n >/mnt/$n; done\n"
                "cp /mnt/a /mnt/b; sync; rm /mnt/a; sync\n"
                "sha256sum /mnt/b >/tmp/sum; umount /mnt",
                LONG_S,
            )
        with connected(machine, address):
            machine.say(f"fsck.ext4 -fn {DISK}", LONG_S)
            machine.say(f"mount -t ext4 -o ro {DISK} /mnt; sha256sum -c /tmp/sum; umount /mnt")


def fio_verifies(machine: Machine) -> None:
    """Random reads and writes of several sizes, checked by fio; a controller reset meanwhile."""
    job = (
        f"fio --name=v --filename={DISK} --direct=1 --ioengine=libaio --iodepth=16 --size=8m "
        "--verify=crc32c --verify_fatal=1 --minimal --output=/dev/null"
    )
    for options in ((), ("--hdr-digest", "--data-digest")):
        with exporting("ram:lz4") as (_, address, _), connected(machine, address, *options):
            machine.say(f"{job} --rw=randrw --bssplit=4k/60:64k/30:256k/10", LONG_S)
            machine.say(
                f"{job} --rw=randwrite --bs=4k & sleep 1; nvme reset /dev/nvme0; wait $!", LONG_S
            )


CORE: list[Callable[[Machine], None]] = [
    discover_connect_identify,
    controller_reset,
    a_namespace_goes_and_returns,
]
SCENARIOS = [*CORE, every_form, the_target_ends_and_returns, a_file_system, fio_verifies]
