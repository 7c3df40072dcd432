"""Linux's own NVMe/TCP target, nvmet, in a virtual machine, for a test to use, break and mend.

Each test makes a subsystem of its own, with namespaces on memory-backed null_blk devices; all of
them listen on the machine's port 4420, which is `machine.port` here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from machine import Machine

TARGET_MODULES = ["configfs", "crc32c_generic", "null_blk", "nvmet", "nvmet_tcp"]
ROOT = "/sys/kernel/config/nvmet"
PORT = f"{ROOT}/ports/1"
PORT_SCRIPT = f"""
mkdir {PORT}
cd {PORT}
echo tcp >addr_trtype; echo ipv4 >addr_adrfam; echo 0.0.0.0 >addr_traddr; echo 4420 >addr_trsvcid
"""


@dataclass
class Nvmet:
    """The target of a machine that runs."""

    machine: Machine
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self.machine.say(PORT_SCRIPT)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.machine.port

    def subsystem(self, *hosts: str) -> Subsystem:
        """A new one, without namespaces; only those hosts may use it, or all where none is named.

        It does not listen yet.
        """
        made = Subsystem(self, f"nqn.2026-01.test:linux{next(self._numbers)}")
        self.machine.say(f"mkdir {made.folder}; echo {0 if hosts else 1} >{made.folder}/{ANY}")
        for host in hosts:
            made.allow(host)
        return made

    def device(
        self, *, block_size: int = 4096, mib: int = 64, delay_us: int = 0, write_cache: bool = False
    ) -> Device:
        """A new device, that answers each command after the delay."""
        settings = {
            "size": mib,
            "blocksize": block_size,
            "memory_backed": 1,
            "discard": 1,
            "irqmode": 2 if delay_us else 0,
            "completion_nsec": delay_us * 1000,
            "cache_size": CACHE_MIB if write_cache else 0,
            "power": 1,
        }
        made = Device(self.machine, next(self._numbers), settings)
        made.make()
        return made

    @contextlib.contextmanager
    def exported(self, *hosts: str, **how: Any) -> Iterator[tuple[Subsystem, Device]]:
        """A subsystem that listens and the device that is its namespace 1, until both go again."""
        subsystem, device = self.subsystem(*hosts), self.device(**how)
        subsystem.add(device)
        subsystem.listen()
        try:
            yield subsystem, device
        finally:
            subsystem.remove()
            device.remove()


CACHE_MIB = 16
ANY = "attr_allow_any_host"


@dataclass(frozen=True)
class Device:
    machine: Machine
    number: int
    settings: dict[str, int]

    def make(self) -> None:
        values = "\n".join(f"echo {value} >{name}" for name, value in self.settings.items())
        self.machine.say(f"mkdir {self.folder}; cd {self.folder}\n{values}")

    @property
    def folder(self) -> str:
        return f"/sys/kernel/config/nullb/nullb{self.number}"

    @property
    def path(self) -> str:
        return f"/dev/nullb{self.number}"

    def damage(self, first: int, last: int) -> None:
        """These 512-byte sectors can be neither read nor written, until `mend`."""
        self.machine.say(f"echo +{first}-{last} >{self.folder}/badblocks")

    def forget(self) -> None:
        """All is gone; while it is not in use."""
        self.remove()
        self.make()

    def remove(self) -> None:
        self.machine.say(f"echo 0 >{self.folder}/power; rmdir {self.folder}")

    def mend(self, first: int, last: int) -> None:
        self.machine.say(f"echo -{first}-{last} >{self.folder}/badblocks")


@dataclass(frozen=True)
class Subsystem:
    nvmet: Nvmet
    nqn: str

    @property
    def folder(self) -> str:
        return f"{ROOT}/subsystems/{self.nqn}"

    def url(self, options: str = "") -> str:
        host, port = self.nvmet.address
        return f"nvme+tcp://{host}:{port}/{self.nqn}" + (f"?{options}" if options else "")

    def _say(self, script: str) -> None:
        self.nvmet.machine.say(script)

    def add(self, device: Device, nsid: int = 1) -> None:
        """The device becomes a namespace."""
        place = f"{self.folder}/namespaces/{nsid}"
        self._say(
            f"mkdir {place}; printf {device.path} >{place}/device_path; echo 1 >{place}/enable"
        )

    def take(self, nsid: int = 1) -> None:
        """The namespace goes; hosts that listen are told."""
        self._say(f"echo 0 >{self.folder}/namespaces/{nsid}/enable")

    def give(self, nsid: int = 1) -> None:
        self._say(f"echo 1 >{self.folder}/namespaces/{nsid}/enable")

    def allow(self, host: str) -> None:
        self._say(
            f"mkdir -p {ROOT}/hosts/{host}; ln -s {ROOT}/hosts/{host} {self.folder}/allowed_hosts/"
        )

    def forbid(self, host: str) -> None:
        self._say(f"rm {self.folder}/allowed_hosts/{host}")

    @property
    def is_listening(self) -> bool:
        return self.nvmet.machine.run(f"test -e {PORT}/subsystems/{self.nqn}")[0] == 0

    def listen(self) -> None:
        self._say(f"ln -s {self.folder} {PORT}/subsystems/")

    def hide(self) -> None:
        """Its connections are closed; the port too, if no other subsystem listens there."""
        self._say(f"rm {PORT}/subsystems/{self.nqn}")

    def remove(self) -> None:
        self._say(
            f"""rm -f {PORT}/subsystems/{self.nqn} {self.folder}/allowed_hosts/*
            for place in {self.folder}/namespaces/*; do
                echo 0 >$place/enable; rmdir $place
            done
            rmdir {self.folder}"""
        )


def target_machine(folder: Path) -> Machine:
    return Machine(
        folder,
        modules=TARGET_MODULES,
        arguments={"null_blk": "nr_devices=0"},
        memory_mib=320,
    )
