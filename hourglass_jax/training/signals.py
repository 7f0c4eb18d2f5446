"""Stop on SIGTERM, SIGINT or a time limit, at points where training, evaluation and sampling poll."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType


class Interrupted(Exception):
    """A signal or a time limit stopped the program; the message says which."""


class Signals:
    """Context manager that records SIGTERM and SIGINT; a second signal raises KeyboardInterrupt.

    It handles no signals outside the main thread, where Python delivers none.

    seconds: time limit from now.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.received: signal.Signals | None = None
        self.end = time.monotonic() + seconds

    def __enter__(self) -> Signals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @property
    def reason(self) -> str:
        """The reason to stop; empty if there is none."""
        if self.received is not None:
            return f"stopped by {self.received.name}"
        return "stopped by the time limit" if time.monotonic() >= self.end else ""

    def check(self) -> None:
        """Raise Interrupted if there is a reason to stop."""
        if reason := self.reason:
            raise Interrupted(reason)
