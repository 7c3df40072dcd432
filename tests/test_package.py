"""What is built for others to install: an sdist that builds, and a wheel with everything in it."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(300)  # the core is compiled once, which a busy machine makes slow
FOLDERS = ("engine", "backends", "native", "bench")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: what the build needs is installed here, and nothing is fetched.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    build = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert build.returncode == 0, build.stdout + build.stderr
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def modules_on_disk() -> set[str]:
    """The paths in a wheel of every Python file of the package."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT)
            public = inside.parts[:2] == ("engine", "userswap")
            found.add("/".join(("userswap", *inside.parts[2 if public else 0 :])))
    return found


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == modules_on_disk()
    assert {"userswap/py.typed", "userswap/native/_core.pyi"} <= names
    assert "userswap/native/_core.abi3.so" in names
    for name in names:
        assert name.startswith(("userswap/", f"userswap-{version('userswap')}.dist-info/")), name


def test_the_wheel_serves_every_python_from_the_oldest_on(built: tuple[Path, Path]) -> None:
    assert "-cp311-abi3-linux_" in built[1].name


def test_the_sdist_holds_the_c_core(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    core = [path for path in (ROOT / "native").rglob("*") if path.suffix in (".c", ".h")]
    assert {path.relative_to(ROOT).as_posix() for path in core} <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "native/_build.py"} <= names


def test_the_version_is_one() -> None:
    code = "import userswap; print(userswap.__version__)"
    command = [sys.executable, "-P", "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.strip() == version("userswap")


def test_commands_and_stores_are_declared() -> None:
    (script,) = entry_points(group="console_scripts", name="userswap")
    assert script.value == "userswap.engine.cli:main"
    assert {"memory", "ram"} <= entry_points(group="userswap.stores").names
