"""What every test gets: a seed that is printed, skips that CI does not accept, no core files."""

import os
import resource
import zlib
from collections.abc import Generator

import hypothesis
import pytest

from packages import CANNOT_BE_HAD
from userswap.backends.nvme_tcp import controller, qpair
from userswap.backends.nvme_tcp.native_queue import NativeQueuePair

collect_ignore = ["example"]  # another package, whose tests run where it is installed
NO_SKIP = os.environ.get("USERSWAP_NO_SKIP", "") not in ("", "0")

# One history per test, the same on every machine; a slow machine's answers are as good.
hypothesis.settings.register_profile("userswap", deadline=None, derandomize=True)
hypothesis.settings.load_profile("userswap")

# Tests make processes die on purpose.
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, the same in every run; USERSWAP_SEED replaces it."""
    value = int(os.environ.get("USERSWAP_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"seed {value} (USERSWAP_SEED={value} repeats it)")
    return value


@pytest.fixture(params=(qpair.QueuePair, NativeQueuePair), ids=("python", "native"))
def queue_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Which queue pair NVMe's controllers have, and what the test module calls `QueuePair`."""
    kind: type[qpair.QueuePair] = request.param
    monkeypatch.setattr(controller, "QueuePair", kind)
    monkeypatch.setattr(controller, "NativeQueuePair", kind)
    monkeypatch.setattr(request.module, "QueuePair", kind)
    return kind


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("privileged"):
            item.add_marker(pytest.mark.skip(reason=f"privileged: {item.name} needs root"))


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A machine that cannot have what a test needs is told of in the summary, and is no failure."""
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        if CANNOT_BE_HAD in str(report.longrepr):
            return
        report.outcome = "failed"
        report.longrepr = f"skipped, where no test may be: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report
