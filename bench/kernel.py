"""`userswap bench kernel`: userswap against the kernel's swap on zram, and against a bare C loop.

Composition only: options, the order of things, exit codes. What is compared is in bench/cases.py,
how in bench/measure.py. Exit codes: 0 all pages verified and all runs valid, 1 not so, 3 this
machine or this moment cannot (another run, no rights, no zram). Goals that are missed are shown,
they do not make the measurement a bad one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from userswap.backends.grammar import GrammarError, format_size, parse_size
from userswap.bench import baseline, idle, sample
from userswap.bench.arguments import whole_number
from userswap.bench.baseline import RefusalError, Rig
from userswap.bench.cases import AGAINST_BARE, AGAINST_KERNEL, CASES, Case
from userswap.bench.journal import BusyError, Journal
from userswap.bench.measure import CaseMeasurement, Options, touching_cpus
from userswap.bench.report import CaseResult, Result, as_json, as_text
from userswap.bench.session import ToucherError
from userswap.engine import machine, probe
from userswap.native import lib

SIDES = ("userswap", "kernel", "bare")
IDLE = "idle"
SIZE_MIN = 8 << 20
"""Smaller, and a budget of half has no room for what is on its way out."""
GROUPS: dict[str, tuple[Case, ...]] = {
    "all": CASES,
    "kernel": AGAINST_KERNEL,
    "bare": AGAINST_BARE,
}
QUICK_SIZE, QUICK_REPETITIONS = "128MiB", 2
FULL_SIZE, FULL_REPETITIONS = "512MiB", 5
REPETITIONS_MAX = 1000
"""Days of measuring: more is a slip of the hand."""
CANNOT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run one touching program over memory paged by userswap (ram:lz4) and over memory under "
        "the kernel's swap on zram (lz4), at the same total memory, in turns; and over a bare C "
        "loop, the limit. Needs root: it sets up zram, swap and a control group, and puts all of "
        "it back, after kill -9 at the next start."
    )
    parser.epilog = (
        f"cases: {' '.join(case.name for case in CASES)} {IDLE}\n"
        f"groups: {' '.join(GROUPS)}\n\n"
        "exit code: 0 measured and every page verified, 1 not so, 3 this machine cannot\n\n"
        "examples:\n"
        "  userswap bench kernel\n"
        "  userswap bench kernel --quick --cases random-read fill\n"
        "  userswap bench kernel --size 1GiB --resident 25% --json > result.json"
    )
    parser.add_argument("--size", help=f"of the memory that is touched (default: {FULL_SIZE})")
    parser.add_argument(
        "--resident", default="50%", help="of it uncompressed, at most (default: 50%%)"
    )
    parser.add_argument(
        "--repetitions",
        type=whole_number(1, REPETITIONS_MAX),
        help=f"of each case (default: {FULL_REPETITIONS})",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["all"],
        metavar="CASE",
        choices=[*GROUPS, IDLE, *(case.name for case in CASES)],
        help="cases or groups of cases (default: all)",
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        default=list(SIDES),
        choices=SIDES,
        help="measure only these sides, to look at one of them (default: all)",
    )
    parser.add_argument(
        "--data",
        default="records",
        choices=sample.DATA,
        help="made-up records or the files of this Python installation (default: records)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SIZE} and {QUICK_REPETITIONS} repetitions: a look, not a measurement",
    )


def run(arguments: argparse.Namespace) -> int:
    options = make_options(arguments)
    previous = signal.signal(signal.SIGHUP, _hang_up)
    try:
        result = _compare(options, arguments.cases)
    except (RefusalError, BusyError) as error:
        print(f"userswap: {error}", file=sys.stderr)
        return CANNOT
    finally:
        signal.signal(signal.SIGHUP, previous)
    print(json.dumps(as_json(result)) if arguments.json else as_text(result))
    return 1 if result.problems else 0


def _compare(options: Options, wanted: Sequence[str]) -> Result:
    """Nothing is changed on the machine before all that can refuse has been asked."""
    hierarchy = baseline.require()
    _require_service(options)
    journal = Journal()
    try:
        for line in baseline.restore(journal):
            progress(f"left by an interrupted run: {line}")
        with Rig(journal, hierarchy, options.size) as rig:
            return measure(rig, options, wanted)
    finally:
        journal.close()


def make_options(arguments: argparse.Namespace) -> Options:
    size_text = arguments.size or (QUICK_SIZE if arguments.quick else FULL_SIZE)
    repetitions = QUICK_REPETITIONS if arguments.quick else FULL_REPETITIONS
    size = parse_size(size_text) // sample.PAGE * sample.PAGE
    if size < SIZE_MIN:
        raise GrammarError(f"--size {size_text}: at least {format_size(SIZE_MIN)}")
    return Options(
        size=size,
        resident=parse_size(arguments.resident, whole=size),
        repetitions=arguments.repetitions or repetitions,
        data=arguments.data,
        sides=tuple(arguments.sides),
        cpus=tuple(sorted(os.sched_getaffinity(0))),
    )


def _require_service(options: Options) -> None:
    """Userswap's side needs the kernel's full service, before anything is set up for it."""
    service = probe.service_level(probe.gather())
    if "userswap" in options.sides and service.level != "full":
        raise RefusalError(service.reason, service.remedy)


def measure(rig: Rig, options: Options, wanted: Sequence[str]) -> Result:
    result = Result(
        machine=machine.gather(),
        kernel=platform.release(),
        governor=_governor(options.cpus[0]),
        clock_ns=lib.us_touch_clock_cost() / 1000,
        zram=rig.device,
        options=options,
    )
    for case in chosen(wanted):
        if not options.contenders(case):
            continue
        measurement = CaseMeasurement(case, options, rig)
        each = CaseResult(case, touching_cpus(case, options.cpus))
        result.cases.append(each)
        each.calibration, each.runs = measurement.calibration, measurement.runs
        try:
            measurement.measure(progress)
        except ToucherError as error:
            each.error = str(error)
            progress(f"{case.title}: {error}")
    if "userswap" in options.sides and {"all", IDLE} & set(wanted):
        progress("the pager at rest")
        try:
            result.idle = idle.measure(rig, options)
        except ToucherError as error:
            result.idle_error = str(error)
    return result


def chosen(wanted: Sequence[str]) -> list[Case]:
    """The cases that are named, alone or by a group, in the order of the table."""
    names = {case.name for name in wanted for case in GROUPS.get(name, ())} | set(wanted)
    return [case for case in CASES if case.name in names]


def _governor(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor")
    return (probe.read_text(path) or "unknown").strip()


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _hang_up(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
