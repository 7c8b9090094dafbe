"""Ctrl-C and SIGTERM: the step at hand is finished, the state saved, and the run ends."""

import signal
from types import FrameType


class StopRequest:
    """Notes SIGINT and SIGTERM while the block runs.

    A second Ctrl-C ends the process at once. A second SIGTERM does nothing: launchers pass on one that the scheduler has
    also sent directly.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal; 0 before it comes."""

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # works even inside a collective that never ends
