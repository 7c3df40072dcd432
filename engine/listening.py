"""Sockets at which a pager can be found: made so that nobody else can come in between.

A path has one listener at a time: a lock beside it says so, which ends with its process, whatever
happens. What a dead listener left is replaced; anything else at that place is refused.

Must not know: what is said on the sockets.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from userswap.engine.control import Credentials, credentials
from userswap.engine.errors import ConfigError, PagerError, UnsupportedError

PATH_MAX = 107
"""Bytes that the kernel takes as a socket's address."""
BACKLOG = 128
FIRST_PASSED = 3
"""The first descriptor that systemd passes."""
TRIES = 100


class Listener:
    """A listening socket at a path, and the lock that keeps the path."""

    def __init__(self, socket_: socket.socket, path: str, lock: int = -1, *, ours: bool = True):
        """`ours`: made here, and removed with the end."""
        self.socket = socket_
        self.path = path
        self._lock = lock
        self._made = os.lstat(path) if ours else None

    def close(self) -> None:
        """Stop listening and leave nothing behind; again, it does nothing."""
        self.socket.close()
        if self._made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(self._made, os.lstat(self.path)):
                    os.unlink(self.path)
            self._made = None
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                os.unlink(_lock_path(self.path))
            os.close(self._lock)
            self._lock = -1


def listen(path: str, mode: int = 0o600) -> Listener:
    """Listen at a path; raises ConfigError where somebody does already, or where it cannot be."""
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > PATH_MAX:
        raise ConfigError(f"socket {path}: longer than the kernel's {PATH_MAX} bytes")
    lock = -1
    try:
        lock = _lock(path)
        _clear(path)
        return Listener(_bind(path, mode), path, lock)
    except OSError as error:
        _drop(lock)
        raise ConfigError(f"socket {path}: {error.strerror}") from None
    except BaseException:
        _drop(lock)
        raise


def listen_privately(name: str) -> Listener:
    """Listen at a name in this user's own folder, whoever may have listened there before.

    Raises OSError where there can be no such folder.
    """
    path = str(make_run_folder(os.geteuid()) / name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return Listener(_bind(path, 0o600), path)


def announce(path: str, name: str) -> Path | None:
    """Let this user's visitors find a socket that is elsewhere; what to remove at the end."""
    try:
        link = make_run_folder(os.geteuid()) / name
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.symlink(path, link)
    except OSError:
        return None
    return link


def passed() -> Listener | None:
    """The socket that systemd listens at for us (LISTEN_FDS); None without one."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    if pid != str(os.getpid()):
        return None
    if count != "1":
        raise ConfigError(f"systemd passes {count} sockets: use one ListenSequentialPacket=")
    os.set_inheritable(FIRST_PASSED, False)
    found = socket.socket(fileno=FIRST_PASSED)
    if (found.family, found.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ConfigError("the socket that systemd passes is none of ListenSequentialPacket=")
    found.setblocking(False)
    return Listener(found, str(found.getsockname()), ours=False)


def dial(path: str) -> tuple[socket.socket, Credentials]:
    """Connect to a pager's socket: the connection, and who listens there.

    Raises PagerError where nobody does. UnsupportedError where the listener is neither this user
    nor root: it would see this process's memory.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
        listener = credentials(connection)
    except (OSError, ValueError) as error:
        connection.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PagerError(f"no pager answers at {path}: {reason}") from None
    if listener.uid not in (0, os.geteuid()):
        connection.close()
        raise UnsupportedError(
            f"the pager at {path} runs as user {listener.uid}: use one of your own, or root's"
        )
    return connection, listener


def run_folder(user: int) -> Path:
    """Where a user's pagers can be found."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    for folder in (given, f"/run/user/{user}"):
        with contextlib.suppress(OSError):
            if folder.startswith("/") and os.stat(folder).st_uid == user:
                return Path(folder, "userswap")
    return Path(f"/tmp/userswap-{user}")


def make_run_folder(user: int) -> Path:
    """The user's own folder, made if need be; raises OSError where it is not his alone."""
    folder = run_folder(user)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise OSError(errno.EPERM, f"{folder} is not this user's alone")
    return folder


def found_sockets(user: int) -> Iterator[Path]:
    """Sockets in a user's folder at which somebody listens; what dead pagers left is removed."""
    folder = run_folder(user)
    try:
        if folder.lstat().st_uid != user:
            return
        names = sorted(folder.glob("*.sock"))
    except OSError:
        return
    for name in names:
        try:
            connection, _ = dial(str(name))
        except PagerError:
            if name.is_symlink() or name.is_socket():
                with contextlib.suppress(OSError):
                    name.unlink()
        except UnsupportedError:
            continue
        else:
            connection.close()
            yield name


def _lock_path(path: str) -> str:
    return path + ".lock"


def _lock(path: str) -> int:
    """The lock of a path; whoever holds it may remove its file, so look whether it still is one."""
    for _ in range(TRIES):
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(_lock_path(path), flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(f"socket {path}: a pager serves it already") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(_lock_path(path))):
                return lock
        os.close(lock)
    raise ConfigError(f"socket {path}: its lock is removed again and again")


def _drop(lock: int) -> None:
    if lock >= 0:
        os.close(lock)


def _clear(path: str) -> None:
    """Remove what a dead listener left; with the lock held."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"socket {path}: there is something else at that place")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # a listener of another kind
                raise
    raise ConfigError(f"socket {path}: somebody else listens there")


def _bind(path: str, mode: int) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        before = os.umask(0o777 & ~mode)  # never open to more people, not even for a moment
        try:
            made.bind(path)
        finally:
            os.umask(before)
        os.chmod(path, mode)
        made.listen(BACKLOG)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made
