"""The `userswap` command: runs a sub-command and turns how it ended into an exit code.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`, imported only when
it is the one asked for: `userswap --help` must not wait for the C core. All have `--json`.

Exit codes: 0 good, 1 what was checked is bad, 2 usage, 3 this machine cannot (or standard output
takes nothing: closed, or the disk is full), 130 and 143 on SIGINT and SIGTERM, after clean-up, 141
when the reader of our output has left.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

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
  userswap store list                    the stores and filters that there are
  userswap store explain checksum::file:/var/lib/swap
  userswap serve --socket /run/u.sock --resident 4GiB --store fast=ram:lz4
  userswap nvme export --store ram:lz4 --size 4GiB
  userswap stat                          the pagers of this user, their clients and regions
  userswap COMMAND --help                all options of one command, with examples

exit codes: 0 good; 1 what was checked is bad; 2 usage; 3 this machine cannot, or
            standard output takes nothing; 130, 141 and 143 after SIGINT, SIGPIPE
            and SIGTERM
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
    Command("stat", "userswap.engine.status", "what pagers serve: programs, regions, memory"),
    Command("set", "userswap.engine.adjust", "change what a pager grants to a program or region"),
    Command("serve", "userswap.engine.serve", "one pager for many programs, within one budget"),
    Command(
        "doctor", "userswap.engine.doctor", "what this kernel and user may do, and the remedies"
    ),
)
BENCHES = (
    Command(
        "kernel", "userswap.bench.kernel", "compare with kernel swap on zram, at the same memory"
    ),
    Command("stores", "userswap.bench.stores", "compare stores under a region, on real data"),
    Command("nvme", "userswap.bench.nvme_bench", "what our NVMe/TCP host costs over loopback"),
)
STORE_COMMANDS = (
    Command("list", "userswap.engine.store_list", "stores and filters; or the extents of a volume"),
    Command("explain", "userswap.engine.store_explain", "what a stack guarantees, layer by layer"),
    Command("check", "userswap.bench.store_check", "put a store to the conformance suite"),
    Command("bench", "userswap.bench.store_bench", "measure a store alone"),
    Command("format", "userswap.engine.store_format", "make an empty volume of a medium"),
)
NVME_COMMANDS = (
    Command("export", "userswap.engine.nvme_export", "let other machines page to a store of ours"),
    Command("discover", "userswap.engine.nvme_discover", "what a target offers to this host"),
)


@dataclass(frozen=True, slots=True)
class Group:
    metavar: str
    help: str
    members: tuple[Command, ...]
    examples: str


TRACE_COMMANDS = (
    Command("simulate", "userswap.engine.trace_simulate", "every policy and budget, and advice"),
    Command("show", "userswap.engine.trace_show", "what a trace has"),
    Command(
        "import", "userswap.engine.trace_import", "take a trace in libCacheSim's oracleGeneral"
    ),
    Command("export", "userswap.engine.trace_export", "write one in libCacheSim's oracleGeneral"),
)
GROUPS = {
    "bench": Group(
        "BENCH",
        "measure userswap against what it replaces",
        BENCHES,
        "  userswap bench kernel --repetitions 3\n  userswap bench stores ram:zstd 'lmdb:{dir}'",
    ),
    "store": Group(
        "WHAT",
        "look at, check, measure and format stores",
        STORE_COMMANDS,
        "  userswap store list\n"
        "  userswap store explain checksum::file:/var/lib/swap\n"
        "  userswap store check --help",
    ),
    "nvme": Group(
        "WHAT",
        "stores of other machines, over NVMe/TCP",
        NVME_COMMANDS,
        "  userswap nvme export --store ram:lz4 --size 4GiB\n"
        "  userswap nvme discover 127.0.0.1:4420",
    ),
    "trace": Group(
        "WHAT",
        "find out from traces which policy and how much memory a program wants",
        TRACE_COMMANDS,
        "  userswap trace simulate run.trace --resident 10%..90% --store-latency 80us",
    ),
}


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
    for name, group in GROUPS.items():
        members = commands.add_parser(
            name,
            help=group.help,
            description=f"{group.help[0].upper()}{group.help[1:]}.",
            epilog=f"examples:\n{group.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        members.set_defaults(run=functools.partial(_show_members, members))
        choices = members.add_subparsers(title=f"{name} commands", metavar=group.metavar)
        for command in group.members:
            _add(choices, command, words[:2] == [name, command.name])
    return parser


def _show_members(group: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """A group's name alone asks for nothing that could be done, and may well ask what there is."""
    group.print_help(sys.stderr)
    return USAGE_ERROR


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


class _OutputError(Exception):
    """Standard output does not take what is printed; any other OSError is something else's."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output cannot be written: {cause.strerror}")
        # 1 would speak of what was checked; whoever read from a pipe and left knows it.
        self.code = PIPE_CLOSED if isinstance(cause, BrokenPipeError) else UNSUPPORTED


class _Output:
    """Standard output, its errors told from all others."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _OutputError(error) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise _OutputError(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard(command: Callable[[], int]) -> int:
    """Run a command with its signals and errors turned into exit codes."""
    if sys.stdout is None:  # closed by whoever started us; found out before any work
        _say("standard output is closed")
        return UNSUPPORTED
    stdout = _Output(sys.stdout)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with contextlib.redirect_stdout(cast(TextIO, stdout)):
            code = _run(command)
            stdout.flush()
    except _OutputError as error:
        if error.code != PIPE_CLOSED:
            _say(str(error))
        _forget_output(sys.stdout)
        return error.code
    except BrokenPipeError:  # the reader of standard error has left
        _forget_output(sys.stderr)
        return PIPE_CLOSED
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code


def _forget_output(stream: TextIO) -> None:
    """What is left in a buffer is flushed again at the interpreter's end, which must be quiet."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except SystemExit as leaving:  # argparse has printed its help or a usage error, or SIGTERM
        return leaving.code if isinstance(leaving.code, int) else USAGE_ERROR
    except _OutputError:
        raise
    except Exception as error:
        failure = exit_code(error)
        if failure is None:
            raise
        _say(str(error))
        return failure


def _say(line: str) -> None:
    """Tell the user, where there is a standard error that takes it."""
    if sys.stderr is None:
        return
    try:
        print(f"userswap: {line}", file=sys.stderr, flush=True)
    except OSError:
        _forget_output(sys.stderr)


def exit_code(error: Exception) -> int | None:
    """The exit code for an error that is the user's or the machine's; None for our own mistakes."""
    from userswap.backends.grammar import GrammarError
    from userswap.backends.store import StoreError

    if isinstance(error, GrammarError | ConfigError):
        return USAGE_ERROR
    if isinstance(error, UnsupportedError):
        return UNSUPPORTED
    return 1 if isinstance(error, UserswapError | StoreError) else None


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
