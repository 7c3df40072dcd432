"""The `userswap` command: runs a sub-command and turns how it ended into an exit code.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`, imported only when
it is the one asked for: `userswap --help` must not wait for the C core. All have `--json`.

Exit codes: 0 good, 1 what was checked is bad, 2 usage, 3 this machine cannot, 130 and 143 on SIGINT
and SIGTERM, after clean-up.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import userswap
from userswap.engine.errors import ConfigError, UnsupportedError, UserswapError

USAGE_ERROR = 2
UNSUPPORTED = 3
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
PIPE_CLOSED = 128 + signal.SIGPIPE
HELP_COLUMNS = 79

EPILOG = """\
examples:
  userswap doctor                        what this machine can do, and what to change
  userswap demo                          1 GiB of real files in a quarter of the memory, verified
  userswap demo --size 256MiB --store ram:lz4
  userswap bench kernel --json > result.json
  userswap COMMAND --help                all options of one command, with examples

exit codes: 0 good; 1 what was checked is bad; 2 usage; 3 this machine cannot;
            130 and 143 after SIGINT and SIGTERM
"""


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    module: str
    help: str


COMMANDS = (
    Command(
        "demo", "userswap.bench.demo", "page real data through compressed RAM and verify all of it"
    ),
    Command(
        "doctor", "userswap.engine.doctor", "what this kernel and user may do, and the remedies"
    ),
)
BENCHES = (
    Command(
        "kernel", "userswap.bench.kernel", "compare with kernel swap on zram, at the same memory"
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        parsed = make_parser(arguments).parse_args(arguments)
        code: int = parsed.run(parsed)
        return code

    return guard(command)


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for this command line: only the command that it names is imported."""
    parser = argparse.ArgumentParser(
        prog="userswap",
        description=(
            "Swap in user space: memory paged to a store of your choice, "
            "within a budget of your choice."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"userswap {userswap.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    words = [word for word in argv if not word.startswith("-")]
    for command in COMMANDS:
        _add(commands, command, words[:1] == [command.name])
    bench = commands.add_parser(
        "bench",
        help="measure userswap against what it replaces",
        description="Measure userswap against what it replaces.",
    )
    benches = bench.add_subparsers(title="benches", metavar="BENCH", required=True)
    for command in BENCHES:
        _add(benches, command, words[:2] == ["bench", command.name])
    return parser


def _add(commands: Any, command: Command, wanted: bool) -> None:
    parser = commands.add_parser(
        command.name,
        help=command.help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document with a versioned schema"
    )
    if wanted:
        module = importlib.import_module(command.module)
        module.add_arguments(parser)
        paragraphs = (parser.description or "").split("\n\n")
        parser.description = "\n\n".join(textwrap.fill(text, HELP_COLUMNS) for text in paragraphs)
        parser.set_defaults(run=module.run)


def guard(command: Callable[[], int]) -> int:
    """Run a command with its signals and errors turned into exit codes."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("userswap: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except SystemExit as leaving:  # argparse has printed its help or a usage error, or SIGTERM
        return leaving.code if isinstance(leaving.code, int) else USAGE_ERROR
    except Exception as error:
        failure = exit_code(error)
        if failure is None:
            raise
        print(f"userswap: {error}", file=sys.stderr)
        return failure
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code


def exit_code(error: Exception) -> int | None:
    """The exit code for an error that is the user's or the machine's; None for our own mistakes."""
    from userswap.backends.grammar import GrammarError

    if isinstance(error, GrammarError | ConfigError):
        return USAGE_ERROR
    if isinstance(error, UnsupportedError):
        return UNSUPPORTED
    return 1 if isinstance(error, UserswapError) else None


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
