"""Slow work that can be watched and stopped, while the notebook goes on."""

import time
from collections.abc import Callable
from threading import Event, RLock, Thread
from typing import Any


class Cancelled(Exception):
    """Somebody asked the work to stop."""


class Work:
    """Runs one piece of work at a time, in a thread of its own; a newer one replaces an older.

    Args:
        on_state: Called with "running", "done", "cancelled" or an error, from that thread.
        on_progress: Called with what is done and the whole, from that thread.

    >>> heard = []
    >>> work = Work(heard.append, lambda done, total: heard.append((done, total)))
    >>> work.start(lambda progress: progress(1, 2), then=lambda result: heard.append(result))
    >>> work.wait()
    True
    >>> heard
    ['running', (1, 2), None, 'done']
    """

    def __init__(
        self, on_state: Callable[[Any], None], on_progress: Callable[[int, int], None]
    ) -> None:
        self._on_state, self._on_progress = on_state, on_progress
        self._lock = RLock()
        self._stop = Event()
        self._thread: Thread | None = None

    def start(
        self, job: Callable[[Callable[[int, int], None]], Any], then: Callable[[Any], None]
    ) -> None:
        """Run `job(progress)`, then `then(its result)`, unless cancelled or replaced by then.

        The job calls `progress(done, total)` often; this is where it stops when it is told to.
        """
        with self._lock:
            before, stop = self._thread, Event()
            self._stop.set()
            self._stop = stop
            self._thread = Thread(
                target=self._run, args=(job, then, stop, before), daemon=True, name="explorer"
            )
            self._thread.start()

    def cancel(self) -> None:
        """Ask the work to stop; it does at its next progress."""
        self._stop.set()

    def wait(self, timeout: int | float | None = None) -> bool:
        """Wait until nothing runs; False if that took longer than so many seconds."""
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _run(self, job: Any, then: Any, stop: Event, before: Thread | None) -> None:
        if before is not None:
            before.join()

        def progress(done: int, total: int) -> None:
            if stop.is_set():
                raise Cancelled
            self._on_progress(done, total)
            time.sleep(0.001)  # else a click would hardly ever get hold of the model in between

        try:
            if stop.is_set():
                raise Cancelled
            self._on_state("running")
            result = job(progress)
            if stop.is_set():
                raise Cancelled
            then(result)
        except Cancelled:
            self._on_state("cancelled")
        except Exception as error:  # shown in the widget: a thread's errors are seen nowhere else
            self._on_state(error)
        else:
            self._on_state("done")
