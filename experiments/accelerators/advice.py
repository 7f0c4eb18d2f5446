"""Changes of accumulate, fsdp and remat that make a training step fit, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.accelerators.step import Compiled, Pretraining
from experiments.accelerators.targets import Target

N_CHANGES = 2
FLAGS = {"accumulate": "--runtime.accumulate", "fsdp": "--runtime.fsdp", "remat": "--model.remat"}


class Change(NamedTuple):
    """Options that make the step fit, and its peak memory with them in bytes per chip."""

    options: dict[str, Any]
    peak: float

    @property
    def flags(self) -> str:
        return " ".join(f"{FLAGS[name]}={value}" for name, value in self.options.items())


def kinds_of_change(run: Pretraining, chips: int) -> list[list[dict[str, Any]]]:
    """Return the options of each kind of change, mildest first, and last all kinds combined.

    The kinds are ordered by cost: accumulate adds no FLOPs, fsdp adds communication, remat adds up to a third of the
    FLOPs.
    """
    rows = run.data.batch_size // chips
    accumulate = [n for n in range(run.runtime.accumulate + 1, rows + 1) if rows % n == 0 and not n & (n - 1)]
    fsdp = [n for n in range(run.runtime.fsdp + 1, chips + 1) if chips % n == 0] if run.runtime.data == -1 else []
    remat = {"dots": ["full"], "full": []}.get(run.model.remat, ["dots", "full"])
    kinds = [
        [{name: value} for value in values]
        for name, values in (("accumulate", accumulate), ("fsdp", fsdp), ("remat", remat))
    ]
    combined = {name: value for kind in kinds if kind for name, value in kind[-1].items()}
    return [*kinds, [combined] if len(combined) > 1 else []]


def cheapest_changes(run: Pretraining, target: Target, compile_run: Callable[[Pretraining], Compiled]) -> list[Change]:
    """Return at most two changes with which the step fits: the mildest of each kind, or all kinds combined."""
    found: list[Change] = []
    *single, combined = kinds_of_change(run, target.chips)
    for kind in (*single, combined):
        if len(found) == N_CHANGES:
            break
        for options in kind:
            compiled = compile_run(run.changed(**options))
            if compiled.fits(target) and compiled.peak is not None:
                found.append(Change(options, compiled.peak))
                break
    return found
