"""Timing: runs that take turns, a training step, and what rows of a benchmark have in common."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from hourglass_jax import HourglassConfig, HourglassLM, OptimizerConfig
from hourglass_jax.costs import product_flops
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.step import compile_step, first_state, make_train_step

ADAMW = OptimizerConfig()
Name = TypeVar("Name", bound=Hashable)


def in_turn(
    runs: Mapping[Name, Callable[[], Any]],
    repeats: int,
    *,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    check: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Return the seconds of `repeats` calls of each run; the runs take turns, since a machine's speed drifts.

    An additional first round is not counted.
    warm: an untimed call precedes each timed one, so that its data is in the caches.
    check: called before each run; may raise.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            check()
            if warm:
                run()
            started = clock()
            run()
            if repeat:
                seconds[name].append(clock() - started)
        print(f"round {repeat} of {repeats} done", file=sys.stderr, flush=True)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return how many times as fast `ours` is as `theirs`: the median of the ratio over rounds."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def timed(seconds: list[float], characters: int, **names: Any) -> dict[str, Any]:
    """Return the row of a benchmark: its names, its times, and the characters per second at the median time."""
    return names | {"seconds": seconds, "characters_per_second": characters / statistics.median(seconds)}


class Step:
    """A compiled training step; each call runs on the next batch and blocks until the step is done.

    compile_seconds: time to create the state and to compile.
    memory_bytes: of state, batch and temporaries.
    """

    def __init__(self, config: HourglassConfig, batches: Iterator[Batch], optimizer_config: OptimizerConfig = ADAMW):
        started = time.perf_counter()
        self.config = config
        optimizer = make_optimizer(optimizer_config, 1000)
        self.graph, params = nnx.split(nnx.jit(lambda rngs: HourglassLM(config, rngs=rngs))(nnx.Rngs(0)))
        self.state = jax.jit(partial(first_state, optimizer=optimizer))(params)
        self.train_step = make_train_step(self.graph, optimizer, seed=0)
        first = next(batches)
        self.batches = itertools.chain([first], batches)
        self.step = compile_step(self.train_step, self.state, *first)
        self.compile_seconds = time.perf_counter() - started
        memory = self.step.memory_analysis()
        parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
        self.memory_bytes = sum(parts) - memory.alias_size_in_bytes

    def __call__(self) -> None:
        self.state, metrics = self.step(self.state, *next(self.batches))
        jax.block_until_ready((self.state, metrics))

    def counted_flops(self) -> float:
        """Return the FLOPs of the matrix products in the step's program."""
        return product_flops(self.train_step.trace(self.state, *next(self.batches)).jaxpr.jaxpr)


def synthetic(batch: int, length: int, vocab_size: int = 256) -> Iterator[Batch]:
    """Yield the same random batch forever."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch, length + 1)).astype(np.int32)
    while True:
        yield tokens, np.ones((batch, length), np.float32)
