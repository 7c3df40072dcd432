"""The client's side of a pager: starts it, holds the descriptors, runs the agent.

One per process, made by the first region and ended with the last. The client keeps its own copies
of the userfaultfd and of every memfd: if the last copy of a userfaultfd closed, evicted pages would
silently read as zeros.

Must not know: sizes, budgets, what a region's memory looks like to Python.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
from typing import Any

from userswap.engine import probe
from userswap.engine.control import Caller, Message
from userswap.engine.errors import ConfigError, PagerError, UnsupportedError
from userswap.native import check, ffi, lib

FAULT_PATHS = ("native", "asyncio")
PLACEMENTS = ("none", "same", "other")
START_TIMEOUT_S = 30.0


class Settings:
    """What holds for a whole process: the same for every region while any is open."""

    def __init__(
        self, fault_path: str, on_pager_death: str, user_mode_only: bool, placement: str
    ) -> None:
        for name, value, choices in (
            ("fault_path", fault_path, FAULT_PATHS),
            ("on_pager_death", on_pager_death, ("abort", "block")),
            ("placement", placement, ("auto", *PLACEMENTS)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: use one of {', '.join(choices)}")
        self.fault_path = fault_path
        self.on_pager_death = on_pager_death
        self.user_mode_only = user_mode_only
        self.placement = "same" if placement == "auto" else placement

    def check_same(self, other: Settings) -> None:
        """Raises ConfigError when a second region asks for what the first did not."""
        for name, value in vars(self).items():
            if getattr(other, name) != value:
                raise ConfigError(
                    f"{name}={getattr(other, name)!r}: this process's regions share one pager, "
                    f"which runs with {name}={value!r}; close them first"
                )


def check_service(settings: Settings) -> None:
    """Raises UnsupportedError, naming cause and remedy, where this machine cannot page."""
    service = probe.service_level(probe.gather())
    if service.level == "none" or (
        service.level == "user_mode_only" and not settings.user_mode_only
    ):
        hint = " (or user_mode_only=True)" if service.level == "user_mode_only" else ""
        raise UnsupportedError(f"{service.reason}: {service.remedy}{hint}")


class Client:
    """This process's connection to its pager."""

    def __init__(self, settings: Settings) -> None:
        check_service(settings)
        self.settings = settings
        self.owner_pid = os.getpid()
        self.regions: dict[int, tuple[int, int]] = {}
        """Open regions: id -> (start, bytes)."""
        self._descriptors: list[int] = []
        self._agent: Any = None
        self.uffd, self._staging_uffd, self.features = self._open_descriptors()
        self._process, self.caller = self._start_pager()
        try:
            self._introduce()
        except BaseException:
            self.end()
            raise

    @property
    def pager_pid(self) -> int:
        return self._process.pid

    def _open_descriptors(self) -> tuple[int, int, int]:
        out = ffi.new("int[2]")
        features = ffi.new("uint64_t *")
        rc = lib.us_agent_open(self.settings.user_mode_only, out, out + 1, features)
        if rc < 0:
            raise UnsupportedError(
                f"userfaultfd cannot be opened ({os.strerror(-rc)}): run `userswap doctor`"
            )
        self._descriptors += [out[0], out[1]]
        return out[0], out[1], features[0]

    def _start_pager(self) -> tuple[subprocess.Popen[bytes], Caller]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "userswap.engine.pager"
        command = [sys.executable, "-P", "-m", module, "--embedded", str(theirs.fileno())]
        try:
            # Its own session: a terminal's Ctrl-C ends the client first, and the pager with it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except OSError as error:
            ours.close()
            raise PagerError(f"the pager cannot be started ({error})") from None
        finally:
            theirs.close()
        check(lib.us_agent_allow(process.pid))
        return process, Caller(ours)

    def _introduce(self) -> None:
        self.caller.connection.settimeout(START_TIMEOUT_S)
        hello = self.caller.call(
            "hello",
            [self.uffd],
            pid=os.getpid(),
            features=self.features,
            fault_path=self.settings.fault_path,
            placement=PLACEMENTS.index(self.settings.placement),
            canary=int(os.environ.get("USERSWAP_CANARY", "0")),
        )
        self.caller.connection.settimeout(None)
        self._descriptors += hello["descriptors"]
        _table, channel, order, done = hello["descriptors"]
        pidfd = os.pidfd_open(self._process.pid)
        self._descriptors.append(pidfd)
        options = ffi.new("struct us_agent_options *")
        options.channel_fd, options.order_fd, options.done_fd = channel, order, done
        options.uffd, options.staging_uffd = self.uffd, self._staging_uffd
        options.pager_pidfd, options.pager_pid = pidfd, self._process.pid
        options.abort_on_death = self.settings.on_pager_death == "abort"
        agent = ffi.new("struct us_agent **")
        check(lib.us_agent_start(agent, options))
        self._agent = agent[0]
        self.call("agent", staging=lib.us_agent_staging(self._agent))

    def call(self, operation: str, /, **arguments: Any) -> Message:
        """A request to the pager; descriptors that an answer brings are kept open."""
        if os.getpid() != self.owner_pid:
            raise PagerError("a region belongs to the process that made it: open one of your own")
        answer = self.caller.call(operation, **arguments)
        self._descriptors += answer["descriptors"]
        return answer

    def quiet(self) -> None:
        """At the process's end: no order may reach memory that is being torn down."""
        with contextlib.suppress(PagerError):
            self.call("quiet")

    def end(self) -> None:
        """Let the pager go. Only when no region is open."""
        if self._agent is not None:
            lib.us_agent_stop(self._agent)  # from here on its end is expected
            self._agent = None
        self.caller.connection.close()
        try:
            self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def forked(self) -> None:
        """In a forked child: nothing here is the child's.

        Its copies of the descriptors go, and where the parent has regions an inaccessible mapping
        stands, so that a touch is SIGSEGV, never zeros or somebody else's memory.
        """
        for start, length in self.regions.values():
            lib.us_agent_bar(start, length)
        self.close_descriptors()
        self.caller.connection.close()
        self._process.returncode = 0  # not the child's to wait for


_lock = threading.RLock()
_client: Client | None = None


def lock() -> threading.RLock:
    """Held while regions are opened and closed."""
    return _lock


def acquire(settings: Settings) -> Client:
    """This process's client, started if there is none; the caller holds the lock."""
    global _client
    if _client is None:
        _client = Client(settings)
    else:
        _client.settings.check_same(settings)
    return _client


def release(client: Client) -> None:
    """End the client if its last region is closed; the caller holds the lock."""
    global _client
    if not client.regions and client is _client:
        _client = None
        client.end()


@atexit.register
def _at_exit() -> None:
    if _client is not None and _client.owner_pid == os.getpid():
        _client.quiet()


def _after_fork_in_child() -> None:
    global _client, _lock
    _lock = threading.RLock()
    if _client is not None:
        _client.forked()
        _client = None


os.register_at_fork(after_in_child=_after_fork_in_child)
