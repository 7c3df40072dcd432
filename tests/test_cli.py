"""The command line: help, usage errors, exit codes, signals; what commands do is elsewhere."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import userswap
from userswap.backends.grammar import GrammarError
from userswap.engine import cli
from userswap.engine.errors import ConfigError, UnsupportedError, UserswapError

COMMAND = [sys.executable, "-m", "userswap"]


def userswap_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_teaches_every_command_with_examples() -> None:
    child = userswap_command("--help")
    assert child.returncode == 0
    assert "examples:" in child.stdout
    assert "exit codes:" in child.stdout
    for command in cli.COMMANDS:
        assert command.help.split()[0] in child.stdout


GROUPED = [[name, each.name] for name, group in cli.GROUPS.items() for each in group.members]


@pytest.mark.parametrize(
    "command", [*([each.name] for each in cli.COMMANDS), *GROUPED], ids=" ".join
)
def test_every_command_has_help_with_examples_and_json(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "examples:" in out


@pytest.mark.parametrize("group", cli.GROUPS)
def test_a_group_alone_shows_what_is_in_it(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([group]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert cli.main([group, "--help"]) == 0
    assert shown.err == capsys.readouterr().out
    assert "examples:" in shown.err
    assert all(f"\n    {command.name} " in shown.err for command in cli.GROUPS[group].members)


def test_a_store_that_cannot_be_is_named_once() -> None:
    child = userswap_command("bench", "stores", "ram:lz5")
    assert child.returncode == 2
    place = "(character 1 of 'ram:lz5')"
    assert (
        child.stderr == f"userswap: store: ram: unknown codec 'lz5'; did you mean 'lz4'? {place}\n"
    )


def test_the_unit_file_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--print-unit"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["serve", "--print-unit", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "userswap.unit/1"
    assert document["unit"] == text


def test_the_module_is_the_command_too() -> None:
    module = [sys.executable, "-m", "userswap.engine.cli", "--version"]
    child = subprocess.run(module, capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (0, f"userswap {userswap.__version__}\n")


def test_help_does_not_wait_for_the_c_core() -> None:
    code = (
        "import sys; from userswap.engine.cli import main; main(['--help']);"
        "sys.exit('userswap.native' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version() -> None:
    child = userswap_command("--version")
    assert child.stdout == f"userswap {userswap.__version__}\n"
    assert child.returncode == 0


@pytest.mark.parametrize(
    "arguments", [[], ["bench"], ["nonsense"], ["doctor", "--nonsense"], ["--nonsense"]]
)
def test_usage_errors_are_2(arguments: list[str]) -> None:
    child = userswap_command(*arguments)
    assert child.returncode == 2
    assert child.stderr.startswith("usage: userswap")
    assert child.stdout == ""


@pytest.mark.parametrize("number", ["0", "-3", "x", "1.5", "1001", "9" * 5000])
def test_a_number_out_of_bounds_is_told_in_the_users_words(number: str) -> None:
    child = userswap_command("bench", "kernel", f"--repetitions={number}")
    assert child.returncode == 2
    assert f"--repetitions: '{number}' is not an integer from 1 to 1000" in child.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserswapError("bad"), 1),
        (ConfigError("bad"), 2),
        (GrammarError("bad"), 2),
        (UnsupportedError("bad"), 3),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert cli.guard(fail) == code
    assert capsys.readouterr().err == "userswap: bad\n"


def test_our_own_mistakes_keep_their_traceback() -> None:
    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guard(fail)


def test_interrupts_are_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert cli.guard(interrupted) == 130
    assert capsys.readouterr().err == "userswap: interrupted\n"


def test_sigterm_is_143_after_clean_up() -> None:
    cleaned = []

    def terminated() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert cli.guard(terminated) == 143
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        child = subprocess.run(
            [*COMMAND, "doctor"], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert child.returncode == 141
    assert child.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["--help"], ["--version"]])
def test_output_that_finds_no_room_is_one_line(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as stdout:
        child = subprocess.run(
            [*COMMAND, *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert child.returncode == 3
    said = "userswap: standard output cannot be written: No space left on device\n"
    assert child.stderr == said


def test_more_output_than_a_buffer_holds_finds_no_room() -> None:
    code = (
        "import sys; from userswap.engine import cli;"
        "sys.exit(cli.guard(lambda: print('x' * 99999)))"
    )
    with open("/dev/full", "w") as stdout:
        child = subprocess.run(
            [sys.executable, "-c", code],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (child.returncode, child.stderr.count("\n")) == (3, 1), child.stderr


@pytest.mark.parametrize(
    ("redirections", "code", "said"),
    [
        (">&-", 3, "userswap: standard output is closed\n"),
        (">&- 2>&-", 3, ""),
        (">/dev/full 2>/dev/full", 3, ""),
        ("2>&-", None, ""),
    ],
)
def test_closed_standard_streams(redirections: str, code: int | None, said: str) -> None:
    line = f"{shlex.join(COMMAND)} doctor {redirections}"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    child = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=60, env=buffered
    )
    assert child.returncode == code or (code is None and child.returncode in (0, 1, 3))
    assert child.stderr == said


def test_both_streams_in_a_pipe_whose_reader_leaves(tmp_path: Path) -> None:
    status = tmp_path / "status"
    line = (
        f"({shlex.join(COMMAND)} demo --size 8MiB; echo $? >{status}) 2>&1 | head -c 1 >/dev/null"
    )
    subprocess.run(["sh", "-c", line], timeout=60, check=True)
    assert status.read_text() == "141\n"


def test_an_error_of_our_own_is_no_full_disk() -> None:
    def fail() -> int:
        raise OSError(5, "of our own")

    with pytest.raises(OSError, match="of our own"):
        cli.guard(fail)


def test_the_console_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("userswap")
    if not script.exists():
        script = Path(sys.prefix, "bin", "userswap")
    child = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert child.stdout == f"userswap {userswap.__version__}\n"
