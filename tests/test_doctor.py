"""What doctor says of kernels, users and containers that are not here, and that it runs here."""

import errno
import json
from dataclasses import replace

import pytest

from support import run_child
from userswap.engine import findings, machine, probe
from userswap.engine.findings import Report, examine
from userswap.engine.machine import Codec, Machine, Memory
from userswap.engine.probe import Facts

GIB = 1 << 30
ALL_FEATURES = (1 << 17) - 1
ROOT = Facts(
    kernel="6.18.1",
    machine="x86_64",
    page_size=4096,
    user=0,
    capabilities=(1 << 40) - 1,
    user_namespace=False,
    container=False,
    seccomp=0,
    unprivileged_userfaultfd=0,
    device=0,
    syscall=0,
    user_mode=0,
    api=0,
    move=0,
    features=ALL_FEATURES,
    vectored_drop=0,
    merging=False,
)
NOBODY = replace(ROOT, user=1000, capabilities=0, device=errno.EACCES, syscall=errno.EPERM)
CONTAINER = replace(
    ROOT,
    capabilities=0,
    container=True,
    seccomp=2,
    device=errno.ENOENT,
    syscall=errno.EPERM,
    user_mode=errno.EPERM,
    api=errno.ENOSYS,
    move=errno.ENOSYS,
    features=0,
)
HOST = Machine(
    python="CPython 3.11.7",
    cpu_model="a CPU",
    cpus_online=4,
    cpus_usable=(0, 1, 3),
    memory=Memory(16 * GIB, 12 * GIB, None, 0, 0),
    cgroup_version=2,
    cgroup_memory=True,
    memlock_limit=8 << 20,
    address_limit=machine.UNLIMITED,
    files_limit=1024,
    map_count_limit=65530,
    overcommit=0,
    ptrace_scope=1,
    sibling_read=0,
    io_uring=0,
    io_uring_disabled=0,
    zram_devices=("zram0",),
    zram_loadable=True,
    zram_algorithms=("lzo", "lz4"),
    ksm_running=False,
    huge_pages="madvise",
    codecs=(Codec("lz4", "liblz4.so.1"), Codec("zstd", "libzstd.so.1")),
)


def finding(report: Report, topic: str) -> findings.Finding:
    return next(each for each in report.findings if each.topic == topic)


def test_root_gets_full_service_by_the_device() -> None:
    report = examine(ROOT, HOST)
    assert report.service == ("full", "/dev/userfaultfd opens", "")
    assert report.exit_code == 0
    assert [each.topic for each in report.findings if each.status != "ok"] == []


def test_the_system_call_does_where_the_device_does_not() -> None:
    facts = replace(ROOT, device=errno.ENOENT)
    assert probe.service_level(facts) == ("full", "CAP_SYS_PTRACE grants userfaultfd(2)", "")
    by_sysctl = replace(NOBODY, syscall=0, unprivileged_userfaultfd=1)
    assert probe.service_level(by_sysctl).reason == (
        "vm.unprivileged_userfaultfd grants userfaultfd(2)"
    )


def test_an_ordinary_user_gets_user_mode_faults_and_two_ways_to_more() -> None:
    report = examine(NOBODY, HOST)
    assert report.exit_code == 1
    level, reason, remedy = report.service
    assert level == "user_mode_only"
    assert "no CAP_SYS_PTRACE and vm.unprivileged_userfaultfd is 0" in reason
    assert "setfacl -m u:1000:rw /dev/userfaultfd" in remedy
    assert "sysctl vm.unprivileged_userfaultfd=1" in remedy
    assert "EFAULT" in finding(report, "user-mode faults").use


def test_a_seccomp_filter_is_told_from_the_sysctl() -> None:
    report = examine(CONTAINER, HOST)
    assert report.exit_code == 3
    assert report.service.reason == "a seccomp filter refuses userfaultfd(2)"
    assert "docker run --device /dev/userfaultfd" in report.service.remedy
    assert finding(report, "seccomp").status == "missing"
    assert finding(examine(NOBODY, HOST), "seccomp").status == "ok"


def test_a_filter_that_hides_the_call_is_still_a_filter() -> None:
    hidden = replace(CONTAINER, user_mode=errno.ENOSYS)
    assert hidden.filtered
    assert not replace(hidden, unprivileged_userfaultfd=None).filtered


def test_the_device_gets_past_a_filter() -> None:
    facts = replace(CONTAINER, device=0, api=0, move=0, features=ALL_FEATURES)
    report = examine(facts, HOST)
    assert report.service.level == "full"
    assert finding(report, "seccomp").status == "ok"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"features": ALL_FEATURES & ~probe.FEATURE_MOVE}, "needs Linux 6.8"),
        ({"move": errno.EPERM}, "UFFDIO_MOVE is offered but fails: EPERM"),
    ],
)
def test_the_mover_for_kernels_that_cannot_move(change: dict[str, object], reason: str) -> None:
    facts = replace(ROOT, **change)  # type: ignore[arg-type]
    by_default = probe.service_level(facts, "move")
    assert by_default.level == "none"
    assert reason in by_default.reason
    assert "Linux 6.8" in by_default.remedy
    assert 'Region(mover="protect")' in by_default.remedy
    report = examine(facts, HOST)
    assert (report.service.level, report.exit_code) == ("full", 1)
    assert [each.topic for each in report.shortcomings] == ["mover"]
    mover = finding(report, "mover")
    assert mover.fact.startswith("protect")
    assert "O_DIRECT" in mover.use
    assert finding(examine(ROOT, HOST), "mover").fact == "move"


def test_capabilities_of_a_user_namespace_do_not_count() -> None:
    rootless = replace(NOBODY, capabilities=(1 << 40) - 1, user_namespace=True, container=True)
    level, reason, _ = probe.service_level(rootless)
    assert level == "user_mode_only"
    assert "of a user namespace does not count" in reason


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        ({"features": ALL_FEATURES & ~1, "kernel": "5.6.0"}, "needs Linux 5.7", "Linux 6.8"),
        ({"page_size": 65536}, "65536 bytes", "pages of 4096 bytes"),
        ({"merging": True}, "KSM", "PR_SET_MEMORY_MERGE"),
    ],
)
def test_what_no_right_can_mend(change: dict[str, object], reason: str, remedy: str) -> None:
    report = examine(replace(ROOT, **change), HOST)  # type: ignore[arg-type]
    assert report.service.level == "none"
    assert report.exit_code == 3
    assert reason in report.service.reason
    assert remedy in report.service.remedy


@pytest.mark.parametrize(
    ("code", "sysctl", "reason"),
    [
        (errno.ENOSYS, None, "built without userfaultfd"),
        (errno.EINVAL, 0, "does not know UFFD_USER_MODE_ONLY"),
        (errno.EMFILE, 0, "no descriptor is left"),
        (errno.EACCES, 0, "not by the kernel's rules or seccomp"),
    ],
)
def test_no_descriptor_at_all(code: int, sysctl: int | None, reason: str) -> None:
    facts = replace(NOBODY, user_mode=code, unprivileged_userfaultfd=sysctl, features=0)
    service = probe.service_level(facts)
    assert service.level == "none"
    assert reason in service.reason
    assert service.remedy


def test_without_poison_a_lost_page_blocks_and_the_service_is_limited() -> None:
    report = examine(replace(ROOT, features=ALL_FEATURES & ~probe.FEATURE_POISON), HOST)
    assert report.service.level == "full"
    assert report.exit_code == 1
    poison = finding(report, "poison")
    assert poison.remedy == "needs Linux 6.6"
    assert "blocks" in poison.use


@pytest.mark.parametrize(
    ("change", "topic", "remedy"),
    [
        ({"overcommit": 2}, "vm.overcommit_memory", "vm.overcommit_memory=0"),
        ({"address_limit": 4 * GIB}, "address space", "ulimit -v unlimited"),
        ({"codecs": (Codec("lz4", "", "apt-get install liblz4-1"),)}, "codec lz4", "liblz4-1"),
    ],
)
def test_limits_that_lower_the_service(change: dict[str, object], topic: str, remedy: str) -> None:
    report = examine(ROOT, replace(HOST, **change))  # type: ignore[arg-type]
    assert report.exit_code == 1
    assert [each.topic for each in report.shortcomings] == [topic]
    assert remedy in finding(report, topic).remedy


@pytest.mark.parametrize(
    ("facts", "change", "topic", "use"),
    [
        (ROOT, {"sibling_read": errno.EPERM}, "reading the client", "agent copies"),
        (
            NOBODY,
            {"memory": Memory(16 * GIB, 12 * GIB, None, 2 * GIB, GIB)},
            "locked memory",
            "may swap it",
        ),
        (replace(ROOT, vectored_drop=errno.EINVAL), {}, "process_madvise(2)", "more slowly"),
        (ROOT, {"io_uring": errno.EPERM, "io_uring_disabled": 2}, "io_uring", "not needed"),
        (ROOT, {"zram_devices": (), "zram_loadable": False}, "zram", "bench kernel"),
        (ROOT, {"cgroup_version": 0}, "memory control group", "bench kernel"),
        (ROOT, {"files_limit": 64}, "open files", "descriptors"),
        (ROOT, {"map_count_limit": 1000}, "vm.max_map_count", "mapping"),
    ],
)
def test_what_is_done_without(
    facts: Facts, change: dict[str, object], topic: str, use: str
) -> None:
    report = examine(facts, replace(HOST, **change))  # type: ignore[arg-type]
    assert report.shortcomings == ()
    assert finding(report, topic).status != "ok"
    assert use in finding(report, topic).use


def test_every_failure_names_its_remedy() -> None:
    for facts in (NOBODY, CONTAINER, replace(ROOT, features=0), replace(ROOT, merging=True)):
        report = examine(facts, HOST)
        for each in report.shortcomings:
            assert each.remedy, each


def test_cpu_ranges() -> None:
    assert findings.ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert findings.ranges(()) == ""


def test_the_machine_is_gathered() -> None:
    facts, here = probe.gather(), machine.gather()
    assert facts.kernel
    assert 0 < here.memory.usable <= here.memory.total
    assert here.cpus_usable
    assert here.sibling_read >= 0


def test_the_command_prints_the_schema_and_exits_by_the_service() -> None:
    child = run_child(
        "import sys; from userswap.engine.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    document = json.loads(child.stdout)
    assert document["schema"] == "userswap.doctor/1"
    assert document["exit_code"] == child.returncode
    assert {"level", "reason", "remedy"} == set(document["service"])
    assert document["facts"]["kernel"]
    assert document["machine"]["cpus_usable"]
    for each in document["findings"]:
        assert each["status"] in ("ok", "limited", "missing")


@pytest.mark.privileged
def test_another_user_is_told_what_to_do() -> None:
    # The first call imports everything: the other user may be unable to read this Python.
    code = (
        "import os, sys; from userswap.engine.cli import main; main(['doctor']);"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "sys.exit(main(['doctor', '--problems']))"
    )
    child = run_child(code)
    assert child.stdout.count("result: ") == 2
    ordinary = child.stdout.rpartition("result: ")[2]
    if probe.gather().unprivileged_userfaultfd:
        assert child.returncode == 0
        assert ordinary.startswith("full service")
    else:
        assert child.returncode == 1
        assert "setfacl -m u:65534:rw" in ordinary


FILTERED = """
import ctypes, os, platform, struct, sys
from userswap.engine.cli import main

main(["doctor"])  # imports everything before the rights are given up
if sys.argv[1] == "nobody":
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
userfaultfd = {"x86_64": 323, "aarch64": 282}[platform.machine()]
load, equal, answer = 0x20, 0x15, 0x06
deny, allow = 0x00050001, 0x7FFF0000
steps = [(load, 0, 0, 0), (equal, 0, 1, userfaultfd), (answer, 0, 0, deny), (answer, 0, 0, allow)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, program) == 0, "PR_SET_SECCOMP"
sys.exit(main(["doctor", "--problems"]))
"""


@pytest.mark.privileged
def test_a_real_filter_is_recognised_and_the_device_gets_past_it() -> None:
    child = run_child(FILTERED, args=["root"])
    assert child.returncode == 0, child.stdout + child.stderr
    assert "full service (/dev/userfaultfd opens)" in child.stdout.rpartition("result: ")[2]


@pytest.mark.privileged
def test_a_real_filter_leaves_an_ordinary_user_without_service() -> None:
    child = run_child(FILTERED, args=["nobody"])
    assert child.returncode == 3, child.stdout + child.stderr
    result = " ".join(child.stdout.rpartition("result: ")[2].split())
    assert "no service (a seccomp filter refuses userfaultfd(2))" in result
    assert "remedy:" in result
