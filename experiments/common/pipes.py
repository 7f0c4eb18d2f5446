"""Exit of a launcher whose output is closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hourglass_jax import Run

CLOSED_PIPE = 128 + 13  # the exit code of a process that SIGPIPE ends


@contextmanager
def quiet_pipes(runs: Sequence[Run]) -> Iterator[None]:
    """Exit with code 141 if the body, or the flush after its SystemExit, writes to a closed pipe; 2 for a full disk.

    Prints a line on stderr for each saved run, but none for the pipe.
    """
    try:
        try:
            yield
        except SystemExit:
            print(end="", flush=True)
            raise
    except OSError as error:
        closed = isinstance(error, BrokenPipeError)
        program = Path(sys.argv[0]).name
        with suppress(OSError):
            if not closed:
                print(f"{program}: error: standard output: {error}", file=sys.stderr)
            for run in runs:
                if run.has_checkpoints:
                    print(f"{program}: the output was closed; the run is saved in {run}", file=sys.stderr)
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # or Python's flush at exit would fail again
            os.dup2(null, descriptor)
        sys.exit(CLOSED_PIPE if closed else 2)
