"""Paged memory in the kernel's hands: system calls, direct I/O, pinned and locked pages, a full
store, a store that fails. Each function runs in a process of its own (see proof.py)."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import sys
import threading
import time
from pathlib import Path

from exercise import PAGE, Region, Writers, address_of, address_of_buffer, expect
from proof import SLOW, fewer
from rawcalls import (
    DONTNEED,
    DONTNEED_LOCKED,
    SYS_MADVISE,
    SYS_PROCESS_MADVISE,
    SYS_PROCESS_VM_READV,
    Ring,
    futex_wait,
    futex_wake,
    in_memory,
    lock,
    protect,
    read_process,
    refuse,
    unlock,
)
from scenarios import LEAST, MIB, copy_out, fill, stamp, stored_pages
from userswap.engine import region as region_module
from userswap.engine.errors import ResidentError, UserswapError


def sweep(region: Region, first: int = 0) -> None:
    """Touch everything from a page on, so that what came before has to go if it can."""
    for page in range(first, region.size // PAGE):
        region.memory[page * PAGE + 8] = region.memory[page * PAGE + 8]


def make_system_calls(*, store: str, path: str) -> None:
    """The kernel itself faults on pages that are out, for reading and for writing."""
    with Region(4 * MIB, resident=LEAST, store=store, fault_path=path, prefetch="none") as region:
        fill(region)
        base = address_of(region)
        reader, writer = os.pipe()
        for page in stored_pages(region)[:12:3]:
            view = region.memory[page * PAGE : (page + 3) * PAGE]
            os.write(writer, view[:PAGE])
            os.readv(reader, [view[PAGE : 2 * PAGE]])
            expect(view[PAGE : 2 * PAGE] == stamp(page, 0), f"page {page} by read and write")
            if page + 2 not in stored_pages(region):
                continue
            found = read_process(os.getpid(), base + (page + 2) * PAGE, PAGE)
            expect(found == stamp(page + 2, 0), f"page {page + 2} by process_vm_readv")
            view.release()
        word = stored_pages(region)[-1]
        with contextlib.suppress(BlockingIOError):
            futex_wait(base + word * PAGE, 0)  # it holds a stamp: EAGAIN, and only if it was read
            expect(False, f"futex read zeros from page {word}")
        woken = threading.Event()

        def sleeper() -> None:
            value = int.from_bytes(stamp(word, 0)[:4], "little")
            futex_wait(base + word * PAGE, value)
            woken.set()

        threading.Thread(target=sleeper, daemon=True).start()
        time.sleep(0.05)
        sweep(region)
        deadline = time.monotonic() + 10 * SLOW
        while not woken.is_set() and time.monotonic() < deadline:
            futex_wake(base + word * PAGE, 1)
            time.sleep(0.01)
        expect(woken.is_set(), "who sleeps in a futex on a page that left was not woken")


def read_directly(*, seed: int, store: str, path: str, folder: str, turns: int) -> None:
    """O_DIRECT reads land in pages that are being evicted: the buffer is what the file holds."""
    pages = 512
    file = Path(folder, "data")
    content = random.Random(seed).randbytes(pages * PAGE)
    file.write_bytes(content)
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    with Region(4 * MIB, resident=LEAST, store=store, fault_path=path) as region:
        half = region.size // PAGE // 2
        pressure = Writers(region, seed=seed, steps=1 << 40, threads=1, first=half).start()
        failures: list[str] = []

        def read(number: int) -> None:
            choice = random.Random(seed + number)
            mine = range(number * half // 2, (number + 1) * half // 2 - 8)
            for _ in range(fewer(turns)):
                page, source = choice.choice(mine), choice.randrange(pages - 8)
                length = choice.randrange(1, 9) * PAGE
                view = region.memory[page * PAGE : page * PAGE + length]
                got = os.preadv(fd, [view], source * PAGE)
                if got != length or view != content[source * PAGE : source * PAGE + length]:
                    failures.append(f"{length} bytes of page {source} in page {page}, {got} read")
                    return

        threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failures:
            pressure.watch(0.05)
        expect(not failures, str(failures))
        pressure.stop()
        pressure.finish()
        stats = region.stats()
        expect(stats.evicted_pages > fewer(turns), "nothing was evicted")
        print(stats.refused_pages, "refused")


def pin(region: Region, start: int, length: int) -> Ring:
    """Register memory with io_uring. Linux 6.1 cannot wait for pages there: they must be in, and
    writable, before it looks."""
    for _ in range(200):
        try:
            return Ring(address_of(region) + start, length)
        except OSError as error:
            expect(error.errno == errno.EFAULT, str(error))
        for offset in range(start + 8, start + length, PAGE):
            region.memory[offset] = region.memory[offset]
    raise TimeoutError("the memory cannot be registered")


def keep_pinned_pages(*, seed: int, store: str, path: str, folder: str) -> None:
    """The mover refuses pages that io_uring has registered: both go on using the same memory."""
    file = Path(folder, "data")
    content = random.Random(seed).randbytes(16 * PAGE)
    file.write_bytes(content)
    with Region(4 * MIB, resident=LEAST, store=store, fault_path=path) as region:
        fill(region)
        base, first = address_of(region), stored_pages(region)[0]
        start, length = first * PAGE, 16 * PAGE
        ring = pin(region, start, length)
        fd = os.open(file, os.O_RDONLY)
        for turn in range(4):
            sweep(region, first + 16)
            expect(all(in_memory(base + start, 16)), "a pinned page was taken")
            if turn == 0:
                expect(
                    region.memory[start : start + length]
                    == b"".join(stamp(page, 0) for page in range(first, first + 16)),
                    "a pinned page changed",
                )
            expect(ring.read(fd, base + start, length, 0) == length, "a short read")
            found = region.memory[start : start + length]
            expect(found == content, "what was read went to memory that is not the region's")
        expect(region.stats().refused_pages > 0, "the mover was never asked")
        ring.close()
        sweep(region, first + 16)
        sweep(region, first + 16)
        deadline = time.monotonic() + 10 * SLOW
        while all(in_memory(base + start, 16)) and time.monotonic() < deadline:
            sweep(region, first + 16)
        expect(not all(in_memory(base + start, 16)), "unpinned pages are never taken")
        expect(region.memory[start : start + length] == content, "lost after the pin")


def hold_written_pages_by_a_pin() -> None:
    """With the mover protect a pin of other memory holds what was written, and says so."""
    region_module.RESIZE_STALL_S = 1.0
    with Region(4 * MIB, resident=4 * MIB, store="memory:", name="held") as region:
        fill(region)
        elsewhere = mmap.mmap(-1, PAGE)
        ring = Ring(address_of_buffer(elsewhere), PAGE)
        try:
            region.resize_resident(2 * MIB)
            expect(False, "what was written left, in spite of a pin")
        except ResidentError as error:
            expect("VmPin" in str(error), str(error))
        expect("VmPin" in region.stats().held_by, "nothing is said")
        ring.close()
        region.resize_resident(2 * MIB)
        expect(region.stats().held_by == "", "it is not taken back")
        for page in range(region.size // PAGE):
            expect(copy_out(region, page) == stamp(page, 0), f"page {page} is lost")


def keep_locked_pages(*, store: str, path: str) -> None:
    """mlock brings pages in and holds them; the others go on leaving."""
    with Region(4 * MIB, resident=LEAST, store=store, fault_path=path) as region:
        fill(region)
        base, first = address_of(region), stored_pages(region)[0]
        lock(base + first * PAGE, 32 * PAGE)
        expect(all(in_memory(base + first * PAGE, 32)), "mlock did not bring its pages in")
        for _ in range(3):
            sweep(region, first + 32)
            expect(all(in_memory(base + first * PAGE, 32)), "a locked page was taken")
        unlock(base + first * PAGE, 32 * PAGE)
        for page in range(region.size // PAGE):
            expect(copy_out(region, page)[16:] == stamp(page, 0)[16:], f"page {page} is lost")


def live_through_failures(*, on: str, how: str, sticky: bool, most: int) -> None:
    """The store fails at its n-th call, for every n of a short history. Never zeros, never old."""
    report = Path(os.environ["USERSWAP_TEST_REPORT"])
    lost, number = 0, 0
    with Region(MIB * 2, resident=LEAST, store="memory:", name="keeps the pager"):
        failed = True
        while failed and number < fewer(most, least=3):
            number += 1
            report.unlink(missing_ok=True)
            url = f"trial:?fail={number}&on={on}&how={how}&strict=on&report={report}"
            lost += one_history(f"{url}&sticky={'on' if sticky else 'off'}", f"{how} {number}")
            failed = '"failed"' in report.read_text()
    expect(number > 1, "the store never failed")
    print(f"{number} histories, {lost} pages lost")


def one_history(url: str, name: str) -> int:
    """Write, change, verify and discard in a region; returns how many pages were lost."""
    lost: set[int] = set()
    with Region(LEAST + 64 * PAGE, resident=LEAST, store=url, name=name) as region:
        pages = region.size // PAGE
        fill(region)
        for page in range(64):
            if verify(region, page, 0, lost, name):
                region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, 1)
        present = in_memory(address_of(region), pages)
        for page in sorted(range(pages), key=lambda page: not present[page]):
            verify(region, page, 1 if page < 64 else 0, lost, name)
        for page in range(0, pages, 37):
            with contextlib.suppress(UserswapError):
                region.discard(page * PAGE, PAGE)
            expect(copy_out(region, page) == bytes(PAGE), f"{name}: page {page} after its discard")
        with contextlib.suppress(UserswapError):
            region.flush()
        expect(region.stats().lost_pages >= len(lost), f"{name}: lost pages are not counted")
    return len(lost)


def verify(region: Region, page: int, version: int, lost: set[int], name: str) -> bool:
    """False for a page that is lost: the kernel finds no memory there. A discard repairs it."""
    try:
        found = copy_out(region, page)
    except OSError as error:
        expect(error.errno == errno.EFAULT, f"{name}: page {page}: {error}")
        expect(page not in lost, f"{name}: page {page} is lost again, nothing having been stored")
        lost.add(page)
        region.discard(page * PAGE, PAGE)
        expect(copy_out(region, page) == bytes(PAGE), f"{name}: page {page} is not repaired")
        return False
    wanted = bytes(PAGE) if page in lost else stamp(page, version)
    expect(found == wanted, f"{name}: page {page} holds {found[:8].hex()}")
    return page not in lost


def touch_a_lost_page(*, page: int) -> None:
    """A page that the store cannot read is SIGBUS to who touches it."""
    with Region(4 * MIB, resident=LEAST, store=f"trial:?lost={page}", prefetch="none") as region:
        fill(region)
        expect(page in stored_pages(region), f"page {page} is in memory")
        expect(copy_out(region, page + 1) == stamp(page + 1, 0), "a neighbour is lost")
        print("touches", flush=True)
        sys.stdout.write(str(region.memory[page * PAGE]))


def touch_a_damaged_page(*, stack: str) -> None:
    """One bit is wrong in the store: one page is lost, to who touches that page alone."""
    url = f"{stack}trial:?flip=100"
    with Region(4 * MIB, resident=LEAST, store=url, prefetch="none") as region:
        fill(region)
        region.prefetch(0, region.size)  # what was loaded is stored again, and nothing is worse
        lost = []
        for page in range(region.size // PAGE):
            try:
                expect(copy_out(region, page) == stamp(page, 0), f"page {page} is wrong")
            except OSError as error:
                expect(error.errno == errno.EFAULT, f"page {page}: {error}")
                lost.append(page)
        expect(len(lost) == 1, f"lost: {lost}")
        print("touches", flush=True)
        sys.stdout.write(str(region.memory[lost[0] * PAGE]))


def fill_a_full_store(*, store: str, path: str) -> None:
    """A store without room: the region grows over its budget, and nothing is lost."""
    with Region(4 * MIB, resident=LEAST, store=store, fault_path=path) as region:
        seen = random.Random(1)
        content = [seen.randbytes(PAGE) for _ in range(region.size // PAGE)]
        for page, data in enumerate(content):
            region.memory[page * PAGE : (page + 1) * PAGE] = data
        for page, data in enumerate(content):
            expect(region.memory[page * PAGE : (page + 1) * PAGE] == data, f"page {page} is lost")
        stats = region.stats()
        expect(stats.over_budget_pages > 0, "it was never full")
        expect(stats.lost_pages == 0, "pages were lost")


def discard_without_dropping_locked_pages() -> None:
    """As before Linux 5.18, and before 6.13: no MADV_DONTNEED_LOCKED, no vectored drop."""
    refuse(
        errno.EINVAL,
        (SYS_MADVISE, 2, DONTNEED_LOCKED),
        (SYS_PROCESS_MADVISE, 3, DONTNEED_LOCKED),
        (SYS_PROCESS_MADVISE, 3, DONTNEED),
    )
    with Region(4 * MIB, resident=LEAST, store="memory:", mover="protect") as region:
        fill(region)
        region.discard(0, region.size)
        expect(not any(in_memory(address_of(region), region.size // PAGE)), "pages stayed")
        expect(region.memory == bytes(region.size), "what was discarded came back")


def forbid_memory_where_the_agent_reads(*, store: str) -> None:
    """Where the agent reads pages for the pager, it lives through those that the program has made
    unreadable: they stay."""
    refuse(errno.EPERM, (SYS_PROCESS_VM_READV, 5, 0))
    with Region(4 * MIB, resident=LEAST, store=store, mover="protect") as region:
        for page in range(128):
            region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, 0)
        protect(address_of(region), 64 * PAGE, 0)
        for page in range(128, region.size // PAGE):
            region.memory[page * PAGE : (page + 1) * PAGE] = stamp(page, 0)
        region.resize_resident(LEAST)  # it waits until the others have left
        expect(all(in_memory(address_of(region), 64)), "unreadable pages left")
        protect(address_of(region), 64 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        for page in range(region.size // PAGE):
            expect(copy_out(region, page) == stamp(page, 0), f"page {page} is lost")
