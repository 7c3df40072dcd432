"""What the kernel grants this process for paging, and which level of service follows.

The engine asks before it makes a region and `userswap doctor` prints the same answer, so the two
never disagree. `gather` looks, by a few dozen system calls; `service_level` judges and is pure, so
that every kernel and every permission can be tested on any machine.

Must not know: regions, pagers, stores, how anything is printed.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from userswap.native import ffi, lib

PAGE_SIZE = 4096
"""The only page size the page table and the movers are written for."""

FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_SIGBUS = 1 << 7
FEATURE_THREAD_ID = 1 << 8
FEATURE_POISON = 1 << 14
FEATURE_WP_ASYNC = 1 << 15
FEATURE_MOVE = 1 << 16

FEATURES = {
    "write-protect": FEATURE_PAGEFAULT_FLAG_WP,
    "sigbus": FEATURE_SIGBUS,
    "thread-id": FEATURE_THREAD_ID,
    "poison": FEATURE_POISON,
    "wp-async": FEATURE_WP_ASYNC,
    "move": FEATURE_MOVE,
}
"""The bits of UFFDIO_API's answer that matter here; older distributions' headers lack the last."""

FIRST_KERNEL = {
    FEATURE_PAGEFAULT_FLAG_WP: "5.7",
    FEATURE_SIGBUS: "4.14",
    FEATURE_THREAD_ID: "4.14",
    FEATURE_POISON: "6.6",
    FEATURE_WP_ASYNC: "6.7",
    FEATURE_MOVE: "6.8",
}
Mover = Literal["move", "protect"]
"""How pages that were written leave memory."""

REQUIRED: dict[Mover, tuple[int, ...]] = {
    "move": (FEATURE_PAGEFAULT_FLAG_WP, FEATURE_SIGBUS, FEATURE_MOVE),
    "protect": (FEATURE_PAGEFAULT_FLAG_WP, FEATURE_SIGBUS),
}
BY_NAME = 'ask for the mover that does without it: Region(mover="protect")'

CAP_IPC_LOCK = 14
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21

DEVICE = Path("/dev/userfaultfd")
DOCKER_HELP = (
    "docker run --device /dev/userfaultfd (or --cap-add SYS_PTRACE --security-opt seccomp=PROFILE)"
)
"""Docker's own seccomp profile passes ioctl(2) but, whatever the capabilities, not userfaultfd(2):
the device is the short way in."""

Level = Literal["full", "user_mode_only", "none"]


class Service(NamedTuple):
    """A level of service, the fact it rests on, and what would raise it, if anything need."""

    level: Level
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Attempts are 0 or an errno; what a file did not say is None."""

    kernel: str
    machine: str
    page_size: int
    user: int
    capabilities: int
    """The effective set. In a user namespace it gives no rights over the machine itself."""
    user_namespace: bool
    container: bool
    seccomp: int
    """`Seccomp:` of /proc/self/status: 0 off, 1 strict, 2 a filter."""
    unprivileged_userfaultfd: int | None
    """vm.unprivileged_userfaultfd; None also tells a kernel built without userfaultfd."""
    device: int
    syscall: int
    user_mode: int
    api: int
    move: int
    features: int
    vectored_drop: int
    """process_madvise(2) on this process itself: one call drops many ranges."""
    merging: bool
    """Whether PR_SET_MEMORY_MERGE made everything this process maps mergeable."""

    def has(self, feature: int) -> bool:
        return bool(self.features & feature)

    def may(self, capability: int) -> bool:
        """Whether the capability holds over the machine itself, not only over a user namespace."""
        return bool(self.capabilities >> capability & 1) and not self.user_namespace

    @property
    def filtered(self) -> bool:
        """Whether a seccomp filter, not a sysctl, turns the system call away.

        The kernel never refuses anybody a descriptor for user-mode faults, so EPERM there is a
        filter's; so is ENOSYS when the sysctl shows that the kernel has userfaultfd.
        """
        refused = self.user_mode == errno.EPERM
        hidden = self.user_mode == errno.ENOSYS and self.unprivileged_userfaultfd is not None
        return self.seccomp != 0 and (refused or hidden)


def read_text(path: str | Path) -> str | None:
    """A small file's text without its last newline, or None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:
        return None


def read_number(path: str | Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text.strip()) else None


def process_status() -> dict[str, str]:
    """The fields of /proc/self/status."""
    lines = (read_text("/proc/self/status") or "").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def in_user_namespace() -> bool:
    """Whether user ids are mapped, as in a rootless container, instead of being the machine's."""
    mapping = read_text("/proc/self/uid_map")
    return mapping is not None and mapping.split() != ["0", "0", "4294967295"]


def in_container() -> bool:
    # os.path.exists: Path.exists raises where the folder may not be searched
    return os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")


def gather() -> Facts:
    status = process_status()
    tried = ffi.new("struct us_probe_userfault *")
    lib.us_probe_userfault(tried)
    return Facts(
        kernel=platform.release(),
        machine=platform.machine(),
        page_size=resource.getpagesize(),
        user=os.geteuid(),
        capabilities=int(status.get("CapEff", "0"), 16),
        user_namespace=in_user_namespace(),
        container=in_container(),
        seccomp=int(status.get("Seccomp", "0")),
        unprivileged_userfaultfd=read_number("/proc/sys/vm/unprivileged_userfaultfd"),
        device=-tried.device,
        syscall=-tried.syscall,
        user_mode=-tried.user_mode,
        api=-tried.api,
        move=-tried.move,
        features=tried.features,
        vectored_drop=-lib.us_probe_vectored_drop(),
        merging=lib.us_probe_merging() == 1,
    )


def best_mover(facts: Facts) -> Mover:
    """The mover to use: `protect` only where the kernel cannot move pages."""
    return "move" if facts.has(FEATURE_MOVE) and facts.move == 0 else "protect"


def service_level(facts: Facts, mover: Mover | None = None) -> Service:
    """The best level of service that these facts allow, with a mover or with the best. Pure."""
    service = _unserved_machine(facts) or _no_descriptor(facts)
    service = service or _missing_feature(facts, mover or best_mover(facts))
    if service is not None:
        return service
    if facts.device == 0:
        return Service("full", f"{DEVICE} opens", "")
    if facts.syscall == 0:
        granted = "CAP_SYS_PTRACE" if facts.may(CAP_SYS_PTRACE) else "vm.unprivileged_userfaultfd"
        return Service("full", f"{granted} grants userfaultfd(2)", "")
    reason = f"{DEVICE}: {describe(facts.device)}; userfaultfd(2): {_why_not_syscall(facts)}"
    return Service("user_mode_only", reason, _raise_rights(facts))


def describe(code: int) -> str:
    """An attempt's outcome in words."""
    return "ok" if code == 0 else f"{errno.errorcode.get(code, str(code))} ({os.strerror(code)})"


def _unserved_machine(facts: Facts) -> Service | None:
    if facts.page_size != PAGE_SIZE:
        remedy = f"use a kernel built for pages of {PAGE_SIZE} bytes"
        return Service(
            "none", f"pages have {facts.page_size} bytes here; userswap serves {PAGE_SIZE}", remedy
        )
    if facts.merging:
        remedy = "start the program without PR_SET_MEMORY_MERGE (systemd: MemoryKSM=no)"
        return Service(
            "none", "KSM may merge this process's memory, which drops write protection", remedy
        )
    return None


def _no_descriptor(facts: Facts) -> Service | None:
    if 0 in (facts.device, facts.syscall, facts.user_mode):
        return None
    if facts.filtered:
        return Service("none", "a seccomp filter refuses userfaultfd(2)", _lift_filter(facts))
    if facts.user_mode == errno.ENOSYS:
        remedy = "boot a kernel built with CONFIG_USERFAULTFD"
        return Service("none", f"kernel {facts.kernel} is built without userfaultfd", remedy)
    if facts.user_mode == errno.EINVAL:
        remedy = "boot Linux 6.8 or newer"
        return Service(
            "none", f"kernel {facts.kernel} does not know UFFD_USER_MODE_ONLY (Linux 5.11)", remedy
        )
    if facts.user_mode in (errno.EMFILE, errno.ENFILE):
        remedy = "raise `ulimit -n`, or close descriptors"
        return Service("none", f"no descriptor is left: {describe(facts.user_mode)}", remedy)
    reason = f"userfaultfd(2): {describe(facts.user_mode)}, not by the kernel's rules or seccomp"
    return Service(
        "none",
        reason,
        "look for a denial by SELinux or AppArmor (`ausearch -m avc`, `dmesg`) and allow it",
    )


def _missing_feature(facts: Facts, mover: Mover) -> Service | None:
    remedy = f"boot Linux {FIRST_KERNEL[FEATURE_MOVE]} or newer"
    for feature in REQUIRED[mover]:
        if not facts.has(feature):
            name = next(name for name, bit in FEATURES.items() if bit == feature)
            first = FIRST_KERNEL[feature]
            reason = f"kernel {facts.kernel} has no userfaultfd {name}: needs Linux {first}"
            more = f", or {BY_NAME}" if feature == FEATURE_MOVE else ""
            return Service("none", reason, remedy + more)
    if mover == "move" and facts.move != 0:
        reason = f"UFFDIO_MOVE is offered but fails: {describe(facts.move)}"
        return Service("none", reason, f"{remedy}, without a filter on ioctl(2), or {BY_NAME}")
    return None


def _why_not_syscall(facts: Facts) -> str:
    if facts.may(CAP_SYS_PTRACE):
        return f"{describe(facts.syscall)} in spite of CAP_SYS_PTRACE"
    if facts.user_namespace and facts.capabilities >> CAP_SYS_PTRACE & 1:
        return "the CAP_SYS_PTRACE of a user namespace does not count"
    return "no CAP_SYS_PTRACE and vm.unprivileged_userfaultfd is 0"


def _raise_rights(facts: Facts) -> str:
    """How a process that may serve user-mode faults comes to serve all."""
    if facts.container and facts.device in (errno.ENOENT, errno.EPERM):
        return f"start the container with {DOCKER_HELP}"
    ways = []
    if facts.device == errno.EACCES:
        ways.append(f"setfacl -m u:{facts.user}:rw {DEVICE}")
    ways.append("sysctl vm.unprivileged_userfaultfd=1")
    return f"as root: {', or '.join(ways)}"


def _lift_filter(facts: Facts) -> str:
    if facts.device == errno.EACCES:
        return (
            f"as root: setfacl -m u:{facts.user}:rw {DEVICE}; or let the filter pass userfaultfd(2)"
        )
    if facts.container:
        return f"start the container with {DOCKER_HELP}"
    return (
        "let the filter pass userfaultfd(2) (systemd: SystemCallFilter=userfaultfd), "
        f"or give access to {DEVICE}"
    )
