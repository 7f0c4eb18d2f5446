"""What would make a step fit: changes of remat, accumulate and fsdp, each compiled, the fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments.accelerators.step import Compiled, Pretraining

WANTED = 2
FLAGS = {"remat": "--model.remat", "accumulate": "--runtime.accumulate", "fsdp": "--runtime.fsdp"}


class Change(NamedTuple):
    """Options to give instead, with the peak of a chip in bytes and the seconds a step that they would lead to."""

    options: dict[str, Any]
    peak: float
    seconds: float

    @property
    def flags(self) -> str:
        return " ".join(f"{FLAGS[name]}={value}" for name, value in self.options.items())


def families(run: Pretraining, chips: int) -> Iterator[list[dict[str, Any]]]:
    """Changes of one kind each, the mildest first; then all kinds together."""
    rows = run.data.batch_size // chips
    remat = {"dots": ["full"], "full": []}.get(run.model.remat, ["dots", "full"])
    accumulate = [n for n in range(run.runtime.accumulate + 1, rows + 1) if rows % n == 0 and not n & (n - 1)]
    fsdp = [n for n in range(run.runtime.fsdp + 1, chips + 1) if chips % n == 0] if run.runtime.data == -1 else []
    kinds = [
        [{"remat": policy} for policy in remat],
        [{"accumulate": parts} for parts in accumulate],
        [{"fsdp": n} for n in fsdp],
    ]
    yield from kinds
    together = {name: value for kind in kinds if kind for name, value in kind[-1].items()}
    yield [together] if len(together) > 1 else []


def cheapest_changes(
    run: Pretraining,
    chips: int,
    fits: Callable[[Compiled], bool],
    attempt: Callable[[Pretraining], tuple[Compiled, float]],
) -> list[Change]:
    """At most two, by the time a step would take. `attempt` compiles a run and estimates its seconds.

    Of each kind the mildest that fits; all kinds together only where fewer than two alone are enough.
    """
    found: list[Change] = []
    *alone, together = families(run, chips)
    for kind in (*alone, together):
        if kind is together and len(found) >= WANTED:
            break
        for options in kind:
            compiled, seconds = attempt(run.changed(**options))
            if fits(compiled) and compiled.peak is not None:
                found.append(Change(options, compiled.peak, seconds))
                break
    return sorted(found, key=lambda change: change.seconds)[:WANTED]
