"""A third party's store: the README's, installed as a package of its own and found by its name."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from userswap.backends.conformance import CHECKS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "tests" / "example"

PAGED = """
import random, userswap
data = random.Random(1).randbytes(8 << 20)
with userswap.Region("8MiB", resident="2MiB", store="sqlite:{path}") as region:
    region.memory[:] = data
    region.flush()
    assert bytes(region.memory) == data
    assert region.stats().faults_awaited > 0
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of whoever has installed the example."""
    place = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "userswap_sqlite.py"):
        (source / name).write_bytes((EXAMPLE / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--target", str(place), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=100, cwd=source)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path}


def run(installed: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=100, env=installed
    )


def test_the_readme_shows_the_example_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## A store of your own\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    shown = {
        language: [text for kind, text in blocks if kind == language] for language, _ in blocks
    }
    assert shown["python"][0] == (EXAMPLE / "userswap_sqlite.py").read_text()
    assert shown["python"][1] == (EXAMPLE / "test_sqlite.py").read_text()
    assert shown["toml"][0] == (EXAMPLE / "pyproject.toml").read_text()


def test_it_conforms_by_its_own_three_lines(installed: Mapping[str, str]) -> None:
    pytest_command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    done = run(installed, *pytest_command, str(EXAMPLE / "test_sqlite.py"))
    assert done.returncode == 0, done.stdout
    assert re.search(rf"\b{len(CHECKS)} passed\b", done.stdout)


def test_it_is_listed_with_its_provider(installed: Mapping[str, str]) -> None:
    done = run(installed, "-m", "userswap", "store", "list")
    assert re.search(r"^  sqlite: .*from userswap-sqlite", done.stdout, re.MULTILINE)


def test_memory_is_paged_to_it(installed: Mapping[str, str], tmp_path: Path) -> None:
    done = run(installed, "-c", PAGED.format(path=tmp_path / "db"))
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_checked_and_leaves_nothing(installed: Mapping[str, str], tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/db"
    done = run(installed, "-m", "userswap", "store", "check", url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed  what was flushed survives" in done.stdout
    assert "passed  opened by one at a time" in done.stdout
    done = run(installed, "-m", "userswap", "store", "list", url)
    assert "is blank" in done.stderr
