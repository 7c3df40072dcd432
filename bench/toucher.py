"""The touching process: `python -m userswap.bench.toucher`, driven by one JSON line per command
over its standard input.

It prepares everything that costs memory or time (sample, orders, versions), then waits: the
benchmark puts it into its control group before `open` makes the memory, so that the group is
charged with the paged memory and little else. The touching itself is native/touch.c. It ends when
its standard input does, so it cannot outlive the benchmark for long.

Commands: prepare, open, step, evict, stats, close; the answer to each is one line, {"error":
...} where it failed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from array import array
from typing import Any

from userswap.bench import order, sample
from userswap.bench.cases import Step
from userswap.bench.histogram import Histogram
from userswap.bench.paged import KernelMemory, Paged
from userswap.engine.errors import UserswapError
from userswap.native import check, ffi, lib

PAGE = sample.PAGE
OPERATIONS = {
    "fill": lib.US_TOUCH_FILL,
    "read": lib.US_TOUCH_READ,
    "update": lib.US_TOUCH_UPDATE,
    "write": lib.US_TOUCH_WRITE,
    "zero": lib.US_TOUCH_ZERO,
    "check": lib.US_TOUCH_CHECK,
}


def open_memory(plan: dict[str, Any], content: bytes) -> Paged:
    """The memory of the side that the plan names; only this side's code is loaded."""
    pages = int(plan["pages"])
    if plan["side"] == "kernel":
        return KernelMemory(pages * PAGE)
    if plan["side"] == "userswap":
        from userswap.bench.ours import UserswapMemory

        return UserswapMemory(pages * PAGE, int(plan["resident"]), str(plan["store"]))
    from userswap.bench.bare import BareMemory

    return BareMemory(pages, content if plan["stored"] else None, int(plan["cpus"][0]))


class Toucher:
    """The state between commands."""

    def __init__(self) -> None:
        self._plan: dict[str, Any] = {}
        self._memory: Paged | None = None

    def prepare(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Everything that is not the paged memory, touched once so that it is not charged
        later."""
        self._plan = plan
        self._pages = int(plan["pages"])
        self._cpus = [int(cpu) for cpu in plan["cpus"]]
        self._sample = sample.load(plan["data"])
        self._steps = {fields["name"]: Step(**fields) for fields in plan["steps"]}
        self._orders = {
            step.name: order.build(
                step.pattern, self._pages, step.count, len(self._cpus), step.seed
            )
            for step in self._steps.values()
        }
        self._versions = array("I", bytes(4 * self._pages)) if plan["versions"] else None
        return {"pid": os.getpid(), "clock_ps": int(lib.us_touch_clock_cost())}

    def open(self) -> dict[str, Any]:
        home = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._plan["pager_cpus"])  # a new pager inherits it
        self._memory = open_memory(self._plan, self._sample)
        os.sched_setaffinity(0, home)
        return self._memory.stats()

    def step(self, name: str) -> dict[str, Any]:
        assert self._memory is not None
        step, visits = self._steps[name], self._orders[name]
        plan, result = ffi.new("struct us_touch_plan *"), ffi.new("struct us_touch_result *")
        plan.memory = memory = ffi.from_buffer("uint8_t[]", self._memory.buffer)
        plan.sample = content = ffi.from_buffer("uint8_t[]", self._sample)
        plan.order = numbers = ffi.from_buffer("uint32_t[]", visits)
        versions = ffi.from_buffer("uint32_t[]", self._versions) if self._versions else ffi.NULL
        plan.versions = versions
        plan.sample_pages = len(self._sample) // PAGE
        plan.count, plan.operation = len(visits), OPERATIONS[step.operation]
        plan.threads = len(self._cpus)
        plan.cpus[0 : len(self._cpus)] = self._cpus
        check(lib.us_touch_run(plan, result))
        for view in (memory, content, numbers):
            ffi.release(view)
        if versions != ffi.NULL:
            ffi.release(versions)
        return _as_json(result)

    def stats(self) -> dict[str, Any]:
        assert self._memory is not None
        return self._memory.stats()

    def evict(self) -> dict[str, Any]:
        assert self._memory is not None
        self._memory.evict()
        return {}

    def close(self) -> dict[str, Any]:
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        return {}


def _as_json(result: Any) -> dict[str, Any]:
    histogram = Histogram.from_buckets(list(result.histogram), result.latency_max_ns)
    names = ("elapsed_ns", "user_ns", "system_ns", "accesses", "bad", "first_bad_page")
    fields = {name: int(getattr(result, name)) for name in (*names, "major_faults", "minor_faults")}
    pairs = histogram.to_pairs()
    return {**fields, "highest_ns": histogram.highest, "latencies_ns": pairs}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the benchmark speaks of a Ctrl-C, once
    toucher = Toucher()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(toucher, command.pop("command"))(**command)
        except UserswapError as error:
            answer = {"error": str(error)}
        except Exception as error:  # the benchmark decides what an error means, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    toucher.close()


if __name__ == "__main__":
    main()
