"""A small virtual machine for tests: Debian's kernel, busybox, and a shell that a test talks to.

Nothing of the machine under test is in it. The kernel is downloaded once, into the folder that
tests/vm.sh uses as well; QEMU and busybox are Debian's. The image is a root in memory that is put
together here, so that no disk, no boot loader and no Debian have to be made.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import lzma
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from packages import MissingError, provide

SERIES = os.environ.get("USERSWAP_VM_KERNEL", "6.1")
SLOW = float(os.environ.get("USERSWAP_TEST_SLOW", "1"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "userswap-vm"
QEMU = "qemu-system-x86_64"
PACKAGES = {QEMU: "qemu-system-x86", "busybox": "busybox-static"}
BOOT_SECONDS = 120 * SLOW
SAY_SECONDS = 60 * SLOW
NETWORK = ["virtio_pci", "virtio_net"]
Files = dict[str, tuple[int, bytes]]
"""Mode and content of files, by their path from the root."""

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
exec </dev/null >/dev/ttyS0 2>&1
while read -r module arguments; do
    insmod /modules/$module $arguments || echo "machine: no $module"
done </modules/order
mount -t configfs configfs /sys/kernel/config
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1
echo ready
while read -r line; do
    echo "$line" | base64 -d >/tmp/said
    sh /tmp/said >/tmp/answer 2>&1
    status=$?
    base64 /tmp/answer
    echo "= $status"
done
poweroff -f
"""


class Kernel:
    """Debian's of a series, unpacked: `image` to boot, modules by name."""

    def __init__(self, series: str) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.folder = self._fetched(series)
            self.image = self._unpacked()
        found = self.folder.rglob("*.ko*")  # in lib, or since Debian 13 in usr/lib
        self._modules = {path.name.partition(".")[0].replace("-", "_"): path for path in found}

    @staticmethod
    def _fetched(series: str) -> Path:
        """One that was downloaded before, or what the package lists have."""
        cached = [found.parent for found in CACHE.glob(f"{series}.*/complete")]
        if cached:
            return max(cached, key=lambda folder: folder.stat().st_mtime)
        if not shutil.which("apt-get"):
            raise MissingError("a kernel of Debian's is needed, and there is no apt-get")
        package = Kernel._package(series)
        folder = CACHE / package.removeprefix("linux-image-")
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            os.chmod(place, 0o777)  # apt downloads as a user of its own
            got = subprocess.run(
                ["apt-get", "download", package], cwd=place, capture_output=True, check=False
            )
            packages = list(Path(place).glob("*.deb"))
            if got.returncode or not packages:
                raise MissingError(f"apt-get download {package}: {got.stderr.decode()[-500:]}")
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(["dpkg-deb", "-x", packages[0], folder], check=True)
        (folder / "complete").touch()
        return folder

    @staticmethod
    def _package(series: str) -> str:
        meta = "linux-image-amd64" if series == "6.1" else f"linux-image-{series}-amd64"
        for update in (False, True):
            if update:
                subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
            said = subprocess.run(
                ["apt-cache", "depends", meta], capture_output=True, text=True, check=False
            )
            if found := re.search(rf"Depends: (linux-image-{re.escape(series)}\.\S*)", said.stdout):
                return found[1]
        raise MissingError(f"the package lists have no Linux {series} ({meta})")

    def _unpacked(self) -> Path:
        """The kernel without its own decompression, which takes an emulated processor seconds."""
        (packed,) = (self.folder / "boot").glob("vmlinuz-*")
        plain = packed.with_name("vmlinux")
        if not plain.exists():
            whole = packed.read_bytes()
            for start in re.finditer(rb"\xfd7zXZ\0", whole):
                with contextlib.suppress(lzma.LZMAError):
                    code = lzma.LZMADecompressor().decompress(whole[start.start() :])
                    if code.startswith(b"\x7fELF"):
                        plain.write_bytes(code)
                        break
        return plain if plain.exists() else packed

    def modules(self, names: Iterable[str]) -> dict[str, bytes]:
        """The modules and what they need, in the order in which they can be loaded."""
        ordered: dict[str, bytes] = {}

        def add(name: str) -> None:
            name = name.replace("-", "_")
            if name in ordered or name not in self._modules:  # built in
                return
            path = self._modules[name]
            code = path.read_bytes()
            if path.suffix == ".xz":
                code = lzma.decompress(code)
            needs = re.search(rb"\0depends=([^\0]*)\0", code)
            for other in needs[1].decode().split(",") if needs else ():
                add(other)
            ordered[name] = code

        for name in names:
            add(name)
        return ordered


def archive(files: Files) -> bytes:
    """A cpio archive, in the form that the kernel unpacks into its first root."""
    out = bytearray()
    folders = sorted({str(p) for name in files for p in Path(name).parents if str(p) != "."})
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [(name, stat.S_IFREG | mode, data) for name, (mode, data) in files.items()]
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def program(path: str) -> Files:
    """A program of this machine, and its libraries, for a machine's root."""
    where = shutil.which(path)
    if where is None:
        raise MissingError(f"no {path}")
    said = subprocess.run(["ldd", where], capture_output=True, text=True, check=False).stdout
    libraries = re.findall(r"(/\S+) \(0x", said)
    return {name.lstrip("/"): (0o755, Path(name).read_bytes()) for name in (where, *set(libraries))}


def accelerator() -> str:
    """An hypervisor's guest may have the device and not what it needs."""
    able = re.search(r"^flags.* (vmx|svm) ", Path("/proc/cpuinfo").read_text(), re.M)
    return "kvm" if able and os.access("/dev/kvm", os.W_OK) else "tcg"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Machine:
    """Runs while the context lasts. `say` runs a shell command in it.

    The machine's port 4420 is this machine's `port`, on the loopback address; whoever listens on
    this machine's loopback is 10.0.2.2 to it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        modules: Sequence[str],
        arguments: dict[str, str] | None = None,
        files: Files | None = None,
        memory_mib: int = 256,
    ) -> None:
        provide(PACKAGES)
        kernel = Kernel(SERIES)
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        loaded = kernel.modules([*NETWORK, *modules])
        given = arguments or {}
        order = "".join(f"{name}.ko {given.get(name, '')}\n" for name in loaded)
        busybox = shutil.which("busybox")
        assert busybox is not None
        root = {
            "init": (0o755, INIT.encode()),
            "bin/busybox": (0o755, Path(busybox).read_bytes()),
            "modules/order": (0o644, order.encode()),
            **{f"modules/{name}.ko": (0o644, code) for name, code in loaded.items()},
            **{f"{name}/.keep": (0o644, b"") for name in ("proc", "sys", "dev", "tmp", "mnt")},
            **(files or {}),
        }
        initrd = folder / "initrd"
        initrd.write_bytes(archive(root))
        self._control = folder / "control"
        self._console = folder / "console"
        self._command = [
            QEMU,
            *("-M", "pc", "-smp", "1", "-m", str(memory_mib), "-nodefaults", "-no-user-config"),
            *("-accel", accelerator(), "-cpu", "max,la57=off", "-display", "none", "-no-reboot"),
            *("-kernel", str(kernel.image), "-initrd", str(initrd)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0"),
            *("-serial", f"file:{self._console}"),
            *("-serial", f"unix:{self._control},server=on,wait=off"),
            "-netdev",
            f"user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:4420",
            *("-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-rng-pci"),
        ]

    def capture(self, path: Path) -> None:
        """Before it starts: keep all that goes over its network, in the form of libpcap."""
        self._command += ["-object", f"filter-dump,id=dump,netdev=net,file={path}"]

    def __enter__(self) -> Self:
        with (self.folder / "qemu").open("w") as errors:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        try:
            self._wire = self._connected()
            self._received = b""
            if self._line(BOOT_SECONDS) != "ready":
                raise AssertionError(self.logs())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            print(self.logs())
        self._wire.close()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _connected(self) -> socket.socket:
        wire = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            try:
                wire.connect(str(self._control))
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.logs()) from None
                time.sleep(0.02)
            else:
                return wire

    def _line(self, seconds: float) -> str:
        self._wire.settimeout(seconds)
        while b"\n" not in self._received:
            try:
                some = self._wire.recv(65536)
            except TimeoutError:
                raise AssertionError(f"no answer in {seconds:.0f} s: {self.logs()}") from None
            if not some:
                raise AssertionError(f"the machine has ended: {self.logs()}")
            self._received += some
        line, _, self._received = self._received.partition(b"\n")
        return line.decode("ascii", "replace").strip()

    def logs(self) -> str:
        """What QEMU and the console said."""
        files = (self.folder / "qemu", self._console)
        return "\n".join(p.read_text(errors="replace")[-4000:] for p in files if p.exists())

    def run(self, command: str, seconds: float = SAY_SECONDS) -> tuple[int, str]:
        """Run a shell command in the machine: its status, and what it said."""
        self._wire.sendall(base64.b64encode(command.encode()) + b"\n")
        answer = ""
        while not (line := self._line(seconds)).startswith("= "):
            answer += line
        said = base64.b64decode(answer).decode(errors="replace")
        return int(line.removeprefix("= ")), said

    def say(self, command: str, seconds: float = SAY_SECONDS) -> str:
        """The same for one that has to succeed."""
        status, said = self.run(f"set -e\n{command}", seconds)
        if status:
            raise AssertionError(f"{command!r} ended with {status}: {said}\n{self.logs()}")
        return said

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The whole machine stands still: connections stay and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)
