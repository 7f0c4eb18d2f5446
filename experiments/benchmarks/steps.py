"""The steps suite: time and kernels of a decoding step on an accelerator, beside the time to read weights and cache.

A step is one token of each row, in the loop of `generate`, with a cache of a fixed number of tokens. Each part adds a
row to the record, and the same command resumes with the first part that has no row.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.accelerator import POSITIONS, Accelerator, Part, Row, Tables, render
from experiments.benchmarks.device import kernels_of, launched, memory_bandwidth
from experiments.benchmarks.programs import Programs
from experiments.common.timing import in_turn, timed
from hourglass_jax import HourglassConfig, HourglassLM, generation
from hourglass_jax.costs import cache_bytes, count_parameters
from hourglass_jax.prompts import round_up

BATCHES = (1, 16, 256)
SHARES = (8, 1)  # cache lengths as parts of the model's length: 512 and 4,096


def parts(sizes: Accelerator, repeats: int, done: Collection[str] = ()) -> dict[str, Part]:
    """Return the parts by name, in the order in which they run; those of `done` are not compiled."""
    found = {
        f"step {positions} {batch} {sizes.length // share}": (positions, batch, sizes.length // share)
        for share, positions, batch in itertools.product(SHARES, POSITIONS[:2], BATCHES)
    }
    programs = Programs({name: partial(Loop, sizes, *case) for name, case in found.items() if name not in done})
    return {name: partial(time_steps, sizes, programs, name, repeats) for name in found}


class Loop:
    """`generation.BLOCK` steps of `generate` with a cache for `length` tokens; each call continues the last one.

    The cache is empty at first; a step reads all of it anyway.
    """

    def __init__(self, sizes: Accelerator, positions: str, batch: int, length: int):
        self.config = sizes.config(positions=positions)
        factor = self.config.shared_factor
        self.batch, self.length = batch, round_up(length, factor)
        abstract = jax.eval_shape(self.split)
        graph = abstract[0]
        self.params = jax.jit(lambda: self.split()[1])
        no_token = np.zeros(self.config.vocab_size, bool)
        self.plan = generation.SamplingPlan(
            generation.MAX_NEW_TOKENS, no_token, no_token, generation.Sampler(), self.length, factor
        )
        self.rows = generation._Rows(
            jnp.zeros((batch, factor), jnp.int32),
            jnp.ones(batch, jnp.int32),
            jax.random.split(jax.random.key(0), batch),
        )
        self.state = jax.jit(lambda params: self.first_state(graph, params))
        self.steps = jnp.array([0, generation.BLOCK], jnp.int32)
        arguments = (abstract[1], self.plan, self.rows, jax.eval_shape(self.state, abstract[1]), self.steps)
        self.program = generation._extend.lower(graph, *arguments).compile()

    def split(self) -> generation.Split:
        return generation._unstacked.__wrapped__(*nnx.split(HourglassLM(self.config, rngs=nnx.Rngs(0))))

    def first_state(self, graph: nnx.GraphDef, params: nnx.State) -> generation._State:
        cache = nnx.merge(graph, params).init_cache(self.batch, self.length)
        return generation._State(cache, jnp.zeros(self.batch, jnp.int32), jnp.zeros(self.batch, bool))

    def start(self) -> Callable[[], None]:
        """Return a function that decodes, with parameters and a cache on the device."""
        params = self.params()
        state = self.state(params)

        def run() -> None:
            nonlocal state
            state, tokens = self.program(params, self.plan, self.rows, state, self.steps)
            jax.block_until_ready((state, tokens))

        return run


def time_steps(sizes: Accelerator, programs: Programs, name: str, repeats: int) -> Row:
    loop = programs[name]
    run = loop.start()
    [seconds] = in_turn({name: run}, repeats).values()
    kernels = kernels_of(run)
    row = {
        "kind": "step",
        "busy": sum(kernel.seconds for kernel in kernels) / generation.BLOCK,
        "floors": floors(loop.config, loop.batch, loop.length),
        **launched(kernels, generation.BLOCK),
    }
    return timed([each / generation.BLOCK for each in seconds], loop.batch, **row)


def floors(config: HourglassConfig, batch: int, length: int) -> list[float]:
    """Return the seconds to read all weights once, and to read weights and cache; empty if the bandwidth is unknown."""
    bandwidth = memory_bandwidth()
    weights = count_parameters(config) * jnp.dtype(config.dtype).itemsize
    cache = cache_bytes(config, length, batch)
    return [n / bandwidth for n in (weights, weights + cache)] if bandwidth else []


def describe(record: Mapping[str, Any], sizes: Accelerator, n_parts: int) -> str:
    """Return the finished parts as Markdown."""
    about = (
        f"{sizes.hierarchy}, d_model {sizes.d_model}, {sizes.n_heads} heads, {sizes.dtype}. Floors are the time to "
        "read all weights, and weights and cache, once at the vendor's bandwidth; deeper levels run in some steps only."
    )
    return render("# Decoding steps on an accelerator", about, record, n_parts, ROWS)


def cells(name: str, row: Row) -> list[list[Any]]:
    microseconds = [f"{x * 1e6:,.0f}" for x in (statistics.median(row["seconds"]), row["busy"], *row["floors"])]
    microseconds += [""] * (4 - len(microseconds))
    return [[*name.split(" ")[1:], f"{row['characters_per_second']:,.0f}", f"{row['launches']:.0f}", *microseconds]]


ROWS: Tables = {
    "step": (
        "## A step, microseconds",
        ["positions", "batch", "cache", "characters/s", "kernels", "time", "kernels busy", "floor", "floor with cache"],
        cells,
    ),
}
