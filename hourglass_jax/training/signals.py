"""Stopping on request: SIGTERM and SIGINT become a flag that training, evaluation and sampling poll."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """A signal asked the program to stop; the message says which."""


class Signals:
    """As a context manager, notes SIGTERM and SIGINT instead of dying; a second one interrupts as usual.

    Outside the main thread, where Python delivers no signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

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

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received.name}")
