"""The one thread that opens and closes regions, so that nothing can come between their steps.

Signal handlers, and with them KeyboardInterrupt, run in the main thread only: work that is done
here is done to its end, also when the one who asked for it no longer waits. Finalizers run in any
thread, whatever locks it holds: they leave their work here and go on.

Must not know: what the jobs do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from userswap.engine.errors import PagerError

T = TypeVar("T")


class Keeper:
    """Runs jobs one after another, on a thread that lives while `needed` says so."""

    def __init__(self, needed: Callable[[], bool]) -> None:
        self._needed = needed
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def runs(self) -> bool:
        """Whether the process has this thread."""
        return self._thread is not None

    def run(self, job: Callable[[], T]) -> T:
        """Have a job done, and return or raise what it does.

        The job is done even if the wait is interrupted; its result is then dropped.
        """
        if sys.is_finalizing():
            raise PagerError("the interpreter is ending")
        outcome: SimpleQueue[tuple[T] | BaseException] = SimpleQueue()

        def step() -> None:
            try:
                outcome.put((job(),))
            except BaseException as error:
                outcome.put(error)

        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._main, name="userswap-keeper", daemon=True)
                thread.start()
                self._thread = thread
            self._jobs.put(step)
        result = outcome.get()
        if isinstance(result, BaseException):
            try:
                raise result
            finally:
                del result  # an error that refers to itself would hold what its callers hold
        return result[0]

    def leave(self, job: Callable[[], object]) -> None:
        """Have a job done some time soon; only while the thread is needed. Never blocks."""
        self._jobs.put(job)

    def _main(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            del job  # what it refers to may be waiting to go
            if not self._needed():
                with self._lock:
                    if self._jobs.empty():
                        self._thread = None
                        return
