"""Work in slices, for machines that are lent for minutes: parts, one after another, until the time is up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from hourglass_jax import UsageError
from hourglass_jax.training.run import RunBusy
from hourglass_jax.training.signals import Interrupted

TRIES = 2  # of a part that ends the process, before the next one is taken up

Row = dict[str, Any]
Part = Callable[[], Row]


class Slice:
    """Runs parts that a record lacks until the time is up. `record` has `rows` and `tries`, both by part's name.

    whole: begin no part, either, for which too little time is left, should it take as long as the longest so far.
    Otherwise a part may raise Interrupted, and goes on the next time.
    """

    def __init__(
        self, record: dict[str, Any], seconds: float, save: Callable[[dict[str, Any]], None], *, whole: bool = True
    ):
        self.record, self.save, self.whole = record, save, whole
        self.started, self.seconds, self.longest = time.perf_counter(), seconds, 0.0

    @property
    def over(self) -> bool:
        """Whether it is too late to begin a part."""
        return time.perf_counter() - self.started + self.longest * self.whole > self.seconds

    def run(self, parts: Mapping[str, Part]) -> Iterator[str]:
        """The names of the parts that it ran; each is saved before the next begins."""
        for name in [name for name in parts if name not in self.record["rows"]]:
            if self.over:
                return
            self.attempt(name, parts[name])
            yield name

    def attempt(self, name: str, part: Part) -> None:
        """A part that raises is done, with the reason; one that ends the process is given up after `TRIES`."""
        before = self.record["tries"].get(name, 0)
        self.record["tries"][name] = before + 1
        if before >= TRIES:
            self.record["rows"][name] = {"kind": "failed", "reason": f"ended the process {TRIES} times"}
        else:
            self.save(self.record)
            started = time.perf_counter()
            try:
                self.record["rows"][name] = part()
            except (Interrupted, KeyboardInterrupt, RunBusy):  # no fault of the part
                self.record["tries"][name] = before
                self.save(self.record)
                raise
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, UsageError) as error:
                reason = " ".join(str(error).split())[:300]
                self.record["rows"][name] = {"kind": "failed", "reason": reason}
            taken = time.perf_counter() - started
            self.record["rows"][name]["part_seconds"] = taken
            self.longest = max(self.longest, taken)
        self.save(self.record)


def keep_compiled(directory: Path) -> None:
    """Compiled programs are kept in `directory` for the next slice, unless the environment names another place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
