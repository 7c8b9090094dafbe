"""Work beside training: on one thread, in order, and never a reason for training to stop."""

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from queue import Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")

MOST_WAITING = 16
"""Tasks that may wait; then the training thread waits for the oldest to begin. None is dropped, for the tasks of all ranks
call the same collectives."""
SECONDS_TO_LEAVE = 3.0
"""How long a run that failed waits for its last lines; other ranks may not answer any more."""


class Worker:
    """A thread that runs tasks in the order in which they were given. It starts with the first."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._tasks: Queue[Callable[[], object] | None] = Queue(MOST_WAITING)
        self._failed: set[str] = set()
        self._thread: threading.Thread | None = None

    def submit(self, part: str, function: Callable[..., object], *args: Any) -> None:
        """Let the thread `attempt` this. Waits only while MOST_WAITING others wait already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
            self._thread.start()
        self._tasks.put(partial(self.attempt, part, function, *args))

    def attempt(self, part: str, function: Callable[..., T], *args: Any) -> T | None:
        """`function(*args)`, or None if it raises: then there is one warning, and this part is never tried again."""
        if part in self._failed:
            return None
        try:
            return function(*args)
        except Exception as error:
            self._failed.add(part)
            reason = str(error) or type(error).__name__
            self._warn(f"telemetry: {part} failed, and training goes on without it: {reason}")
            return None

    def flush(self) -> None:
        """Wait until all tasks are done."""
        self._tasks.join()

    def close(self, in_good_order: bool, finish: Callable[[], None]) -> None:
        """Do what is left and then `finish`, and end the thread.

        Args:
            in_good_order: False after a failure: then it is waited for only a moment, as other ranks may be gone.
        """
        if self._thread is None:
            finish()
            return
        limit = None if in_good_order else SECONDS_TO_LEAVE
        with contextlib.suppress(Full):
            self._tasks.put(finish, timeout=limit)
            self._tasks.put(None, timeout=limit)
            self._thread.join(limit)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            with contextlib.suppress(Exception):  # of the warning itself, such as a closed terminal
                task()
            self._tasks.task_done()
        self._tasks.task_done()
