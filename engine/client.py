"""The client's side of a pager: starts it, holds the descriptors, runs the agent.

One for each pager that the process uses, its own or a daemon, made by the first region there and
ended with the last. The client keeps its own copies
of the userfaultfd and of every memfd: if the last copy of a userfaultfd closed, evicted pages would
silently read as zeros.

Regions are opened and closed on the keeper's thread alone, so that no step of either can be lost to
a signal, and no lock is held that a finalizer could want.

Must not know: sizes, budgets, what a region's memory looks like to Python.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from userswap.backends.grammar import format_size
from userswap.engine import movers, probe
from userswap.engine.control import Caller, Message, Pending
from userswap.engine.errors import ConfigError, PagerError, ReleasedError, UnsupportedError
from userswap.engine.keeper import Keeper
from userswap.engine.listening import dial
from userswap.native import check, ffi, lib

FAULT_PATHS = ("auto", "native", "asyncio")
PLACEMENTS = ("none", "same", "other")
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 2.0
"""How long the end of this process may wait for orders under way."""
DEATH_NOTICE_S = 1.0
"""How long the agent may take to tell of the pager's death, and to end this process."""
PAGER_ADDRESS_SPACE = 33 << 30
"""The page table's mapping, which is sparse, and the pager itself."""


class Settings:
    """What holds for a whole process: the same for every region while any is open."""

    def __init__(
        self,
        fault_path: str,
        on_pager_death: str,
        user_mode_only: bool,
        placement: str,
        mover: str,
        pager: str | None = None,
    ) -> None:
        if pager is not None and (not isinstance(pager, str) or not pager or "\0" in pager):
            raise ConfigError(f"pager={pager!r}: use the path of a daemon's socket")
        for name, value, choices in (
            ("fault_path", fault_path, FAULT_PATHS),
            ("on_pager_death", on_pager_death, ("abort", "block")),
            ("user_mode_only", user_mode_only, (False, True)),
            ("placement", placement, ("auto", *PLACEMENTS)),
            ("mover", mover, ("auto", *movers.NUMBERS)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: use one of {', '.join(map(str, choices))}")
        self.fault_path = fault_path
        self.on_pager_death = on_pager_death
        self.user_mode_only = user_mode_only
        self.placement = "same" if placement == "auto" else placement
        self.mover: probe.Mover = "protect" if mover == "protect" else "move"
        self.pager = os.path.abspath(pager) if pager is not None else None
        """A daemon's socket; None: a pager of this process's own."""

    def check_same(self, other: Settings) -> None:
        """Raises ConfigError when a second region asks for what the first did not."""
        for name, value in vars(self).items():
            if getattr(other, name) != value:
                raise ConfigError(
                    f"{name}={getattr(other, name)!r}: this process's regions share a pager, "
                    f"which runs with {name}={value!r}; close them first"
                )


def check_service(settings: Settings) -> None:
    """Raises UnsupportedError, naming cause and remedy, where this machine cannot page."""
    service = probe.service_level(probe.gather(), settings.mover)
    if service.level == "none" or (
        service.level == "user_mode_only" and not settings.user_mode_only
    ):
        hint = " (or user_mode_only=True)" if service.level == "user_mode_only" else ""
        raise UnsupportedError(f"{service.reason}: {service.remedy}{hint}")
    # The soft limit is this process's own affair: the pager raises its own.
    _, address_space = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY and address_space < PAGER_ADDRESS_SPACE:
        raise UnsupportedError(
            f"the pager needs {format_size(PAGER_ADDRESS_SPACE)} of address space for its sparse "
            f"page table, and RLIMIT_AS allows {format_size(address_space)}: raise the hard limit "
            "(ulimit -Hv unlimited)"
        )


class Client:
    """This process's connection to its pager."""

    def __init__(self, settings: Settings) -> None:
        check_service(settings)
        if settings.mover == "protect":
            movers.tell_limit()
        self.settings = settings
        self.owner_pid = os.getpid()
        self.regions: dict[int, tuple[int, int]] = {}
        """Open regions: id -> (start, bytes)."""
        self._descriptors: list[int] = []
        self._pools: dict[tuple[int, int], tuple[int, set[int]]] = {}
        """Memfds of pools: (device, inode) -> (descriptor, the regions that use it)."""
        self.released: dict[int, dict[str, Any]] = {}
        """Regions that the pager let go of, whose memory is ordinary memory now: its last word."""
        self._agent: Any = None
        self._pidfd = -1
        self._pager_pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._caller: Caller | None = None
        try:
            self.uffd, self._staging_uffd, self.features = self._open_descriptors()
            if settings.pager is None:
                self._start_pager()
            else:
                self._caller = Caller(dial(settings.pager)[0], self._hear)
            self._introduce()
        except BaseException as error:
            self.end()
            if isinstance(error, OSError):
                raise PagerError(f"the pager cannot be started ({error})") from None
            raise

    @property
    def caller(self) -> Caller:
        assert self._caller is not None
        return self._caller

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

    def _start_pager(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "userswap.engine.pager"
        command = [sys.executable, "-P", "-m", module, "--embedded", str(theirs.fileno())]
        try:
            # Its own session: a terminal's Ctrl-C ends the client first, and the pager with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            self._caller = Caller(ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._descriptors.append(self._pidfd)

    def _introduce(self) -> None:
        hello = self._hello()
        self._descriptors += hello["descriptors"]
        self._pager_pid = int(hello["pid"])
        if self._process is None:  # a daemon keeps its table, and names itself
            channel, order, done, self._pidfd = hello["descriptors"]
        else:
            _table, channel, order, done = hello["descriptors"]
        check(lib.us_agent_allow(self._pager_pid))
        options = ffi.new("struct us_agent_options *")
        options.channel_fd, options.order_fd, options.done_fd = channel, order, done
        options.uffd, options.staging_uffd = self.uffd, self._staging_uffd
        options.pager_pidfd, options.pager_pid = self._pidfd, self._pager_pid
        options.abort_on_death = self.settings.on_pager_death == "abort"
        agent = ffi.new("struct us_agent **")
        check(lib.us_agent_start(agent, options))
        self._agent = agent[0]
        tid = lib.us_agent_tid(self._agent)
        self.call("agent", staging=lib.us_agent_staging(self._agent), tid=tid)

    def _hello(self) -> Message:
        try:
            return self.caller.call(
                "hello",
                [self.uffd],
                timeout=START_TIMEOUT_S,
                pid=os.getpid(),
                features=self.features,
                fault_path=self.settings.fault_path,
                placement=PLACEMENTS.index(self.settings.placement),
                mover=self.settings.mover,
                canary=int(os.environ.get("USERSWAP_CANARY", "0")),
            )
        except PagerError:
            process = self._process
            if process is None:
                raise
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DEATH_NOTICE_S if self.caller.ended else 0)
            if process.returncode is None:
                raise
            raise PagerError(
                f"the pager ({sys.executable}) ended as it started, with status "
                f"{process.returncode}; its standard error says why"
            ) from None

    def call(self, operation: str, /, **arguments: Any) -> Message:
        """A request to the pager."""
        if os.getpid() != self.owner_pid:
            raise PagerError("a region belongs to the process that made it: open one of your own")
        if arguments.get("region") in self.released:
            raise ReleasedError("the pager let go of this region: its memory is ordinary memory")
        try:
            return self.caller.call(operation, **arguments)
        except PagerError:
            if arguments.get("region") in self.released:
                return self.call(operation, **arguments)
            if self.caller.ended:
                self._hear_the_agent()
            raise

    def _hear_the_agent(self) -> None:
        """The pager is dead: let the agent act on it before anybody here does."""
        if self._agent is None:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(DEATH_NOTICE_S * 1000):
            time.sleep(DEATH_NOTICE_S if self.settings.on_pager_death == "abort" else 0.05)

    def open_region(self, start: int, size: int, request: dict[str, Any]) -> tuple[int, str]:
        """On the keeper's thread: have a fresh range of memory paged. Returns number and name."""
        answer = self.call("open", start=start, **request)
        number, name = int(answer["region"]), str(answer["name"])
        self._hold_pool(number, answer["descriptors"])
        self.regions[number] = (start, size)
        try:
            check(lib.us_agent_register(self.uffd, start, size))
        except OSError as error:
            self.call("close", region=number, unmapped=True)
            self._forget(number)
            raise UnsupportedError(f"the memory cannot be registered ({error})") from None
        return number, name

    def _hear(self, notice: Message) -> None:
        """On the caller's thread: what a daemon tells unasked."""
        if notice["notice"] == "released":
            self.released[int(notice["region"])] = dict(notice["stats"])

    @property
    def spent(self) -> bool:
        """Whether the pager has let go of every region and has ended: no new one can be opened."""
        return self.caller.ended and self.released.keys() >= self.regions.keys()

    def close_region(self, number: int, unmap: Callable[[], None]) -> None:
        """On the keeper's thread: unmap a region's memory once no order on it is under way.

        What `unmap` raises leaves the region in service.
        """
        try:
            self.call("quiesce", region=number)
        except ReleasedError:
            unmap()
            self._forget(number)
            return
        except PagerError:
            if not self.caller.ended:
                raise
            self._stop_agent()  # it alone still acts on the memory
        try:
            unmap()
        except BaseException:
            with contextlib.suppress(PagerError):
                self.call("resume", region=number)
            raise
        with contextlib.suppress(PagerError):
            self.call("close", region=number, unmapped=True)
        self._forget(number)

    def _hold_pool(self, number: int, descriptors: list[int]) -> None:
        """Keep the memfd of a region's pool once, however many regions share it."""
        for descriptor in descriptors:
            status = os.fstat(descriptor)
            held, users = self._pools.setdefault(
                (status.st_dev, status.st_ino), (descriptor, set())
            )
            users.add(number)
            if held != descriptor:
                os.close(descriptor)

    def _forget(self, number: int) -> None:
        del self.regions[number]
        self.released.pop(number, None)
        for key, (descriptor, users) in list(self._pools.items()):
            users.discard(number)
            if not users:
                del self._pools[key]
                os.close(descriptor)

    def quiet(self) -> None:
        """At the process's end: no order may reach memory that is being torn down.

        It waits for the orders under way, but not for ever: the pager may be stopped.
        """
        deadline = time.monotonic() + END_TIMEOUT_S
        with contextlib.suppress(PagerError):
            requests: list[Pending] = [self.caller.begin("quiet")]
            requests += [self.caller.begin("quiesce", region=number) for number in [*self.regions]]
            for request in requests:
                # Left by a finalizer, a region may be closed between the list and the answer.
                with contextlib.suppress(ConfigError):
                    request.wait(max(deadline - time.monotonic(), 0.001))

    def end(self) -> None:
        """Let the pager go. Only when no region is open."""
        self._stop_agent()  # from here on the pager's end is expected
        if self._caller is not None:
            self._caller.close()
        if self._process is not None:
            try:
                self._process.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close_descriptors()

    def _stop_agent(self) -> None:
        if self._agent is not None:
            lib.us_agent_stop(self._agent)
            self._agent = None

    def _close_descriptors(self) -> None:
        for descriptor in (*self._descriptors, *(pool[0] for pool in self._pools.values())):
            os.close(descriptor)
        self._descriptors.clear()
        self._pools.clear()

    def forked(self) -> None:
        """In a forked child: nothing here is the child's.

        Its copies of the descriptors go, and where the parent has regions an inaccessible mapping
        stands, so that a touch is SIGSEGV, never zeros or somebody else's memory.
        """
        for start, length in self.regions.values():
            lib.us_agent_bar(start, length)
        self._close_descriptors()
        if self._caller is not None:
            self._caller.abandon()
        if self._process is not None:
            self._process.returncode = 0  # not the child's to wait for


_clients: list[Client] = []
"""One for each pager of this process."""
keeper = Keeper(lambda: bool(_clients))


def acquire(settings: Settings) -> Client:
    """This process's client of a pager, started if there is none; on the keeper's thread."""
    for client in _clients:
        if client.settings.pager == settings.pager and not client.spent:
            client.settings.check_same(settings)
            return client
    client = Client(settings)
    _clients.append(client)
    return client


def release(client: Client) -> None:
    """End a client if it has no open region; on the keeper's thread."""
    if not client.regions and client in _clients:
        _clients.remove(client)
        client.end()


def own_threads() -> int:
    """Threads of this process that are the engine's, and touch no region."""
    return keeper.runs + 2 * len(_clients)


@atexit.register
def _at_exit() -> None:
    for client in list(_clients):
        if client.owner_pid == os.getpid():
            client.quiet()


def _after_fork_in_child() -> None:
    global keeper
    keeper = Keeper(lambda: bool(_clients))
    for client in _clients:
        client.forked()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
