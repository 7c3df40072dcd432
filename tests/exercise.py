"""Writers for a scenario: threads of the C exerciser on a range of paged memory."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from typing import Any

import userswap
from proof import LOST, SLOW, STUCK, fewer
from userswap.native import ffi, lib

PAGE = 4096
KINDS = {
    "own": lib.US_EXERCISE_OWN,
    "atomic": lib.US_EXERCISE_ATOMIC,
    "locked": lib.US_EXERCISE_LOCKED,
}


MOVER = os.environ.get("USERSWAP_TEST_MOVER", "auto")


class Region(userswap.Region):
    """With the mover that the test asks for."""

    def __init__(self, size: int | str, **how: Any) -> None:
        super().__init__(size, **{"mover": MOVER, **how})


def address_of_buffer(buffer: memoryview | mmap.mmap) -> int:
    with memoryview(buffer) as view:
        return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


def address_of(region: userswap.Region) -> int:
    return address_of_buffer(region.memory)


def fail(status: int, text: str) -> None:
    """End the process at once: threads that wait for a page cannot be joined."""
    print(f"verdict: {text}", flush=True)
    os._exit(status)


class Writers:
    """Threads that increment counters; what they expect is kept outside of the paged memory."""

    def __init__(
        self,
        region: userswap.Region,
        *,
        seed: int,
        steps: int,
        threads: int = 3,
        kinds: str = "own atomic locked",
        reads: int = 25,
        burst: int = 1,
        hot: int = 0,
        stride: int = 0,
        first: int = 0,
        pages: int | None = None,
        stuck_s: float = 8.0,
    ) -> None:
        plan: Any = ffi.new("struct us_exercise *")
        plan.pages = region.size // PAGE - first if pages is None else pages
        plan.memory = ffi.cast("uint8_t *", address_of(region) + first * PAGE)
        plan.steps, plan.seed = fewer(steps), seed
        plan.burst, plan.hot, plan.stride = burst, hot, stride
        plan.reads = 256 * reads // 100
        for kind in kinds.split():
            plan.kinds |= KINDS[kind]
        self._tallies = [
            ffi.new("uint32_t[]", plan.pages * lib.US_EXERCISE_THREADS) for _ in range(3)
        ]
        plan.own, plan.atomic, plan.locked = self._tallies
        self._plan = plan
        self._stuck_s = stuck_s
        self._seed = seed
        self.threads = [
            threading.Thread(target=lib.us_exercise_run, args=(plan, number), daemon=True)
            for number in range(threads)
        ]

    def start(self) -> Writers:
        for thread in self.threads:
            thread.start()
        return self

    @property
    def done(self) -> int:
        return int(self._plan.done)

    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def stop(self) -> None:
        self._plan.stop = 1

    def look(self) -> None:
        """End the process if something is lost already."""
        if self._plan.lost:
            fail(LOST, f"lost in page {self._plan.first_lost_page} (seed {self._seed})")

    def watch(self, seconds: float = float("inf")) -> None:
        """Until the threads have ended, or for so long; ends the process if they stand still."""
        until = time.monotonic() + seconds
        seen, since = -1, time.monotonic()
        while self.alive() and time.monotonic() < until:
            time.sleep(0.01)
            self.look()
            if self.done != seen:
                seen, since = self.done, time.monotonic()
            elif time.monotonic() - since > self._stuck_s * SLOW:
                fail(STUCK, f"stuck after {seen} steps (seed {self._seed})")

    def finish(self) -> int:
        """Let the threads end and verify every page; returns the steps done."""
        self.watch()
        checker = threading.Thread(target=lib.us_exercise_check, args=(self._plan,), daemon=True)
        checker.start()
        checker.join(30 * SLOW)
        if checker.is_alive():
            fail(STUCK, f"the check is stuck (seed {self._seed})")
        self.look()
        return self.done


def expect(condition: bool, text: str) -> None:
    """What must hold in a scenario; threads may wait for pages, so the process ends at once."""
    if not condition:
        sys.stderr.flush()
        fail(LOST, text)
