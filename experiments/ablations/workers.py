"""Training in several processes that share the machine and the work."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable

from hourglass_jax import UsageError
from hourglass_jax.training.signals import Signals

MEMORY = 0.7  # of a GPU's memory, for all workers together


def train_together(train: Callable[[Signals], None], n_workers: int, minutes: float) -> None:
    """Call `train` in this process, and run this command in `n_workers` - 1 others, as `--workers=0`, until all end.

    Raises Interrupted, after all processes have saved, on a signal or after so many minutes (0: no limit).
    """
    if n_workers > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{MEMORY / n_workers:.3f}")
    command = [sys.executable, *sys.argv, "--workers=0"]  # the last --workers counts
    # In their own sessions, so that Ctrl-C reaches them only through this process.
    others = [subprocess.Popen(command, start_new_session=True) for _ in range(n_workers - 1)]
    with Signals(60 * minutes or math.inf) as signals:
        try:
            train(signals)
        finally:
            while not signals.reason and any(other.poll() is None for other in others):
                time.sleep(0.2)
            for other in others:
                other.terminate()
            failed = sum(other.wait() != 0 for other in others)
    if failed and not signals.reason:
        raise UsageError(f"{failed} of {n_workers} workers failed; see their messages above")
