"""Programs that compile side by side: each alone would use one core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Programs:
    """Functions by name, made in threads of their own from the first use on."""

    def __init__(self, make: Mapping[str, Callable[[], Any]]):
        self.make = make
        self.made: dict[str, Future[Any]] = {}

    def __getitem__(self, name: str) -> Any:
        """Return a program once all are made, so that nothing disturbs its timing. Raises the error of its making."""
        if not self.made:
            with ThreadPoolExecutor(len(self.make)) as pool:
                self.made = {each: pool.submit(make) for each, make in self.make.items()}
                wait(self.made.values())
        return self.made[name].result()
