"""A Redis or Valkey server as a medium: connections, one user at a time, what its errors mean.

Responsible for: reaching the server again when it was lost, and noticing that it is another one
then (its run id differs: restarted, or a replica took over); the mark that says that a prefix was
used before, and the lock that says that it is in use now. The lock expires when its holder does not
renew it.

Must not know: pages, values.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from dataclasses import dataclass
from typing import Any

from userswap.backends.store import (
    StoreError,
    StoreFailedError,
    StoreFullError,
    TransientError,
)

NAME = "redis"
CONNECTIONS = 8
CONNECT_S = 5.0
ANSWER_S = 10.0
LOADING_S = 30.0
LOCK_MS = 6000
RENEW_S = 1.5
LOOK_S = 0.25
_NO_ROOM = ("OOM", "MISCONF", "NOREPLICAS")
"""What a server says that takes no writes; it has what it had."""
_AGAIN = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY")
_RIGHTS = ("NOAUTH", "WRONGPASS", "NOPERM")


@dataclass(frozen=True)
class Address:
    """Where a server is; `socket` is the path of a UNIX socket, instead of host and port."""

    host: str = ""
    port: int = 6379
    socket: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = None

    def __str__(self) -> str:
        return self.socket or f"{self.host}:{self.port}"


def _load() -> tuple[Any, Any]:
    try:
        import redis.asyncio
        import redis.exceptions
    except ImportError as error:
        raise StoreFailedError(
            "needs the package redis: pip install 'userswap[redis]'", store=NAME
        ) from error
    return redis.asyncio, redis.exceptions


class Server:
    """One user of one prefix on a server; made by `open_server`."""

    def __init__(self, address: Address, prefix: str) -> None:
        self.address = address
        self.was_used = False
        """The prefix carried a mark when it was opened."""
        self.has_changed = False
        """The server may lack what was on it when it was opened."""
        self._client_module, self._errors = _load()
        self._mark_key, self._lock_key = f"{prefix}:mark", f"{prefix}:lock"
        self._mark = b""
        self._token = secrets.token_hex(16).encode()
        self._run_id = b""
        self._failed = ""
        self._renewing: asyncio.Task[None] | None = None
        self._client = self._client_module.Redis(connection_pool=self._pool())

    def _pool(self) -> Any:
        connections = self._client_module.connection
        address = self.address
        where: dict[str, Any] = {"host": address.host, "port": address.port}
        kind = connections.Connection
        if address.socket:
            where, kind = {"path": address.socket}, connections.UnixDomainSocketConnection
        return connections.BlockingConnectionPool(
            max_connections=CONNECTIONS,
            timeout=None,
            connection_class=kind,
            db=address.database,
            username=address.username,
            password=address.password,
            protocol=2,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=CONNECT_S,
            # Whoever uses a store decides whether and when to try again.
            retry=self._client_module.retry.Retry(_no_backoff(), 0),
            redis_connect_func=self._connected,
            **where,
        )

    async def _connected(self, connection: Any) -> None:
        """Every new connection: is it the same server still?"""
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        run_id = _field(await connection.read_response(), b"run_id")
        if self._run_id and run_id != self._run_id:
            self.has_changed = True
        self._run_id = run_id

    async def command(self, *arguments: Any) -> Any:
        """Send one command; what can go wrong is a StoreError."""
        if self._failed:
            raise StoreFailedError(self._failed, store=NAME)
        try:
            try:
                return await self._client.execute_command(*arguments)
            except self._errors.ConnectionError as error:
                if "closed by server" not in str(error).lower():
                    raise
                # A connection that lay idle while the server was started again.
                return await self._client.execute_command(*arguments)
        except (TimeoutError, self._errors.RedisError, OSError) as error:
            raise self._meaning(error) from error

    async def values(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of keys, with a look at the mark."""
        found: list[bytes | None]
        mark, *found = await self.command("MGET", self._mark_key, *keys)
        if mark != self._mark:
            self.has_changed = True
        return found

    def _meaning(self, error: Exception) -> StoreError:
        text = f"{self.address}: {error}"
        word = str(error).partition(" ")[0]
        errors = self._errors
        if isinstance(error, errors.OutOfMemoryError) or word in _NO_ROOM:
            return StoreFullError(text, store=NAME)
        rights = (errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError)
        if isinstance(error, rights) or word in _RIGHTS:
            help_ = "set password_file=, or the environment's REDISCLI_AUTH"
            return StoreFailedError(f"{text} ({help_})", store=NAME)
        if isinstance(error, (errors.BusyLoadingError, errors.ReadOnlyError)) or word in _AGAIN:
            return TransientError(text, store=NAME)
        if isinstance(error, errors.ResponseError):
            return StoreFailedError(text, store=NAME)
        return TransientError(f"{self.address}: no connection: {_cause(error)}", store=NAME)

    async def open(self) -> None:
        """See that the server keeps what it is given, and take the prefix."""
        try:
            await self._when_loaded()
            memory = await self.command("INFO", "memory")
            policy = _field(memory, b"maxmemory_policy").decode()
            if policy.startswith("allkeys"):
                raise StoreFailedError(
                    f"{self.address} may throw pages away (maxmemory-policy {policy}): "
                    "CONFIG SET maxmemory-policy noeviction",
                    store=NAME,
                )
            await self._take()
            mark = secrets.token_hex(16).encode()
            self.was_used = not await self.command("SET", self._mark_key, mark, "NX")
            self._mark = await self.command("GET", self._mark_key)
        except TransientError as error:
            hint = "is a Redis or Valkey server running there, and does it take connections?"
            raise StoreFailedError(f"{error.args[0]}: {hint}", store=NAME) from error
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _when_loaded(self) -> None:
        """A server that starts reads its files first."""
        for _ in range(int(LOADING_S / LOOK_S)):
            try:
                await self.command("PING")
                return
            except TransientError as error:
                if "loading" not in str(error).lower():
                    raise
            await asyncio.sleep(LOOK_S)

    async def _take(self) -> None:
        """Take the lock; a holder that was killed does not renew its own."""
        left = LOCK_MS
        while not await self.command("SET", self._lock_key, self._token, "NX", "PX", LOCK_MS):
            now = await self.command("PTTL", self._lock_key)
            if now > left or now == -1:
                raise StoreFailedError(
                    f"{self._lock_key.removesuffix(':lock')} on {self.address} is in use by "
                    "another store: choose another prefix=",
                    store=NAME,
                )
            left = now
            await asyncio.sleep(LOOK_S)

    async def _renew(self) -> None:
        while not self._failed:
            await asyncio.sleep(RENEW_S)
            with contextlib.suppress(TransientError, StoreFullError):
                await self._renew_once()

    async def _renew_once(self) -> None:
        holder = await self.command("GET", self._lock_key)
        if holder == self._token:
            await self.command("PEXPIRE", self._lock_key, LOCK_MS)
        elif holder is not None or not await self.command(
            "SET", self._lock_key, self._token, "NX", "PX", LOCK_MS
        ):
            self._failed = f"another store has taken this one's place on {self.address}"

    async def aclose(self) -> None:
        """Give the prefix back, if the server can be reached."""
        if self._renewing is not None:
            self._renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError, StoreError):
                await self._renewing
            with contextlib.suppress(StoreError):
                if await self.command("GET", self._lock_key) == self._token:
                    await self.command("DEL", self._lock_key)
        with contextlib.suppress(self._errors.RedisError, OSError):
            await self._client.aclose(close_connection_pool=True)


def _cause(error: Exception) -> str:
    """What the system said, which the client library puts into other words and a tuple."""
    system = error.__cause__ or error.__context__
    if not isinstance(system, OSError) or system.errno is None:
        return str(error)
    return os.strerror(system.errno) if system.errno > 0 else str(system.strerror)


def _no_backoff() -> Any:
    from redis.backoff import NoBackoff

    return NoBackoff()


def _field(information: Any, name: bytes) -> bytes:
    """One field of what INFO says, which comes as text or as a dict."""
    if isinstance(information, dict):
        return str(information.get(name.decode(), "")).encode()
    for line in bytes(information).splitlines():
        if line.startswith(name + b":"):
            return line.partition(b":")[2].strip()
    return b""
