"""The machine around the pager: limits, neighbours and helpers that decide how well it can work.

Facts only: what they mean for userswap is engine/findings.py's business, and what decides whether
there is any service at all is in engine/probe.py. Looking changes nothing.

Must not know: regions, pagers, how anything is printed.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from userswap.engine.probe import read_number, read_text
from userswap.native import codecs as native_codecs
from userswap.native import lib

UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression library and its version; or why there is none, and what to install."""

    name: str
    library: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. What a control group allows is part of `limit`, which is None without one."""

    total: int
    available: int
    limit: int | None
    swap_total: int
    swap_free: int

    @property
    def usable(self) -> int:
        """What may be allocated now without pushing anything out."""
        return self.available if self.limit is None else min(self.available, self.limit)


@dataclass(frozen=True, slots=True)
class Machine:
    """Attempts are 0 or an errno; None is what a file did not say; a limit of -1 is no limit."""

    python: str
    cpu_model: str
    cpus_online: int
    cpus_usable: tuple[int, ...]
    memory: Memory
    cgroup_version: Literal[0, 1, 2]
    cgroup_memory: bool
    memlock_limit: int
    address_limit: int
    files_limit: int
    map_count_limit: int | None
    overcommit: int | None
    ptrace_scope: int | None
    sibling_read: int
    io_uring: int
    io_uring_disabled: int | None
    zram_devices: tuple[str, ...]
    zram_loadable: bool
    zram_algorithms: tuple[str, ...]
    ksm_running: bool
    huge_pages: str | None
    codecs: tuple[Codec, ...]


def gather() -> Machine:
    version, controlled = cgroup()
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        cpu_model=cpu_model(),
        cpus_online=os.cpu_count() or 1,
        cpus_usable=tuple(sorted(os.sched_getaffinity(0))),
        memory=memory(),
        cgroup_version=version,
        cgroup_memory=controlled,
        memlock_limit=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        address_limit=resource.getrlimit(resource.RLIMIT_AS)[0],
        files_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        map_count_limit=read_number("/proc/sys/vm/max_map_count"),
        overcommit=read_number("/proc/sys/vm/overcommit_memory"),
        ptrace_scope=read_number("/proc/sys/kernel/yama/ptrace_scope"),
        sibling_read=-lib.us_probe_readv(),
        io_uring=-lib.us_probe_io_uring(),
        io_uring_disabled=read_number("/proc/sys/kernel/io_uring_disabled"),
        zram_devices=zram_devices(),
        zram_loadable=zram_loadable(),
        zram_algorithms=zram_algorithms(),
        ksm_running=read_number("/sys/kernel/mm/ksm/run") == 1,
        huge_pages=chosen(read_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        codecs=codecs(),
    )


def chosen(choices: str | None) -> str | None:
    """The bracketed word of a kernel file such as `always [madvise] never`."""
    match = re.search(r"\[(\S+)\]", choices or "")
    return match.group(1) if match else None


def cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo") or "", re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def memory() -> Memory:
    lines = (read_text("/proc/meminfo") or "").splitlines()
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}

    def amount(key: str) -> int:
        return int(fields[key][0]) * 1024 if key in fields else 0

    return Memory(
        total=amount("MemTotal"),
        available=amount("MemAvailable"),
        limit=cgroup_headroom(),
        swap_total=amount("SwapTotal"),
        swap_free=amount("SwapFree"),
    )


def cgroup() -> tuple[Literal[0, 1, 2], bool]:
    """The control group version that governs memory, and whether its controller is there."""
    controllers = read_text("/sys/fs/cgroup/cgroup.controllers")
    if controllers is not None:
        return 2, "memory" in controllers.split()
    if Path("/sys/fs/cgroup/memory").is_dir():
        return 1, True
    return (
        (1, False)
        if Path("/sys/fs/cgroup").is_dir() and os.listdir("/sys/fs/cgroup")
        else (0, False)
    )


def cgroup_headroom() -> int | None:
    """Bytes that the control groups above this process still allow; None: they set no limit."""
    rooms = []
    for folder in _memory_groups():
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = read_number(folder / limit_file), read_number(folder / usage_file)
            # Version 1 writes "no limit" as the largest multiple of a page.
            if limit is not None and usage is not None and limit < 1 << 62:
                rooms.append(max(0, limit - usage + _page_cache(folder)))
    return min(rooms, default=None)


def _page_cache(group: Path) -> int:
    """Bytes of files that the kernel gives up before it lets the group run into its limit."""
    lines = (read_text(group / "memory.stat") or "").splitlines()
    fields = dict(line.split(" ", 1) for line in lines)
    return sum(int(fields.get(key, 0)) for key in ("inactive_file", "active_file"))


def _memory_groups() -> list[Path]:
    """The folders of this process's memory control group and of all groups above it."""
    for line in (read_text("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for root, ours in (
            (Path("/sys/fs/cgroup/memory"), "memory" in controllers.split(",")),
            (
                Path("/sys/fs/cgroup"),
                controllers == "" and Path("/sys/fs/cgroup/cgroup.controllers").exists(),
            ),
        ):
            if ours:
                parts = Path(path.lstrip("/")).parts
                return [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return []


def zram_devices() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in Path("/sys/block").glob("zram*")))


def zram_loadable() -> bool:
    """Whether the kernel has zram, loaded, built in or as a module."""
    if zram_devices() or Path("/sys/class/zram-control").exists():
        return True
    modules = Path("/lib/modules", platform.release())
    listing = read_text(modules / "modules.dep") or ""
    built_in = read_text(modules / "modules.builtin") or ""
    return "/zram.ko" in listing + built_in


def zram_algorithms() -> tuple[str, ...]:
    for device in zram_devices():
        listing = read_text(Path("/sys/block", device, "comp_algorithm"))
        if listing:
            return tuple(re.findall(r"[\w-]+", listing))
    return ()


def codecs() -> tuple[Codec, ...]:
    return tuple(_codec(name) for name in native_codecs.NAMES if name != "none")


def _codec(name: str) -> Codec:
    try:
        library = native_codecs.open_codec(name)
    except native_codecs.CodecError as error:
        return Codec(name, "", str(error))
    return Codec(name, f"{library.path} {library.version}")
