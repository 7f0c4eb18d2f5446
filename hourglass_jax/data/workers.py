"""A function over many items in several processes, with the results in order and a bound on memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def parallel_map(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a function like `map` that computes in this many processes; with 1, in this one."""
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with ProcessPoolExecutor(processes, context, initializer=end_with_parent) as pool:

        def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            waiting: deque[Future] = deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield run


def end_with_parent() -> None:
    """End this process when its parent is killed; ignore Ctrl-C, which the parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
