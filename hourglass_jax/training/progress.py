"""What a person sees of a training: a bar, or plain lines where nothing redraws them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from hourglass_jax.ranges import check_choice

QUIET_SECONDS = 10  # between two plain lines that only tell the speed


class Progress:
    """`total` steps, `initial` of them done. mode: bar | plain | auto (bar where stderr is a terminal) | none."""

    def __init__(self, total: int, initial: int, mode: str = "auto"):
        check_choice("log", mode, ("auto", "bar", "plain", "none"))
        if mode == "auto":
            redrawn = sys.stderr is not None and sys.stderr.isatty()
            mode = "bar" if redrawn or os.environ.get("TQDM_DISABLE") else "plain"
        self.mode, self.total, self.step = mode, total, initial
        self.figures: dict[str, str] = {}
        self.said = time.monotonic()
        # Without `disable`, TQDM_DISABLE=1 decides, and then there is nothing to see.
        hidden = {} if mode == "bar" else {"disable": True}
        self.bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=0.5, **hidden)

    def advance(self) -> None:
        self.step += 1
        self.bar.update()

    def show(self, figures: Mapping[str, str], *, now: bool = False) -> None:
        """Figures that stay until they are replaced; as a plain line, `now` or after a while."""
        self.figures |= figures
        self.bar.set_postfix(self.figures, refresh=False)
        if self.mode == "plain" and (now or time.monotonic() - self.said >= QUIET_SECONDS):
            self.said = time.monotonic()
            shown = ", ".join(f"{name} {value}" for name, value in self.figures.items())
            _write(f"step {self.step}/{self.total}: {shown}", sys.stderr)

    def write(self, text: str) -> None:
        """A text of its own, on standard output."""
        if self.mode != "none":
            with self.bar.external_write_mode(file=sys.stdout):
                _write(text, sys.stdout)

    def close(self) -> None:
        self.bar.close()


def _write(text: str, stream: TextIO) -> None:
    """A line; nothing that a stream cannot take, or that closed it, may end a training."""
    with suppress(OSError, ValueError, AttributeError):
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
