"""`userswap set`: change what a pager grants to a program or to one of its regions.

Must not know: how pagers are asked, what they make of it.
"""

from __future__ import annotations

import argparse
import json

from userswap.backends.grammar import format_size
from userswap.engine.errors import ConfigError
from userswap.engine.visitor import ask, pager_of

SCHEMA = "userswap.set/1"
NAMES = ("resident", "weight", "min")

EPILOG = """\
examples:
  userswap set 4711/heap resident=512MiB     the upper limit of one region
  userswap set 4711 min=64MiB weight=2       what a program is promised, and its share of the rest
  userswap set --socket /run/userswap/pager.sock 4711/cache resident=25%

CLIENT is the number of a process, REGION a region's name or number, as `userswap stat` shows them.
Weights and minimums are a daemon's; a program's own pager takes resident= alone.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Change what a pager grants to a program or to one of its regions."
    parser.epilog = EPILOG
    parser.add_argument("what", metavar="CLIENT[/REGION]")
    parser.add_argument("changes", nargs="+", metavar="NAME=VALUE", help="resident, weight or min")
    parser.add_argument("--socket", metavar="PATH", help="the pager's socket, if there are several")


def run(arguments: argparse.Namespace) -> int:
    client, slash, region = arguments.what.partition("/")
    if not client.isdigit() or (slash and not region):
        raise ConfigError(f"{arguments.what!r}: use CLIENT or CLIENT/REGION, such as 4711/heap")
    changes: dict[str, str] = {}
    for text in arguments.changes:
        name, found, value = text.partition("=")
        if not found or name not in NAMES or not value:
            raise ConfigError(f"{text!r}: use {', '.join(f'{each}=VALUE' for each in NAMES)}")
        changes[name] = value
    path = arguments.socket or pager_of(client)
    answer = ask(path, "set", client=client, region=region or None, **changes)
    granted = {name: answer[name] for name in NAMES if name in answer}
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "socket": path, **granted}))
    else:
        shown = [
            f"{name}={value:g}" if name == "weight" else f"{name}={format_size(value)}"
            for name, value in granted.items()
        ]
        print(f"{arguments.what}: {', '.join(shown)}")
    return 0
