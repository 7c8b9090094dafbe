"""Ctrl-C and SIGTERM: the step at hand is finished, the state saved, and the run ends."""

import signal
from types import FrameType


class StopRequest:
    """Becomes set by SIGINT or SIGTERM while the block runs; a second signal acts as usual."""

    def __init__(self) -> None:
        self.is_set = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()
