"""`userswap bench nvme` measures what it says, in every placement that this machine has."""

import json
import os

import pytest

from userswap.bench import nvme_bench
from userswap.engine import cli


def test_the_comparison(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvme_bench, "FAULT_BYTES", 8 << 20)
    argv = ["bench", "nvme", "--repetitions", "2", "--reads", "1000", "--json"]
    before = os.sched_getaffinity(0)
    assert cli.main(argv) == 0
    assert os.sched_getaffinity(0) == before
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == nvme_bench.SCHEMA
    names = [place.name for place in nvme_bench.placements(sorted(before))]
    assert [each["name"] for each in document["placements"]] == names
    for each in document["placements"]:
        assert set(each["medians"]) >= {"raw", "loop 1", "store 1", "loop 32", "store 32"}
        assert all(0 < m["p50"] <= m["p99"] <= m["p999"] for m in each["medians"].values())
    assert all(each["faults"] > 0 and not each["bad_pages"] for each in document["faults"])
    assert "faults, one CPU" in nvme_bench.as_text(document)
