"""System calls that Python has no names for, as the loss tests make them on paged memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = 4096
X86 = os.uname().machine == "x86_64"
SYS_FUTEX = 202 if X86 else 98
# Not by name: under AddressSanitizer the C library's mlock does nothing.
SYS_MLOCK, SYS_MUNLOCK = (149, 150) if X86 else (228, 229)
SYS_MADVISE, SYS_PROCESS_VM_READV = (28, 310) if X86 else (233, 270)
SYS_PROCESS_MADVISE = 440
DONTNEED, DONTNEED_LOCKED = 4, 24
SYS_IO_URING_SETUP, SYS_IO_URING_ENTER, SYS_IO_URING_REGISTER = 425, 426, 427
FUTEX_WAIT, FUTEX_WAKE = 0, 1
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
READ_FIXED = 4
ENTER_GETEVENTS = 1


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def checked(result: int) -> int:
    """The result, or the OSError that it stands for."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def system_call(number: int, *arguments: int | None) -> int:
    """Without the interpreter lock, as every call through ctypes."""
    values = [
        ctypes.c_void_p(value) if value is None else ctypes.c_long(value) for value in arguments
    ]
    return checked(int(LIBC.syscall(ctypes.c_long(number), *values)))


def in_memory(address: int, pages: int) -> list[bool]:
    """Which pages a page table has."""
    out = (ctypes.c_ubyte * pages)()
    checked(LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), out))
    return [bool(value & 1) for value in out]


def lock(address: int, length: int) -> None:
    system_call(SYS_MLOCK, address, length)


def unlock(address: int, length: int) -> None:
    system_call(SYS_MUNLOCK, address, length)


def read_process(pid: int, address: int, length: int) -> bytes:
    """process_vm_readv; shorter where it ended at a page that cannot be read."""
    buffer = ctypes.create_string_buffer(length)
    local = Iovec(ctypes.addressof(buffer), length)
    remote = Iovec(address, length)
    got = LIBC.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return buffer.raw[: checked(got)]


def futex_wait(address: int, value: int) -> None:
    """Sleep if the word at the address holds that value; BlockingIOError if it does not."""
    system_call(SYS_FUTEX, address, FUTEX_WAIT, value, None, None, 0)


def futex_wake(address: int, count: int) -> int:
    return system_call(SYS_FUTEX, address, FUTEX_WAKE, count, None, None, 0)


def refuse(error: int, *calls: tuple[int, int, int]) -> None:
    """From now on system calls of this process fail, and of those that it starts: by number, where
    the argument at a place has a value."""
    load, equal, answer = 0x20, 0x15, 0x06
    steps = []
    for number, place, value in calls:
        steps += [(load, 0, 0, 0), (equal, 0, 3, number)]
        steps += [(load, 0, 0, 16 + 8 * place), (equal, 0, 1, value)]
        steps += [(answer, 0, 0, 0x00050000 | error)]
    steps.append((answer, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    checked(LIBC.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    checked(LIBC.prctl(22, 2, program))  # PR_SET_SECCOMP


def protect(address: int, length: int, access: int) -> None:
    checked(LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), access))


def stop_thread(thread: int) -> None:
    """Stop one thread of another process, as a debugger does; this process becomes its tracer."""
    checked(LIBC.ptrace(PTRACE_SEIZE, thread, None, None))
    checked(LIBC.ptrace(PTRACE_INTERRUPT, thread, None, None))
    os.waitpid(thread, 0x40000000)  # __WALL


def continue_thread(thread: int) -> None:
    checked(LIBC.ptrace(PTRACE_DETACH, thread, None, None))


class Ring:
    """An io_uring with one registered buffer, which the kernel keeps pinned."""

    def __init__(self, address: int, length: int) -> None:
        parameters = ctypes.create_string_buffer(120)
        self.fd = system_call(SYS_IO_URING_SETUP, 4, ctypes.addressof(parameters))
        values = struct.unpack("<10I10I10I", parameters.raw)
        self._sq = dict(
            zip(
                ("head", "tail", "mask", "entries", "flags", "dropped", "array"),
                values[10:17],
                strict=True,
            )
        )
        self._cq = dict(
            zip(("head", "tail", "mask", "entries", "overflow", "cqes"), values[20:26], strict=True)
        )
        self._rings = mmap.mmap(self.fd, self._sq["array"] + 4 * 4 + self._cq["cqes"] + 16 * 8)
        self._entries = mmap.mmap(self.fd, 4 * 64, offset=0x10000000)
        vector = Iovec(address, length)
        system_call(SYS_IO_URING_REGISTER, self.fd, 0, ctypes.addressof(vector), 1)

    def read(self, fd: int, address: int, length: int, offset: int) -> int:
        """Read from a file into the registered buffer; the kernel uses the pages it has pinned."""
        self._entries[:64] = struct.pack(
            "<BBHiQQIIQHHiQQ", READ_FIXED, 0, 0, fd, offset, address, length, 0, 1, 0, 0, 0, 0, 0
        )
        tail = self._word(self._sq["tail"])
        self._rings[self._sq["array"] : self._sq["array"] + 4] = struct.pack("<I", 0)
        for slot in range(4):
            at = self._sq["array"] + 4 * slot
            self._rings[at : at + 4] = struct.pack("<I", 0)
        self._set(self._sq["tail"], tail + 1)
        system_call(SYS_IO_URING_ENTER, self.fd, 1, 1, ENTER_GETEVENTS, None, 0)
        head = self._word(self._cq["head"])
        at = self._cq["cqes"] + 16 * (head & self._word(self._cq["mask"]))
        (result,) = struct.unpack_from("<i", self._rings, at + 8)
        self._set(self._cq["head"], head + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return int(result)

    def close(self) -> None:
        self._rings.close()
        self._entries.close()
        os.close(self.fd)

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._rings, at)[0])

    def _set(self, at: int, value: int) -> None:
        struct.pack_into("<I", self._rings, at, value)
