"""The database that `lmdb:` keeps pages in: opened, checked, and taken for one store.

Responsible for: whose database it is. It lies in a directory of its own; a record in it says which
format and page size its values have. What is not ours is refused untouched, also what is cut short;
what another opener has, in this process or another, is refused by a lock on the file.

Must not know: what is in the values, threads, the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
from typing import NamedTuple

import lmdb

from userswap.backends.grammar import format_size
from userswap.backends.store import StoreError, StoreFailedError, StoreFullError

NAME = "lmdb"
FORMAT = 1
PAGE_HEADER = 16
"""Of LMDB's pages: the rest of one is the longest value that costs one page."""
TABLES = 3
SPARE_TRANSACTIONS = 4
NEARLY_NO_ROOM = 1 << 20
FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

_FILES = ("data.mdb", "lock.mdb")
_OF_FILESYSTEM = "lost+found"
_ABOUT = b"userswap"
_MAGIC = struct.pack("<I", 0xBEEFC0DE)
_MAGIC_AT = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Database(NamedTuple):
    env: lmdb.Environment
    about: lmdb._Database
    """What the database says of itself."""
    values: lmdb._Database
    tails: lmdb._Database
    """What is cut off values that are longer than `value_max`."""
    value_max: int
    """Bytes of a value that cost one page of LMDB's."""
    lock: int
    """A descriptor; what it locks is free again when it is closed."""


block_key = struct.Struct(">Q").pack
"""The key of a block: its index, so that neighbours are neighbours."""


def is_full(error: lmdb.Error, path: str) -> bool:
    """There is no room, in the map or on the medium; nothing was changed."""
    if error.code == errno.EIO:  # what LMDB calls a write that was cut short, too
        medium = os.statvfs(path)
        return medium.f_bavail * medium.f_frsize < NEARLY_NO_ROOM
    return isinstance(error, lmdb.MapFullError) or error.code in _FULL


def open_database(
    path: str, map_size: int, *, page_size: int, sync: bool, existing: bool = False
) -> Database:
    """Open the database of pages of `page_size` in the directory `path`, or make it unless it has
    to be an `existing` one."""
    lock = _lock(path, existing)
    try:
        env = _open(path, map_size, sync=sync)
        return _tables(env, path, page_size, lock)
    except lmdb.Error as error:
        os.close(lock)
        raise _opening_failed(path, map_size, error) from error
    except BaseException:
        os.close(lock)
        raise


def _lock(path: str, existing: bool) -> int:
    """Make the database's directory and file where there are none, and take it for this store."""
    file = os.path.join(path, _FILES[0])
    if existing and not os.path.exists(file):
        raise StoreFailedError(f"{file} does not exist: the first region makes it", store=NAME)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, DIRECTORY_MODE)
    if not os.path.isdir(path):
        raise StoreFailedError(f"{path} is not a directory, which an LMDB store is", store=NAME)
    if not os.path.exists(file):
        _check_alone(path)
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_ours(path, lock)
    except BlockingIOError:
        os.close(lock)
        raise StoreFailedError(f"{file} is in use", store=NAME) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _check_alone(path: str) -> None:
    """Refuse a directory of somebody else's files, which a new database would be lost among."""
    others = sorted(set(os.listdir(path)) - {*_FILES, _OF_FILESYSTEM})
    if others:
        raise StoreFailedError(
            f"{path} holds other files ({others[0]}): name a directory of the store's own, such "
            f"as {os.path.join(path, 'swap')}",
            store=NAME,
        )


def _check_ours(path: str, file: int) -> None:
    """Refuse, without touching it, what is not empty and not ours."""
    size = os.fstat(file).st_size
    if not size:
        return
    if os.pread(file, len(_MAGIC), _MAGIC_AT) != _MAGIC:
        raise StoreFailedError(f"{path}/data.mdb is not an LMDB database", store=NAME)
    try:
        with lmdb.open(path, readonly=True, lock=False, max_dbs=1, readahead=False) as env:
            if (env.info()["last_pgno"] + 1) * env.stat()["psize"] > size:
                raise StoreFailedError(f"{path}/data.mdb is cut short", store=NAME)
            with env.begin() as txn:
                ours = not env.stat()["entries"] or txn.get(_ABOUT) is not None
    except lmdb.Error as error:
        raise StoreFailedError(f"{path}/data.mdb is not usable: {error}", store=NAME) from error
    if not ours:
        raise StoreFailedError(f"{path} holds a database that is not userswap's", store=NAME)


def _open(path: str, map_size: int, *, sync: bool) -> lmdb.Environment:
    return lmdb.open(
        path,
        map_size=map_size,
        mode=FILE_MODE,
        max_dbs=TABLES,
        max_spare_txns=SPARE_TRANSACTIONS,
        readahead=False,
        sync=sync,
        metasync=sync,
    )


def _tables(env: lmdb.Environment, path: str, page_size: int, lock: int) -> Database:
    """The database's tables, made where it is new."""
    own = {"format": FORMAT, "page_size": page_size}
    try:
        with env.begin(write=True) as txn:
            about = env.open_db(_ABOUT, txn)
            values, tails = env.open_db(b"values", txn), env.open_db(b"tails", txn)
            found = txn.get(b"about", db=about)
            if found is None:
                txn.put(b"about", json.dumps(own).encode(), db=about)
            elif json.loads(found) != own:
                raise _mismatch(path, json.loads(found), own)
    except BaseException:
        env.close()
        raise
    return Database(env, about, values, tails, env.stat()["psize"] - PAGE_HEADER, lock)


def _mismatch(path: str, about: dict[str, int], own: dict[str, int]) -> StoreFailedError:
    if about.get("format") != own["format"]:
        reason = f"is of format {about.get('format')}, this version's is {own['format']}"
    else:
        sizes = (format_size(kind["page_size"]) for kind in (about, own))
        reason = "holds pages of {}, not of {}".format(*sizes)
    return StoreFailedError(f"{path} {reason}", store=NAME)


def _opening_failed(path: str, map_size: int, error: lmdb.Error) -> StoreError:
    if isinstance(error, lmdb.MemoryError):
        size = format_size(map_size)
        reason = f"this process has no room for map_size={size}; give less, or see `ulimit -v`"
        return StoreFailedError(reason, store=NAME)
    if is_full(error, path):
        return StoreFullError(f"no room for a database at {path}", store=NAME)
    return StoreFailedError(f"{path}: {error}", store=NAME)
