"""What the facts about a kernel, a user and a machine mean for userswap. Pure: reads no file.

Each finding says a fact, what userswap does about it and, unless all is well, the remedy. Whether
regions can be made at all is engine/probe.py's verdict, the same one that `userswap.Region` obeys;
a finding marked `essential` makes the service a limited one.

Must not know: how facts are gathered, how findings are printed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from userswap.backends.grammar import format_size
from userswap.engine import movers, probe
from userswap.engine.machine import UNLIMITED, Codec, Machine
from userswap.engine.probe import Facts, Service, describe

FILES_NEEDED = 256
"""Descriptors: a client holds a handful however many regions it has; the rest is the program's."""
MAPS_DEFAULT = 65530
"""The kernel's own vm.max_map_count."""

Status = Literal["ok", "limited", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    topic: str
    status: Status
    fact: str
    use: str
    remedy: str = ""
    essential: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    service: Service
    findings: tuple[Finding, ...]

    @property
    def shortcomings(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.essential and each.status != "ok")

    @property
    def exit_code(self) -> int:
        """0 full service, 1 limited, 3 none."""
        if self.service.level == "none":
            return 3
        return 1 if self.service.level != "full" or self.shortcomings else 0


def examine(facts: Facts, machine: Machine) -> Report:
    findings = [
        _kernel(facts),
        _page_size(facts),
        _device(facts),
        _system_call(facts),
        _sysctl(facts),
        _capabilities(facts),
        _seccomp(facts),
        _user_mode(facts),
        *_features(facts),
        _mover(facts),
        _vectored_drop(facts),
        _reading(facts, machine),
        *(_codec(codec, machine) for codec in machine.codecs),
        _cpus(machine),
        _locked_memory(facts, machine),
        _address_space(machine),
        _overcommit(machine),
        _descriptors(machine),
        _maps(machine),
        _merging(facts, machine),
        _huge_pages(machine),
        _io_uring(facts, machine),
        _zram(facts, machine),
        _cgroup(machine),
    ]
    return Report(probe.service_level(facts), tuple(findings))


def _limit(count: int) -> str:
    return "unlimited" if count == UNLIMITED else format_size(count)


def _kernel(facts: Facts) -> Finding:
    fact = f"Linux {facts.kernel}, {facts.machine}"
    use = "UFFDIO_MOVE (Linux 6.8) evicts without losing writes"

    def enough(mover: probe.Mover) -> bool:
        return all(facts.has(feature) for feature in probe.REQUIRED[mover])

    if enough("move") or not facts.features:
        return Finding("kernel", "ok", fact, use)
    status: Status = "limited" if enough("protect") else "missing"
    return Finding("kernel", status, fact, use, "boot Linux 6.8 or newer")


def _mover(facts: Facts) -> Finding:
    """How written pages leave, and why so."""
    topic = "mover"
    if probe.best_mover(facts) == "move":
        return Finding(topic, "ok", "move", "the kernel itself refuses pages that I/O has hold of")
    if not facts.features:
        return Finding(topic, "missing", "none", "nothing is evicted without a userfaultfd")
    why = describe(facts.move) if facts.has(probe.FEATURE_MOVE) else "not offered"
    remedy = "boot Linux 6.8 or newer"
    fact = f"protect, since UFFDIO_MOVE is {why}"
    use = f'to be asked for, Region(mover="protect"); {movers.LIMIT_OF_PROTECT}'
    return Finding(topic, "limited", fact, use, remedy, True)


def _page_size(facts: Facts) -> Finding:
    fact = f"{facts.page_size} bytes"
    if facts.page_size == probe.PAGE_SIZE:
        return Finding("page size", "ok", fact, "the unit of paging")
    remedy = f"use a kernel built for pages of {probe.PAGE_SIZE} bytes"
    return Finding("page size", "missing", fact, "not served", remedy)


def _device(facts: Facts) -> Finding:
    topic, fact = str(probe.DEVICE), describe(facts.device)
    if facts.device == 0:
        return Finding(topic, "ok", fact, "tried first: every fault is served through it")
    if facts.syscall == 0:
        return Finding(topic, "missing", fact, "not needed: the system call serves every fault")
    ways = {
        errno.EACCES: f"as root: setfacl -m u:{facts.user}:rw {topic}, or a udev rule for a group",
        errno.EPERM: "let the control group pass it (docker run --device /dev/userfaultfd)",
        errno.ENOENT: "Linux 6.1 has it; in a container: docker run --device /dev/userfaultfd",
    }
    return Finding(
        topic, "missing", fact, "the system call is tried next", ways.get(facts.device, "")
    )


def _system_call(facts: Facts) -> Finding:
    topic, fact = "userfaultfd(2)", describe(facts.syscall)
    if facts.device == 0:
        return Finding(
            topic,
            "ok" if facts.syscall == 0 else "missing",
            fact,
            "not needed: the device comes first",
        )
    if facts.syscall == 0:
        return Finding(topic, "ok", fact, "every fault is served through it")
    return Finding(
        topic,
        "missing",
        fact,
        "no service for faults taken inside system calls",
        probe.service_level(facts).remedy,
    )


def _sysctl(facts: Facts) -> Finding:
    topic, value = "vm.unprivileged_userfaultfd", facts.unprivileged_userfaultfd
    if value is None:
        fact = "not there: this kernel was built without userfaultfd, or /proc/sys is hidden"
        return Finding(topic, "missing", fact, "nothing: the trials above decide")
    if value == 1:
        return Finding(topic, "ok", "1", "every user may have every fault served")
    if 0 in (facts.device, facts.syscall):
        return Finding(topic, "ok", str(value), "not needed")
    remedy = "as root: sysctl vm.unprivileged_userfaultfd=1"
    return Finding(topic, "limited", str(value), "userfaultfd(2) asks for CAP_SYS_PTRACE", remedy)


def _capabilities(facts: Facts) -> Finding:
    names = {
        "CAP_SYS_PTRACE": probe.CAP_SYS_PTRACE,
        "CAP_IPC_LOCK": probe.CAP_IPC_LOCK,
        "CAP_SYS_ADMIN": probe.CAP_SYS_ADMIN,
    }
    held = [name for name, capability in names.items() if facts.may(capability)]
    fact = ", ".join(held) or "none that matter"
    if facts.user_namespace:
        fact = "a user namespace's own, which do not count for the machine"
    enough = facts.may(probe.CAP_SYS_PTRACE) or 0 in (facts.device, facts.syscall)
    use = "PTRACE: serve every fault; IPC_LOCK: lock the pool; ADMIN: `bench kernel`"
    remedy = "" if enough else "run as root, or with CAP_SYS_PTRACE"
    return Finding("capabilities", "ok" if enough else "limited", fact, use, remedy)


def _seccomp(facts: Facts) -> Finding:
    if not facts.filtered:
        fact = "a filter is on and lets userfaultfd(2) pass" if facts.seccomp else "off"
        return Finding("seccomp", "ok", fact, "nothing is in the way")
    fact = "a filter refuses userfaultfd(2): the kernel's own rules would allow user-mode faults"
    if facts.device == 0:
        return Finding("seccomp", "ok", fact, "the device gets past it")
    return Finding(
        "seccomp", "missing", fact, "no service by system call", probe.service_level(facts).remedy
    )


def _user_mode(facts: Facts) -> Finding:
    topic, fact = "user-mode faults", describe(facts.user_mode)
    if 0 in (facts.device, facts.syscall):
        return Finding(topic, "ok" if facts.user_mode == 0 else "missing", fact, "not needed")
    if facts.user_mode == 0:
        use = "Region(user_mode_only=True); a system call on evicted memory fails with EFAULT"
        return Finding(topic, "ok", fact, use)
    return Finding(topic, "missing", fact, "no service at all", probe.service_level(facts).remedy)


def _features(facts: Facts) -> list[Finding]:
    uses = {
        "write-protect": "tells clean pages from written ones",
        "sigbus": "ends reads of empty staging pages",
        "move": f"evicts; one page was moved: {describe(facts.move)}",
        "poison": "a lost page gives SIGBUS to whoever touches it, alone",
        "thread-id": "names the thread behind a fault",
        "wp-async": "not needed: writes are told by faults",
    }
    lacks = {
        "poison": "a lost page blocks whoever touches it, and is reported",
        "move": "the mover protect does without",
    }
    found = []
    for name, use in uses.items():
        feature = probe.FEATURES[name]
        first = probe.FIRST_KERNEL[feature]
        essential = feature in probe.REQUIRED["protect"] or name == "poison"
        if facts.has(feature):
            status: Status = "missing" if name == "move" and facts.move else "ok"
            found.append(Finding(name, status, f"offered (Linux {first})", use, "", essential))
        else:
            use = lacks.get(name, "no service without it" if essential else "done without")
            remedy = f"needs Linux {first}" if essential else ""
            found.append(Finding(name, "missing", "not offered", use, remedy, essential))
    return found


def _vectored_drop(facts: Facts) -> Finding:
    topic, fact = "process_madvise(2)", describe(facts.vectored_drop)
    if facts.vectored_drop == 0:
        return Finding(topic, "ok", fact, "drops many clean pages in one call")
    remedy = "Linux 6.13 allows it on oneself"
    if facts.vectored_drop == errno.EPERM:
        remedy = "let the seccomp filter pass process_madvise(2); Docker: --cap-add SYS_PTRACE"
    return Finding(
        topic, "limited", fact, "clean pages are dropped one run at a time, more slowly", remedy
    )


def _reading(facts: Facts, machine: Machine) -> Finding:
    """Tried between two siblings, one of which named the other, as a client names its pager."""
    topic, fact = "reading the client", f"process_vm_readv(2): {describe(machine.sibling_read)}"
    if machine.ptrace_scope is not None:
        fact += f"; Yama ptrace_scope {machine.ptrace_scope}"
    if machine.sibling_read == 0:
        return Finding(topic, "ok", fact, "the pager copies batches out of staging by itself")
    remedy = ""
    if (machine.ptrace_scope or 0) >= 2:
        remedy = "as root: sysctl kernel.yama.ptrace_scope=1"
    elif facts.seccomp:
        remedy = "let the seccomp filter pass process_vm_readv(2); Docker: --cap-add SYS_PTRACE"
    return Finding(
        topic, "limited", fact, "the agent copies batches into shared memory instead", remedy
    )


def _codec(codec: Codec, machine: Machine) -> Finding:
    topic = f"codec {codec.name}"
    if not codec.error:
        return Finding(topic, "ok", codec.library, f"store=ram:{codec.name}", "", True)
    others = [other.name for other in machine.codecs if not other.error]
    use = f"ram:{others[0]} works" if others else "pages are kept uncompressed"
    return Finding(topic, "missing", "no library was found", use, codec.error, True)


def _cpus(machine: Machine) -> Finding:
    usable = machine.cpus_usable
    fact = f"{len(usable)} of {machine.cpus_online}: {ranges(usable)} ({machine.cpu_model})"
    if len(usable) == 1:
        return Finding("CPUs", "ok", fact, "placement auto: everything shares the one CPU")
    use = "placement auto: faults are served on the faulting CPU, compression runs on the others"
    return Finding("CPUs", "ok", fact, use)


def ranges(numbers: tuple[int, ...]) -> str:
    """CPU numbers as the kernel writes them: 0-3,6."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _locked_memory(facts: Facts, machine: Machine) -> Finding:
    topic, fact = "locked memory", f"RLIMIT_MEMLOCK {_limit(machine.memlock_limit)}"
    if machine.memlock_limit == UNLIMITED or facts.may(probe.CAP_IPC_LOCK):
        return Finding(topic, "ok", fact, "the pool is locked: the kernel never swaps it")
    use = "a pool larger than that is not locked"
    if machine.memory.swap_total == 0:
        return Finding(topic, "ok", fact, f"{use}, but there is no swap to take it")
    remedy = "raise `ulimit -l` (limits.conf: memlock, systemd: LimitMEMLOCK=)"
    return Finding(topic, "limited", fact, f"{use}: the kernel may swap it", remedy)


def _address_space(machine: Machine) -> Finding:
    topic, fact = "address space", f"RLIMIT_AS {_limit(machine.address_limit)}"
    if machine.address_limit == UNLIMITED:
        return Finding(topic, "ok", fact, "regions may be far larger than memory", "", True)
    return Finding(
        topic, "limited", fact, "all regions together stay below it", "ulimit -v unlimited", True
    )


def _overcommit(machine: Machine) -> Finding:
    topic, fact = "vm.overcommit_memory", str(machine.overcommit)
    if machine.overcommit != 2:
        return Finding(topic, "ok", fact, "regions reserve no memory", "", True)
    use = "a region counts in full against the commit limit, evicted or not"
    return Finding(topic, "limited", fact, use, "as root: sysctl vm.overcommit_memory=0", True)


def _descriptors(machine: Machine) -> Finding:
    topic, fact = "open files", f"RLIMIT_NOFILE {machine.files_limit}"
    use = "a few descriptors for all regions together"
    if machine.files_limit == UNLIMITED or machine.files_limit >= FILES_NEEDED:
        return Finding(topic, "ok", fact, use)
    return Finding(topic, "limited", fact, use, f"ulimit -n {FILES_NEEDED} or more")


def _maps(machine: Machine) -> Finding:
    topic, limit = "vm.max_map_count", machine.map_count_limit
    use = "each region is a mapping of its own"
    if limit is None or limit >= MAPS_DEFAULT:
        return Finding(topic, "ok", str(limit), use)
    return Finding(
        topic, "limited", str(limit), use, f"as root: sysctl vm.max_map_count={MAPS_DEFAULT}"
    )


def _merging(facts: Facts, machine: Machine) -> Finding:
    running = "running" if machine.ksm_running else "not running"
    if facts.merging:
        fact = f"{running}; PR_SET_MEMORY_MERGE makes this process mergeable"
        remedy = "start the program without it (systemd: MemoryKSM=no)"
        return Finding(
            "KSM", "missing", fact, "regions are refused: merging drops write protection", remedy
        )
    return Finding(
        "KSM", "ok", f"{running}; this process is not mergeable", "mergeable memory is refused"
    )


def _huge_pages(machine: Machine) -> Finding:
    fact = machine.huge_pages or "not built in"
    return Finding(
        "transparent huge pages", "ok", fact, "regions opt out: they are paged in small pages"
    )


def _io_uring(facts: Facts, machine: Machine) -> Finding:
    fact = describe(machine.io_uring)
    if machine.io_uring_disabled is not None:
        fact += f"; kernel.io_uring_disabled {machine.io_uring_disabled}"
    use = "not needed by these stores; buffers a program registers with it stay resident"
    if machine.io_uring == 0:
        return Finding("io_uring", "ok", fact, use)
    remedy = (
        "let the seccomp filter pass it" if facts.seccomp and not machine.io_uring_disabled else ""
    )
    if machine.io_uring_disabled:
        remedy = "as root: sysctl kernel.io_uring_disabled=0"
    return Finding("io_uring", "limited", fact, use, remedy)


def _zram(facts: Facts, machine: Machine) -> Finding:
    use = "what `userswap bench kernel` compares with"
    if machine.zram_devices:
        algorithms = " ".join(machine.zram_algorithms) or "algorithms unknown"
        fact = f"{', '.join(machine.zram_devices)}; {algorithms}"
    else:
        fact = "a module that is not loaded" if machine.zram_loadable else "not in this kernel"
    if not machine.zram_loadable:
        return Finding("zram", "missing", fact, use, "boot a kernel with CONFIG_ZRAM")
    if not facts.may(probe.CAP_SYS_ADMIN):
        return Finding("zram", "limited", fact, use, "run the bench as root")
    return Finding("zram", "ok", fact, use)


def _cgroup(machine: Machine) -> Finding:
    use = "holds kernel swap to its budget in `userswap bench kernel`"
    if machine.cgroup_version == 0:
        return Finding(
            "memory control group",
            "missing",
            "none is mounted",
            use,
            "mount -t cgroup2 none /sys/fs/cgroup",
        )
    controller = "with" if machine.cgroup_memory else "without"
    fact = f"version {machine.cgroup_version}, {controller} memory controller"
    if machine.memory.limit is not None:
        fact += f"; {format_size(machine.memory.limit)} left to this process"
    if machine.cgroup_memory:
        return Finding("memory control group", "ok", fact, use)
    return Finding("memory control group", "missing", fact, use, "boot with cgroup_enable=memory")
