"""Asking pagers what they serve, and telling them what to grant: the visitor's side of the desk.

Must not know: how answers are shown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from userswap.engine.control import Message, close_all, receive, send
from userswap.engine.errors import ConfigError, PagerError, from_kind
from userswap.engine.listening import dial, found_sockets

TIMEOUT_S = 5.0
PARTS_MAX = 10_000


def ask(path: str, operation: str, **arguments: Any) -> Message:
    """One request at a pager's desk; raises what the pager answers with, PagerError without one."""
    connection, _ = dial(path)
    with connection:
        connection.settimeout(TIMEOUT_S)
        try:
            send(connection, {"id": 1, "op": operation, **arguments})
            answer, descriptors = receive(connection)
        except TimeoutError:
            raise PagerError(f"the pager at {path} has not answered for {TIMEOUT_S:g} s") from None
        except OSError as error:
            raise PagerError(f"the pager at {path}: {error.strerror}") from None
    close_all(descriptors)
    if answer is None:
        raise PagerError(f"the pager at {path} has hung up")
    if not answer.get("ok"):
        raise from_kind(str(answer.get("kind")), str(answer.get("error")))
    return answer


def look(path: str) -> Message:
    """Everything that a pager shows: the pager, and its clients with their regions."""
    clients: dict[int, Message] = {}
    after = [0, -1]
    for _ in range(PARTS_MAX):
        part = ask(path, "stat", after=after)
        for row in part["rows"]:
            after = [int(row["client"]), int(row["region"])]
            if after[1] == 0:
                clients[after[0]] = {**row, "regions": []}
            elif after[0] in clients:
                clients[after[0]]["regions"].append(row)
        if not part["more"]:
            return {"socket": path, **part["pager"], "clients": list(clients.values())}
    raise PagerError(f"the pager at {path} does not come to an end")


def pagers(socket: str | None) -> Iterator[str]:
    """The sockets of one pager, or of all that this user can find."""
    if socket is not None:
        yield socket
        return
    seen = set()
    for path in found_sockets(os.geteuid()):
        real = os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            yield real


def pager_of(process: str) -> str:
    """The pager that serves a process; raises ConfigError where there is none or several."""
    found = []
    for path in pagers(None):
        if Path(path).name == f"{process}.sock":
            return path
        if any(str(client["pid"]) == process for client in look(path)["clients"]):
            found.append(path)
    if len(found) != 1:
        count = f"{len(found)} pagers serve" if found else "no pager of this user serves"
        raise ConfigError(f"{count} process {process}: name one with --socket")
    return found[0]
