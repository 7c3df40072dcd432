"""`file:/path` keeps pages in a regular file or on a block device, each in the slot of its index.

Responsible for: whose file it may be and that nobody else has it open, which pages an error of the
medium concerns, and room. A file is created 0600 and locked; a device is opened exclusively. What a
file held before it was opened stays as it was until the first write.

Options: `direct=on|off`, past the page cache or through it (on where the medium can, if not said);
`size=SIZE`, of the file (what is asked for, else what it has, else 1TiB: it is sparse).

Must not know: io_uring and threads (userswap.native.transfers), volumes, the engine.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from userswap.backends.grammar import LayerSpec, Options, format_size
from userswap.backends.store import (
    PAGES_MAX,
    Geometry,
    PageLostError,
    Run,
    Store,
    StoreError,
    StoreFailedError,
    StoreFullError,
    TransientError,
    pages_between,
    pages_of,
)
from userswap.native import transfers
from userswap.native.transfers import CHUNK, Failure, Transfers

NAME = "file"
DEFAULT_SIZE = 1024**4
OPEN_TRIES, OPEN_AGAIN_S = 40, 0.05
BLOCK = 4096  # of alignment: enough for every device whose blocks are not larger than a page

_AGAIN = {errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.ENOBUFS, errno.EBUSY, errno.ETIMEDOUT}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EPERM}
"""Of a write: it changed nothing, and what is there can still be read."""
_GONE = {errno.EBADF, errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM, errno.ESHUTDOWN, errno.ESTALE}
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class Medium:
    """A file that is open, locked and fit to hold memory."""

    fd: int
    path: str
    is_device: bool
    size: int
    is_new: bool


class FileStore(Store):
    """Pages in slots of a file; see `Store` for the contract. Made on a running loop."""

    durable = True

    def __init__(
        self,
        medium: Medium,
        page_count: int,
        page_size: int,
        *,
        direct: bool,
        ring: bool = True,
        shape: bool = True,
    ) -> None:
        self.page_size = page_size
        self.page_count = page_count
        self._medium = medium
        self._direct = direct
        self._transfers = Transfers(medium.fd, align=BLOCK if direct else 1, ring=ring)
        self._taken = medium.is_device or (shape and medium.size == 0)
        """The file is ours to shape: it was empty, or was written by us."""
        block = os.fstatvfs(medium.fd).f_bsize
        self._allocates = not medium.is_device and page_size > block
        """A page takes several blocks, which must not run out in its middle."""
        self._clears = [transfers.PUNCH, transfers.ZERO]
        """Ways to make pages zeros that this medium has not refused yet."""
        self._doubtful: set[int] = set()
        """Pages whose last write failed somewhere: neither old nor new."""
        self._failed = ""
        self._closed = False
        if self._taken and not medium.is_device:
            self._shape()
        self.space = self._describe()

    def _describe(self) -> str:
        kind = "device" if self._medium.is_device else "sparse file"
        way = "past the page cache" if self._direct else "through the page cache"
        why = self._transfers.why_threads
        by = f"by threads (io_uring: {why})" if why else "by io_uring"
        size = format_size(self.page_count * self.page_size)
        return f"{kind} {self._medium.path} of {size}, {way}, {by}"

    async def read(self, runs: Sequence[Run]) -> None:
        self._check_open()
        transfer = self._transfers.new()
        for run in runs:
            pages = pages_of(self, run)
            if self._doubtful:
                self._refuse_doubtful(pages)
            offset = run.index * self.page_size
            if self._direct or not self._transfers.cached(run.buffer, offset):
                self._transfers.move(transfer, transfers.READ, run.buffer, offset)
        if transfer.left:
            await transfer
            if transfer.failures:
                await self._singly(transfers.READ, runs, transfer.failures)

    async def write(self, runs: Sequence[Run]) -> None:
        self._check_open()
        spans = [pages_of(self, run) for run in runs]
        if not self._taken:
            self._shape()
        if self._allocates:
            await self._allocate(spans)
        transfer = self._transfers.new()
        for run in runs:
            self._transfers.move(transfer, transfers.WRITE, run.buffer, run.index * self.page_size)
        if transfer.left:
            await transfer
            if transfer.failures:
                await self._singly(transfers.WRITE, runs, transfer.failures)
        self._clear_doubt(spans)

    async def discard(self, index: int, count: int) -> None:
        self._check_open()
        pages = pages_between(self, index, count)
        if not count:
            return
        if not self._taken:
            self._shape()
        while self._clears:
            failure = await self._change(self._clears[0], pages)
            if failure is None:
                break
            if failure.error not in _CANNOT:
                raise self._error(transfers.PUNCH, failure.error, index)
            self._clears.pop(0)
        else:
            await self._write_zeros(pages)
        self._clear_doubt([pages])

    async def flush(self) -> None:
        self._check_open()
        transfer = self._transfers.new()
        self._transfers.change(transfer, transfers.SYNC)
        await transfer
        if transfer.failures:
            # The kernel says it once, and forgets which pages it could not write.
            self._failed = f"lost writes ({os.strerror(transfer.failures[0].error)})"
            self._check_open()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._transfers.aclose()
        finally:
            os.close(self._medium.fd)

    def _shape(self) -> None:
        """Give the file its size, before or with the first write; nobody else is to read it."""
        medium, size = self._medium, self.page_count * self.page_size
        try:
            if stat.S_IMODE(os.fstat(medium.fd).st_mode) != 0o600:
                os.fchmod(medium.fd, 0o600)
            if os.fstat(medium.fd).st_size < size:
                os.ftruncate(medium.fd, size)
        except OSError as error:
            raise StoreFailedError(
                f"{medium.path} cannot be {format_size(size)} ({error.strerror}): say size=...",
                store=NAME,
            ) from error
        self._taken = True

    async def _change(self, operation: int, pages: range) -> Failure | None:
        transfer = self._transfers.new()
        size = self.page_size
        self._transfers.change(transfer, operation, pages.start * size, len(pages) * size)
        await transfer
        return transfer.failures[0] if transfer.failures else None

    async def _allocate(self, spans: Sequence[range]) -> None:
        for pages in spans:
            failure = await self._change(transfers.ALLOCATE, pages) if pages else None
            if failure is None:
                continue
            if failure.error in _CANNOT:
                self._allocates = False
                return
            raise self._error(transfers.WRITE, failure.error, pages.start)

    async def _write_zeros(self, pages: range) -> None:
        """Where the medium cannot forget: its room is not given back."""
        with mmap.mmap(-1, max(CHUNK, self.page_size)) as area, memoryview(area) as zeros:
            step = len(zeros) // self.page_size
            for start in range(pages.start, pages.stop, step):
                length = min(step, pages.stop - start) * self.page_size
                with zeros[:length] as part:
                    transfer = self._transfers.new()
                    self._transfers.move(transfer, transfers.WRITE, part, start * self.page_size)
                    await transfer
                if transfer.failures:
                    raise self._error(transfers.WRITE, transfer.failures[0].error, start)

    async def _singly(
        self, operation: int, runs: Sequence[Run], failures: Sequence[Failure]
    ) -> None:
        """Again page by page, so that one bad page takes no neighbour along; then say which."""
        size = self.page_size
        errors: list[StoreError] = []
        for run in runs:
            for page in pages_of(self, run):
                start, end = page * size, (page + 1) * size
                if not any(bad.offset < end and start < bad.end for bad in failures):
                    continue
                transfer = self._transfers.new()
                at = (page - run.index) * size
                with run.buffer.cast("B") as whole, whole[at : at + size] as part:
                    self._transfers.move(transfer, operation, part, start)
                    await transfer
                if transfer.failures:
                    error = self._error(operation, transfer.failures[0].error, page)
                    if operation == transfers.WRITE and self._is_torn(transfer.failures[0], size):
                        self._doubtful.add(page)
                    errors.append(error)
                elif operation == transfers.WRITE:
                    self._doubtful.discard(page)
        if errors:
            # A page that is lost is told of alone; before it, what concerns all of them.
            raise min(errors, key=lambda error: isinstance(error, PageLostError))

    def _is_torn(self, failure: Failure, size: int) -> bool:
        """A write without room changed nothing, unless part of its page had found room."""
        if failure.error in _NO_ROOM:
            return size > CHUNK or failure.offset % size != 0
        return True

    def _refuse_doubtful(self, pages: range) -> None:
        lost = [page for page in pages if page in self._doubtful]
        if lost:
            raise PageLostError("a write of it failed halfway", store=NAME, page=lost[0])

    def _clear_doubt(self, spans: Sequence[range]) -> None:
        if self._doubtful:
            for pages in spans:
                self._doubtful = {page for page in self._doubtful if page not in pages}

    def _check_open(self) -> None:
        if self._closed:
            raise StoreFailedError("is closed", store=NAME)
        if self._failed:
            raise StoreFailedError(f"{self._medium.path}: {self._failed}", store=NAME)

    def _error(self, operation: int, number: int, page: int) -> StoreError:
        reads = operation == transfers.READ
        text = f"{self._medium.path}: cannot be {'read' if reads else 'written'}"
        text += f" ({os.strerror(number)})"
        if number in _GONE:
            self._failed = os.strerror(number)
            return StoreFailedError(text, store=NAME, page=page)
        if number in _AGAIN:
            return TransientError(text, store=NAME, page=page)
        if number in _NO_ROOM and not reads:
            return StoreFullError(text, store=NAME, page=page)
        return PageLostError(text, store=NAME, page=page)


# --- opening ---


def _refused(path: str, why: str) -> StoreFailedError:
    return StoreFailedError(f"{path} {why}", store=NAME)


class _InUseError(StoreFailedError):
    """Somebody else has it open."""


def open_medium(path: str, *, existing: bool = False) -> Medium:
    """Open or create a file, and see that it is fit and that it is ours alone."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not hang us
    is_new = True
    if existing and not os.path.lexists(path):
        raise _refused(path, "does not exist: the first region makes it")
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        is_new = False
        path = _without_link(path)
        exclusive = os.O_EXCL if stat.S_ISBLK(os.lstat(path).st_mode) else 0
        try:
            fd = os.open(path, flags | exclusive)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _InUseError(
                    f"{path} is in use: mounted, or open in another program", store=NAME
                ) from None
            raise
    try:
        _check_fitness(fd, path)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR)
        size = os.lseek(fd, 0, os.SEEK_END)
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        if is_new:
            _sync_folder(path)
    except BaseException:
        os.close(fd)
        raise
    return Medium(fd, path, is_device, size, is_new)


def _without_link(path: str) -> str:
    """Devices are commonly named by links; a link to a file may be somebody's trap."""
    if not stat.S_ISLNK(os.lstat(path).st_mode):
        return path
    real = os.path.realpath(path)
    if not os.path.lexists(real) or not stat.S_ISBLK(os.lstat(real).st_mode):
        raise _refused(path, f"is a symbolic link: name {real} itself")
    return real


def _check_fitness(fd: int, path: str) -> None:
    status = os.fstat(fd)
    is_device = stat.S_ISBLK(status.st_mode)
    if not is_device and not stat.S_ISREG(status.st_mode):
        raise _refused(path, "is neither a regular file nor a block device")
    if status.st_uid not in (0, os.geteuid()):
        raise _refused(path, f"belongs to another user (uid {status.st_uid}), who may change it")
    if status.st_mode & (0o002 if is_device else 0o022):
        mode = stat.filemode(status.st_mode)
        raise _refused(path, f"can be written by others ({mode}): chmod 600 {path}")
    if is_device:
        return
    if status.st_nlink > 1:
        raise _refused(path, f"has {status.st_nlink} names (hard links), of which one suffices")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _InUseError(f"{path} is in use: another store has it open", store=NAME) from None


def _sync_folder(path: str) -> None:
    """A file that survives a crash needs a name that does."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _switch_direct(medium: Medium) -> bool:
    """Past the page cache from here on, if the medium can; a read is the proof."""
    try:
        fcntl.fcntl(medium.fd, fcntl.F_SETFL, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, BLOCK) as area:
            os.preadv(medium.fd, [area], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            fcntl.fcntl(medium.fd, fcntl.F_SETFL, os.O_RDWR)
            return False
        if error.errno != errno.EIO:  # of the first page, which may be the only bad one
            raise
    return True


def _pages(medium: Medium, size: int | None, geometry: Geometry) -> int:
    """How many pages the store has."""
    asked = geometry.page_count
    if medium.is_device or size is not None:
        room = min(size if size is not None else medium.size, PAGES_MAX * geometry.page_size)
        if medium.is_device and room > medium.size:
            raise _refused(medium.path, f"has {format_size(medium.size)}, less than size=")
        if asked is not None and asked * geometry.page_size > room:
            wanted = format_size(asked * geometry.page_size)
            raise _refused(medium.path, f"has {format_size(room)}; {wanted} are asked for")
        return asked or _at_least_one(medium, room, geometry)
    return asked or _at_least_one(medium, medium.size or DEFAULT_SIZE, geometry)


def _at_least_one(medium: Medium, size: int, geometry: Geometry) -> int:
    if medium.is_device and size < geometry.page_size:
        raise _refused(medium.path, f"has {format_size(size)}, less than one page")
    return max(1, size // geometry.page_size)


async def open_store(layer: LayerSpec, geometry: Geometry) -> Store:
    path = layer.target
    if not path.startswith("/"):
        raise layer.error(f"needs a whole path, such as file:/var/lib/userswap/{path or 'pages'}")
    medium = await _open_patiently(path, geometry.existing)
    try:
        return _open_on(medium, layer, geometry)
    except BaseException:
        if medium.is_new:
            os.unlink(medium.path)
        os.close(medium.fd)
        raise


async def _open_patiently(path: str, existing: bool) -> Medium:
    """The kernel lets go of a killed process's file only when what was in flight has ended."""
    for _ in range(OPEN_TRIES):
        try:
            return open_medium(path, existing=existing)
        except _InUseError:
            await asyncio.sleep(OPEN_AGAIN_S)
    return open_medium(path, existing=existing)


def _open_on(medium: Medium, layer: LayerSpec, geometry: Geometry) -> Store:
    options = Options(layer)
    direct = options.boolean("direct", default=None)
    whole = medium.size
    if not medium.is_device:
        system = os.fstatvfs(medium.fd)
        whole = system.f_blocks * system.f_frsize
    size = options.size("size", default=None, whole=whole)
    options.finish()
    if size is not None and size < geometry.page_size:
        raise layer.error(f"is less than a page ({format_size(geometry.page_size)})", "size")
    is_direct = direct is not False and _switch_direct(medium)
    if direct and not is_direct:
        raise _refused(medium.path, "cannot be read past the page cache: use direct=off")
    if not is_direct:
        os.posix_fadvise(medium.fd, 0, 0, os.POSIX_FADV_RANDOM)
    pages = _pages(medium, size, geometry)
    shape = not geometry.existing
    return FileStore(medium, pages, geometry.page_size, direct=is_direct, shape=shape)
