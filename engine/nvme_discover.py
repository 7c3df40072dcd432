"""`userswap nvme discover`: which namespaces' subsystems an NVMe/TCP target offers."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from userswap.backends.nvme_tcp.discovery import ITSELF, REFERRAL, SUBSYSTEM, Log, discover
from userswap.backends.nvme_tcp.identify import IPV4, IPV6, TCP, Entry
from userswap.backends.nvme_tcp.pdu import ProtocolError
from userswap.backends.nvme_tcp.url import is_nqn
from userswap.engine.errors import ConfigError, UserswapError
from userswap.engine.nvme_export import address_text, parse_address

SCHEMA = "userswap.nvme.discover/1"
TRANSPORTS = {1: "rdma", 2: "fc", TCP: "tcp", 254: "loop"}
FAMILIES = {IPV4: "ipv4", IPV6: "ipv6", 3: "ib", 4: "fc"}
SUBTYPES = {REFERRAL: "referral", SUBSYSTEM: "subsystem", ITSELF: "discovery"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask an NVMe/TCP target which subsystems it offers to this host, and follow its "
        "referrals to other targets. What is printed are URLs for Region and `userswap store`; "
        "a target behind a forwarded port tells the address that it has itself."
    )
    parser.epilog = (
        "exit code: 0 asked (there may be none), 1 no answer, or refused\n\n"
        "examples:\n"
        "  userswap nvme discover 10.0.0.1\n"
        "  userswap nvme discover '[fd00::1]:4420' --hostnqn nqn.2026-01.org.example:me\n"
        "  userswap nvme discover 10.0.0.1:4420 --json | jq -r '.entries[].url'"
    )
    parser.add_argument("address", metavar="HOST:PORT", help="where (port 4420)")
    parser.add_argument("--hostnqn", metavar="NQN", help="who asks (this host, as nvme-cli has it)")


def run(arguments: argparse.Namespace) -> int:
    address = parse_address(arguments.address)
    if not address[0]:
        raise ConfigError(f"{arguments.address!r} is no address: use one such as 10.0.0.1:4420")
    if arguments.hostnqn is not None and not is_nqn(arguments.hostnqn):
        raise ConfigError(f"--hostnqn {arguments.hostnqn!r} is no NQN: nqn.2026-01.org.example:me")
    try:
        logs = asyncio.run(discover(address, host=arguments.hostnqn))
    except ProtocolError as error:
        where = address_text(*address)
        said = str(error).removeprefix(f"{where}: ")
        raise UserswapError(f"discovery at {where}: {said}") from None
    if arguments.json:
        print(json.dumps(_document(logs), indent=2))
    else:
        print("\n".join(_lines(logs)))
    return 0


def _document(logs: list[Log]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "asked": [
            {"address": address_text(*log.address), "problem": log.problem or None} for log in logs
        ],
        "entries": [_as_json(log, entry) for log in logs for entry in log.entries],
    }


def _as_json(log: Log, entry: Entry) -> dict[str, Any]:
    return {
        "from": address_text(*log.address),
        "kind": SUBTYPES.get(entry.subtype, str(entry.subtype)),
        "transport": TRANSPORTS.get(entry.transport, str(entry.transport)),
        "family": FAMILIES.get(entry.family, str(entry.family)),
        "address": entry.address,
        "service": entry.service,
        "subsystem": entry.subsystem,
        "port": entry.port,
        "controller": entry.controller,
        "url": _url(entry),
    }


def _url(entry: Entry) -> str | None:
    """What a region can page to; None where that is nothing."""
    if entry.subtype != SUBSYSTEM or entry.transport != TCP or not entry.service.isdigit():
        return None
    return f"nvme+tcp://{address_text(entry.address, int(entry.service))}/{entry.subsystem}"


def _lines(logs: list[Log]) -> list[str]:
    lines = []
    for log in logs:
        where = address_text(*log.address)
        for entry in log.entries:
            kind = SUBTYPES.get(entry.subtype, str(entry.subtype))
            transport = TRANSPORTS.get(entry.transport, str(entry.transport))
            other = f"{transport} {entry.address} {entry.service} {entry.subsystem}"
            lines.append(_printable(f"{kind:10} {_url(entry) or other}"))
        if log.problem:
            lines.append(_printable(f"{'no answer':10} {where}: {log.problem}"))
        elif not log.entries:
            lines.append(f"{where} offers nothing to this host")
    return lines


def _printable(text: str) -> str:
    """What a target says of itself must not write to a terminal but letters."""
    return "".join(character if character.isprintable() else "?" for character in text)
