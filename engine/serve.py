"""`userswap serve`: one pager for many programs, until it is told to end.

Responsible for: the command line, the process (signals, limits, log), and telling systemd. What it
serves and on which terms is the daemon's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import resource
import signal
from collections.abc import Sequence
from importlib import resources

from userswap.backends import registry
from userswap.backends.grammar import GrammarError, format_size, parse_size
from userswap.engine import listening
from userswap.engine.budget import FLOOR, Budget
from userswap.engine.daemon import Daemon, Limits
from userswap.engine.drain import Drain
from userswap.engine.errors import ConfigError
from userswap.engine.notify import notify, watchdog_period
from userswap.engine.pager import settle_process

SCHEMA = "userswap.serve/1"
UNIT_SCHEMA = "userswap.unit/1"
UNIT = "userswap-serve.service"
CLIENT_MIN = "16MiB"
BYTES_TIMES = 16
"""A user's regions may come to so many times the budget."""
DESCRIPTORS_PER_CLIENT = 20

EPILOG = """\
examples:
  userswap serve --socket /run/user/1000/swap.sock --resident 4GiB --store fast=ram:lz4
  userswap serve --resident 4GiB --store fast=ram:lz4 --store deep=ram:zstd
  userswap serve --print-unit > /etc/systemd/system/userswap-serve.service

A program then uses userswap.Region(..., pager="/run/user/1000/swap.sock", store="fast").
SIGTERM ends the daemon gently: no new clients; regions that fit in memory are given back to their
programs as ordinary memory; the others are served until their programs close them.
"""

log = logging.getLogger("userswap.pager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve the regions of many programs within one budget.\n\nPrograms name the stores that "
        "are declared here; each program has its own pages in them, and a pool of its own."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--socket", metavar="PATH", help="where to listen (systemd's socket, if it passes one)")
    add("--resident", metavar="SIZE", help="memory that all regions together may have uncompressed")
    add("--store", action="append", default=[], metavar="NAME=URL", help="a store to offer; again")
    add("--client-min", default=CLIENT_MIN, metavar="SIZE", help="promised to each (%(default)s)")
    add(
        "--user-clients", type=int, default=64, metavar="N", help="programs of a user (%(default)s)"
    )
    add("--user-regions", type=int, default=256, metavar="N", help="regions of one (%(default)s)")
    add("--user-bytes", metavar="SIZE", help="their sizes together (16 times --resident)")
    add("--mode", default="0600", help="who may connect, as file permissions (%(default)s)")
    add("--print-unit", action="store_true", help="print a unit file for systemd and end")


def run(arguments: argparse.Namespace) -> int:
    if arguments.print_unit:
        unit = resources.files("userswap.engine").joinpath(UNIT).read_text()
        print(
            json.dumps({"schema": UNIT_SCHEMA, "name": UNIT, "unit": unit})
            if arguments.json
            else unit.rstrip("\n")
        )
        return 0
    budget, limits = _figures(arguments)
    stores = declared(arguments.store)
    listener = listening.passed()
    if listener is None:
        if not arguments.socket:
            raise ConfigError("--socket PATH: where shall programs find this pager?")
        listener = listening.listen(arguments.socket, _mode(arguments.mode))
    settle_process("userswap-serve", [signal.SIGHUP, signal.SIGPIPE])
    logging.getLogger("userswap.pager").setLevel(logging.INFO)
    link = listening.announce(listener.path, f"serve-{os.getpid()}.sock")
    try:
        asyncio.run(_serve(Daemon(listener, stores, budget, limits), arguments.json))
    finally:
        listener.close()
        if link is not None:
            link.unlink(missing_ok=True)
    return 0


def declared(texts: Sequence[str]) -> dict[str, str]:
    """The operator's stores by name; raises ConfigError."""
    stores: dict[str, str] = {}
    for text in texts:
        name, found, url = text.partition("=")
        if not found or not name or not name.isprintable() or "/" in name or ":" in name:
            raise ConfigError(f"--store {text!r}: use NAME=URL, such as fast=ram:lz4")
        if name in stores:
            raise ConfigError(f"--store {text!r}: {name} is declared already")
        try:
            registry.parse(url)
        except GrammarError as error:
            raise ConfigError(f"--store {text!r}: {error}") from None
        stores[name] = url
    if not stores:
        raise ConfigError("--store NAME=URL: declare at least one, such as fast=ram:lz4")
    return stores


def _figures(arguments: argparse.Namespace) -> tuple[Budget, Limits]:
    if not arguments.resident:
        raise ConfigError("--resident SIZE: how much memory may all regions have?")
    total = _size("--resident", arguments.resident)
    minimum = _size("--client-min", arguments.client_min)
    if total < FLOOR or minimum > total:
        raise ConfigError(
            f"--resident {format_size(total)}: use at least {format_size(max(minimum, FLOOR))}"
        )
    held = total * BYTES_TIMES
    if arguments.user_bytes:
        held = _size("--user-bytes", arguments.user_bytes)
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(descriptors // DESCRIPTORS_PER_CLIENT, 1)
    for name in ("user_clients", "user_regions"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: use 1 or more")
    return Budget(total, minimum), Limits(
        min(arguments.user_clients, room), arguments.user_regions, held
    )


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except GrammarError as error:
        raise ConfigError(f"{option}: {error}") from None


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777 or mode & 0o600 != 0o600:
        raise ConfigError(f"--mode {text}: use file permissions such as 0600 or 0660")
    return mode


async def _serve(daemon: Daemon, as_json: bool) -> None:
    loop = asyncio.get_running_loop()
    drain = Drain(daemon)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain.ask)
    await daemon.try_stores()
    daemon.start()
    gc.freeze()  # what start-up made stays: collections look only at what came since
    where = daemon.listener.path
    if as_json:
        print(json.dumps({"schema": SCHEMA, "socket": where, "pid": os.getpid()}), flush=True)
    log.info("pager %d serves %s at %s", os.getpid(), ", ".join(daemon.stores), where)
    notify(READY="1", STATUS="serving")
    beat = asyncio.create_task(_beat())
    await drain.finished.wait()
    beat.cancel()
    await daemon.stop()
    notify(STATUS="ended")


async def _beat() -> None:
    period = watchdog_period()
    while period is not None:
        notify(WATCHDOG="1")
        await asyncio.sleep(period)
