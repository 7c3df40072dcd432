"""The desk of a pager, where visitors look at what it serves and change what it grants.

A visitor is a connection that has said no hello. It sees what is its own user's, or all where it is
the pager's user or root, who alone may change what is granted. Answers that are too long for one
message come in parts, each from where the last one ended.

Must not know: sockets, how a budget is shared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Protocol

from userswap.backends.grammar import GrammarError, format_size, parse_size
from userswap.engine.connection import Connection
from userswap.engine.control import MESSAGE_MAX, Message
from userswap.engine.errors import ConfigError, UserswapError
from userswap.engine.served import OpenRegion

PART_BYTES = MESSAGE_MAX * 3 // 4
CHANGES = ("resident", "weight", "min")
RESIDENT_MIN, RESIDENT_MAX = 1 << 20, 1 << 44
"""With less, a region could not hold the pages that its threads need at once."""


class Books(Protocol):
    """What the desk asks of its pager."""

    def about(self) -> Message:
        """The pager itself."""
        ...

    def connections(self) -> list[Connection]: ...

    def grants(self, client: Connection, number: int) -> Message:
        """What a region (0: the client) is granted, besides what its statistics say."""
        ...

    def change(self, client: Connection, number: int, what: str, value: int | float) -> None:
        """Grant something else to a region (0: to the client); raises UserswapError."""
        ...


class Desk:
    def __init__(self, books: Books) -> None:
        self._books = books

    async def answer(self, visitor: Connection, operation: str, request: Message) -> Message:
        """Answer one request of a visitor's; raises UserswapError."""
        if operation == "stat":
            return await self._stat(visitor, request)
        if operation == "set":
            return self._set(visitor, request)
        raise UserswapError("hello comes first")

    def _visible(self, visitor: Connection) -> list[Connection]:
        uid = visitor.credentials.uid
        everything = _rules(uid)
        found = [each for each in self._books.connections() if each.service is not None]
        return [each for each in found if everything or each.credentials.uid == uid]

    async def _stat(self, visitor: Connection, request: Message) -> Message:
        after = tuple(int(number) for number in request.get("after", (0, -1)))
        rows: list[Message] = []
        length = 0
        for client in sorted(self._visible(visitor), key=lambda each: each.number):
            for number in _numbers(client):
                if (client.number, number) <= after:
                    continue
                row = await self._row(client, number)
                length += len(json.dumps(row)) + 1
                if length > PART_BYTES:
                    return {"pager": self._books.about(), "rows": rows, "more": True}
                rows.append(row)
        return {"pager": self._books.about(), "rows": rows, "more": False}

    async def _row(self, client: Connection, number: int) -> Message:
        place = {"client": client.number, "region": number}
        service = client.service
        region = service.regions.get(number) if service is not None else None
        if service is None or region is None:
            return {
                **place,
                "pid": client.credentials.pid,
                "uid": client.credentials.uid,
                "name": peer_name(client.credentials.pid),
                **self._books.grants(client, 0),
            }
        stats = await service.stats_of(region)
        return {**place, **_brief(stats), **self._books.grants(client, number)}

    def _set(self, visitor: Connection, request: Message) -> Message:
        if not _rules(visitor.credentials.uid):
            raise UserswapError("only the pager's own user and root may change what it grants")
        client = self._client(str(request["client"]))
        number, region = 0, None
        if request.get("region") is not None:
            number, region = _region(client, str(request["region"]))
        changes = {name: request[name] for name in CHANGES if request.get(name) is not None}
        if not changes:
            raise ConfigError(f"nothing to set: use {', '.join(CHANGES)}")
        for name, text in changes.items():
            self._books.change(client, number, name, _value(name, str(text), region))
        return self._books.grants(client, number)

    def _client(self, text: str) -> Connection:
        found = [each for each in self._books.connections() if each.service is not None]
        of_process = [each for each in found if str(each.credentials.pid) == text]
        if len(of_process) != 1:
            raise ConfigError(f"{len(of_process) or 'no'} clients of this pager are process {text}")
        return of_process[0]


def peer_name(pid: int) -> str:
    """What a process calls itself."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return "".join(c for c in file.read().strip() if c.isprintable())
    except OSError:
        return "?"


def _rules(uid: int) -> bool:
    return uid in (0, os.geteuid())


def _numbers(client: Connection) -> Iterator[int]:
    yield 0
    if client.service is not None:
        yield from sorted(client.service.regions)


def _region(client: Connection, text: str) -> tuple[int, OpenRegion]:
    assert client.service is not None
    regions = client.service.regions
    named = [number for number, region in regions.items() if region.name == text]
    if not named and text.isascii() and text.isdigit() and int(text) in regions:
        named = [int(text)]
    if len(named) != 1:
        others = ", ".join(f"{region.name} ({number})" for number, region in regions.items())
        raise ConfigError(f"{len(named) or 'no'} regions are {text!r} there: use one of {others}")
    return named[0], regions[named[0]]


def _value(name: str, text: str, region: OpenRegion | None) -> int | float:
    if name == "weight":
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"weight={text}: use a number such as 2 or 0.5") from None
    try:
        size = parse_size(text, whole=region.pages * 4096 if region else None)
    except GrammarError as error:
        raise ConfigError(f"{name}: {error}") from None
    if name == "resident" and not RESIDENT_MIN <= size <= RESIDENT_MAX:
        raise ConfigError(f"resident={text}: use {format_size(RESIDENT_MIN)} or more")
    return size


def _brief(stats: dict[str, Any]) -> Message:
    """Of a region's statistics, what a table shows."""
    return {
        "name": stats["name"],
        "store": stats["store"],
        "size": stats["size"],
        "limit": stats["resident_limit"],
        "resident_bytes": stats["resident_bytes"],
        "kept_bytes": stats["kept_bytes"],
        "staging_bytes": stats["staging_bytes"],
        "stored_bytes": stats["pages"]["STORED"] * 4096,
        "pool_bytes": stats["pool_bytes"],
        "table_bytes": stats["table_bytes"],
        "faults": stats["faults_native"] + stats["faults_awaited"],
        "faults_awaited": stats["faults_awaited"],
        "p50_us": stats["native_latency"]["p50_us"],
        "p99_us": stats["native_latency"]["p99_us"],
        "awaited_p50_us": stats["awaited_latency"]["p50_us"],
        "awaited_p99_us": stats["awaited_latency"]["p99_us"],
        "over_budget_pages": stats["over_budget_pages"],
        "lost_pages": stats["lost_pages"],
        "store_full": stats["store_full"],
        "agent_late": stats["agent_late"],
    }
