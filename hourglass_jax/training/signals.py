"""Stopping on request: SIGTERM, SIGINT and the end of a time become a flag that training, evaluation, sampling poll."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType


class Interrupted(Exception):
    """A signal, or the end of its time, asked the program to stop; the message says which."""


class Signals:
    """As a context manager, notes SIGTERM and SIGINT instead of dying; a second one interrupts as usual.

    Outside the main thread, where Python delivers no signals, it changes nothing.

    seconds: from now on; then it is as if a signal had come.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.received: signal.Signals | None = None
        self.end = time.monotonic() + seconds

    def __enter__(self) -> Signals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @property
    def reason(self) -> str:
        """To stop, in words; empty where there is none."""
        if self.received is not None:
            return f"stopped by {self.received.name}"
        return "stopped at the end of its time" if time.monotonic() >= self.end else ""

    def check(self) -> None:
        """Raises Interrupted if there is a reason to stop."""
        if reason := self.reason:
            raise Interrupted(reason)
