"""Speed of each trick of `hourglass_jax.nn.cpu`, compared with the plain code that it replaces."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import jax
from flax import nnx

from experiments.benchmarks import models
from experiments.common.reports import markdown_table
from experiments.common.timing import Step, in_turn, ratio, synthetic
from hourglass_jax import HourglassConfig, HourglassLM
from hourglass_jax.nn import cpu
from hourglass_jax.nn.cache import Cache
from hourglass_jax.nn.transformer import Stack

HIERARCHY = "1@1 1@4 1@1"
FACTS = {"sizes": models.SIZES | {"hierarchy": HIERARCHY}}
BATCH, LENGTH = 8, 512  # of the training step
NEW, CONTEXT = 64, 2048  # decoding: tokens per run, tokens in the cache
ON = "on"
# The plain code that each trick replaces.
PLAIN: dict[str, Callable[..., Any]] = {
    "on_matrix": lambda function, x: function(x),
    "batch_parts": lambda batch, heads: 1,
    "in_own_branch": lambda function, always, x, *rest: function(x, *rest),
}


def config(**options: Any) -> HourglassConfig:
    return HourglassConfig(**models.SIZES | {"hierarchy": HIERARCHY, "max_length": CONTEXT} | options)


class Decode:
    """Decode NEW random tokens with a cache for CONTEXT tokens; a call blocks until it is done."""

    def __init__(self, config: HourglassConfig):
        model = HourglassLM(config, rngs=nnx.Rngs(0))
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Stack):
                module.unstack()
        graph, params = nnx.split(model)
        tokens = jax.random.randint(jax.random.key(0), (NEW, 1), 0, config.vocab_size)
        self.inputs = params, tokens, model.init_cache(1, CONTEXT)

        @jax.jit
        def decode(params: nnx.State, tokens: jax.Array, cache: Cache) -> jax.Array:
            def step(cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
                logits, cache = nnx.merge(graph, params).step(tokens, cache)
                return cache, logits

            return jax.lax.scan(step, cache, tokens)[1]

        self.decode = decode

    def __call__(self) -> None:
        jax.block_until_ready(self.decode(*self.inputs))


TASKS = {
    "training step": (
        lambda: Step(config(max_length=LENGTH), synthetic(BATCH, LENGTH)),
        ("on_matrix", "batch_parts"),
    ),
    "decoding": (lambda: Decode(config()), ("in_own_branch",)),
}


def compiled(make: Callable[[], Callable[[], None]], trick: str) -> Callable[[], None]:
    """Return the compiled run of a task with one trick replaced by plain code, or with all tricks for ON."""
    jax.clear_caches()
    plain = nullcontext() if trick == ON else mock.patch.object(cpu, trick, PLAIN[trick])
    with plain:  # a task is traced when it is made, or when it first runs
        run = make()
        run()
    return run


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each task with all tricks, and for each of its tricks without it."""
    rows = []
    for task, (make, tricks) in TASKS.items():
        runs = {trick: compiled(make, trick) for trick in (ON, *tricks)}
        seconds = in_turn(runs, repeats, clock=time.process_time)
        rows += [{"task": task, "without": trick, "seconds": taken} for trick, taken in seconds.items()]
    return rows


def describe(rows: list[dict[str, Any]], repeats: int) -> str:
    on = {row["task"]: row["seconds"] for row in rows if row["without"] == ON}
    cells = []
    for task, trick, seconds in ((row["task"], row["without"], row["seconds"]) for row in rows):
        if trick != ON:
            times = [f"{statistics.median(each) * 1e3:,.0f}" for each in (on[task], seconds)]
            cells.append([task, f"`{trick}`", *times, f"{ratio(on[task], seconds):.2f}"])
    header = ["task", "trick", "CPU ms with all tricks", "CPU ms without this one", "times as fast"]
    return f"""# Tricks for XLA:CPU, on and off

Each row compares a task with all tricks of `hourglass_jax/nn/cpu.py` and without one of them, in one process:
{repeats} runs of each in turn, without compilation. Times are medians of processor time, summed over threads, which
other processes affect little. `times as fast` is the median of the ratio over rounds. Model: {HIERARCHY},
{models.WIDTH}, relative positions, float32. Training: one AdamW step on {BATCH} rows of
{LENGTH} tokens. Decoding: {NEW} tokens per row, with a cache for {CONTEXT}.

{markdown_table(header, cells)}
"""
