"""Timing side by side: machines drift, so what is compared runs in turn, and medians are quoted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)


def in_turn(runs: Mapping[Name, Callable[[], Any]], repeats: int, *, warm: bool = False) -> dict[Name, list[float]]:
    """Seconds of each of `repeats` calls of every run, one of each after the other; a first round is not counted.

    `warm`: each follows a call that is not counted, so that it meets caches and memory as in a series of its own.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if warm:
                run()
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {repeat} of {repeats} done", file=sys.stderr, flush=True)
    return seconds
