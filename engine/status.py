"""`userswap stat`: what pagers serve, as a tree of pagers, clients and regions.

Must not know: how pagers are asked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import userswap
from userswap.backends.grammar import format_size
from userswap.engine.control import Message
from userswap.engine.errors import PagerError, UserswapError
from userswap.engine.visitor import look, pagers

SCHEMA = "userswap.stat/1"
COLUMNS = ("NAME", "PID", "STORE", "SIZE", "LIMIT", "RESIDENT", "STORED", "POOL", "FAULTS", "P99")
LEFT = ("NAME", "STORE")
CLEAR = "\x1b[H\x1b[2J"

EPILOG = """\
examples:
  userswap stat                           every pager of this user
  userswap stat --socket /run/userswap/pager.sock --watch 2
  userswap stat --pid 4711 --json

LIMIT is what a region may keep in memory at the moment, RESIDENT what it does; STORED is what is
out, POOL the memory that compressed pages take (for all regions that share the pool); P99 is of the
faults that were answered from memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show pagers, the programs that they serve, and their regions."
    parser.epilog = EPILOG
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="a daemon's socket")
    where.add_argument("--pid", type=int, metavar="PID", help="only this program")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=1.0, metavar="SECONDS", help="again and again"
    )


def run(arguments: argparse.Namespace) -> int:
    while True:
        found = gather(arguments.socket, arguments.pid)
        if arguments.json:
            document = {"schema": SCHEMA, "version": userswap.__version__, "pagers": found}
            print(json.dumps(document, indent=None if arguments.watch else 2))
        else:
            lead = CLEAR if arguments.watch and sys.stdout.isatty() else ""
            print(lead + (as_text(found) or "no pager of this user serves anything"))
        if arguments.pid is not None and not found:
            raise UserswapError(f"no pager of this user serves process {arguments.pid}")
        if not arguments.watch:
            return 0
        sys.stdout.flush()
        time.sleep(arguments.watch)


def gather(socket: str | None, pid: int | None) -> list[Message]:
    """What each pager shows; with `pid` only those that serve that process, and nothing else."""
    found = []
    for path in pagers(socket):
        try:
            pager = look(path)
        except PagerError:
            if socket is not None:
                raise
            continue  # it has just ended
        if pid is not None:
            pager["clients"] = [each for each in pager["clients"] if each["pid"] == pid]
            if not pager["clients"]:
                continue
        found.append(pager)
    return found


def as_text(found: list[Message]) -> str:
    if not found:
        return ""
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True))]
    for pager in found:
        rows += _pager_rows(pager)
    widths = {name: max(len(row.get(name, "")) for row in rows) for name in COLUMNS}

    def cell(row: dict[str, str], name: str) -> str:
        text = row.get(name, "")
        return f"{text:{widths[name]}}" if name in LEFT else f"{text:>{widths[name]}}"

    lines = ["  ".join(cell(row, name) for name in COLUMNS) for row in rows]
    return "\n".join(
        f"{line}  {row['STATE']}" if row.get("STATE") else line.rstrip()
        for line, row in zip(lines, rows, strict=True)
    )


def _pager_rows(pager: Message) -> list[dict[str, str]]:
    regions = [region for client in pager["clients"] for region in client["regions"]]
    kept = sum(region["resident_bytes"] + region["kept_bytes"] for region in regions)
    head = {"NAME": f"{pager['kind']} {pager['socket']}", "PID": str(pager["pid"])}
    if pager.get("resident"):
        head["LIMIT"] = format_size(pager["resident"])
    rows = [head | {"RESIDENT": format_size(kept), "STATE": "ending" * bool(pager.get("ending"))}]
    for client in pager["clients"]:
        last = client is pager["clients"][-1]
        notes = []
        if "min" in client:
            notes = [f"min {format_size(client['min'])}", f"weight {client['weight']:g}"]
        rows.append(
            {
                "NAME": ("└─" if last else "├─") + client["name"],
                "PID": str(client["pid"]),
                "STATE": ", ".join(notes),
            }
        )
        for region in client["regions"]:
            stem = "  " if last else "│ "
            branch = "└─" if region is client["regions"][-1] else "├─"
            rows.append(_region_row(stem + branch, region))
    return rows


def _region_row(branch: str, region: Message) -> dict[str, str]:
    states = {
        "store full": region["store_full"],
        "agent late": region["agent_late"],
        f"{region['lost_pages']} pages lost": region["lost_pages"],
        "released": region.get("released"),
    }
    return {
        "NAME": branch + region["name"],
        "STORE": region["store"],
        "SIZE": format_size(region["size"]),
        "LIMIT": format_size(region["limit"]),
        "RESIDENT": format_size(region["resident_bytes"] + region["kept_bytes"]),
        "STORED": format_size(region["stored_bytes"]),
        "POOL": format_size(region["pool_bytes"]) if region["pool_bytes"] else "-",
        "FAULTS": str(region["faults"]),
        "P99": _microseconds(region),
        "STATE": ", ".join(text for text, applies in states.items() if applies),
    }


def _microseconds(region: dict[str, Any]) -> str:
    return f"{region['p99_us']:.0f}us" if region["faults"] else "-"
