"""Cost of rows: estimated and measured."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.ablations.rows import Job, row_config
from experiments.ablations.scales import Setup, find_setup
from experiments.ablations.tables import TABLE_1
from experiments.common.reports import markdown_table, provenance, read_record
from hourglass_jax import HourglassConfig, HourglassLM, OptimizerConfig
from hourglass_jax.costs import (
    activation_bytes,
    cache_bytes,
    count_parameters,
    forward_flops,
    product_flops,
    state_bytes,
    training_flops,
)
from hourglass_jax.files import write_whole
from hourglass_jax.training.metrics import matmul_ceiling
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.step import TrainState, make_train_step

COST = "cost.json"  # in a configuration's directory, beside its seeds
ROUNDS = 15  # of all configurations
UTILISATION = 0.33  # assumed share of the matrix-product ceiling, for estimates


def plan_table(jobs: Sequence[Job], setup: Setup) -> str:
    """Return the rows as Markdown, with their estimated cost and their state."""
    ceiling = matmul_ceiling(jobs[0].config.dtype) * jax.device_count()
    rows, hours = [], 0.0
    for job in jobs:
        flops = step_flops(job)
        seconds = job.train.steps * flops / (UTILISATION * ceiling)
        memory = state_bytes(job.config) + activation_bytes(job.config, setup.data.block_size, setup.data.batch_size)
        done = job.result() is not None
        hours += 0 if done else seconds / 3600
        rows.append(
            (
                job.row.name,
                job.train.seed,
                f"{count_parameters(job.config) / 1e6:.2f}M",
                f"{flops / 1e9:.1f}",
                f"{memory / 1e6:,.0f}",
                f"{job.train.steps:,}",
                f"{seconds / 60:,.1f}",
                "done" if done else "to train",
            )
        )
    header = ("row", "seed", "parameters", "GFLOPs a step", "memory MB", "steps", "minutes", "state")
    kind = f"{UTILISATION:.0%} of the {ceiling / 1e9:,.0f} GFLOP/s that matrix products reach here"
    return f"{markdown_table(header, rows)}\n\n{hours:,.1f} hours to go, at {kind}; memory is a lower bound"


def configs(job: Job) -> list[HourglassConfig]:
    """Return the configurations that a job trains: one, or one for each drawn shorten factor."""
    hierarchies = [str(job.config.parsed_hierarchy.with_shorten_factor(k)) for k in job.train.shorten_factors]
    return [replace(job.config, hierarchy=hierarchy) for hierarchy in hierarchies] or [job.config]


def step_flops(job: Job) -> float:
    """Return the FLOPs of a training step, averaged over drawn shorten factors."""
    data = job.setup.data
    return data.batch_size * statistics.mean(training_flops(config, data.block_size) for config in configs(job))


def measure(jobs: Sequence[Job], signals: Signals) -> None:
    """Measure time and memory of a training step of each configuration, and save them in its directory.

    The configurations take turns, so that other load on the machine affects all of them alike.
    """
    steps: dict[Path, list[TimedStep]] = {}
    for job in jobs:
        directory, data = job.directory.parent, job.setup.data
        if directory not in steps:
            signals.check()
            steps[directory] = [TimedStep(config, data.batch_size, data.block_size) for config in configs(job)]
            print(f"{directory.name}: compiled", flush=True)
    for _ in range(ROUNDS):
        for step in itertools.chain.from_iterable(steps.values()):
            signals.check()
            step.run()
    for directory, at_each_factor in steps.items():
        cost = {
            "step_seconds": statistics.mean(statistics.median(step.seconds) for step in at_each_factor),
            "memory_bytes": max(step.memory_bytes for step in at_each_factor),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / COST, json.dumps(cost | {"measured": provenance()}, indent=1) + "\n")
        print(
            f"{directory.name}: {cost['step_seconds']:.3f} s a step, {cost['memory_bytes'] / 1e6:,.0f} MB", flush=True
        )


class TimedStep:
    """A compiled training step: its bytes (state, batch and temporaries), FLOPs of matrix products, and run times.

    It keeps all activations, as in the paper: deep stacks are neither scanned nor rematerialized.
    """

    def __init__(self, config: HourglassConfig, batch_size: int, block_size: int):
        config = replace(config, remat="none", max_unrolled_layers=100)
        graph, params = nnx.split(nnx.jit(lambda rngs: HourglassLM(config, rngs=rngs))(nnx.Rngs(0)))
        optimizer = make_optimizer(OptimizerConfig(), 1000)
        self.state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, block_size + 1))
        self.batch = tokens.astype(np.int32), np.ones((batch_size, block_size), np.float32)
        traced = make_train_step(graph, optimizer, seed=0).trace(self.state, *self.batch)
        self.flops = product_flops(traced.jaxpr.jaxpr)
        self.step = traced.lower().compile()
        memory = self.step.memory_analysis()
        parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
        self.memory_bytes = sum(parts) - memory.alias_size_in_bytes
        self.seconds: list[float] = []

    def run(self) -> None:
        """Run a warm-up step and a timed one."""
        for _ in range(2):
            started = time.perf_counter()
            self.state, _ = jax.block_until_ready(self.step(self.state, *self.batch))
            seconds = time.perf_counter() - started
        self.seconds.append(seconds)


def read_cost(directory: Path) -> dict[str, Any] | None:
    return read_record(directory / COST)


def costs_table() -> str:
    """Return Table 1 as Markdown: parameters beside the paper's, then the costs of one sequence.

    Activations are given with all of them kept, as in the paper, and with deep stacks rematerialized, as run.
    """
    header = ("hierarchy", "parameters", "paper", "ratio", "forward GFLOPs", "activations MB", "as run MB", "cache MB")
    rows = []
    setup = find_setup("enwik8", "paper")
    length = setup.data.block_size
    for row in TABLE_1.rows:
        if not row.paper:
            continue
        config = row_config(row, setup)
        theirs = row.paper["parameters_millions"]
        millions = count_parameters(config) / 1e6
        gigaflops = sum(forward_flops(config, length).values()) / 1e9
        kept = activation_bytes(replace(config, max_unrolled_layers=100), length) / 1e6
        as_run = activation_bytes(config, length) / 1e6
        # A cache's length is a multiple of the total factor.
        factor = config.parsed_hierarchy.total_factor
        cache = cache_bytes(config, -(-length // factor) * factor) / 1e6
        rows.append(
            (
                row.name,
                f"{millions:.2f}M",
                f"{theirs}M",
                f"{millions / theirs:.3f}",
                f"{gigaflops:.0f}",
                f"{kept:.0f}",
                f"{as_run:.0f}",
                f"{cache:.1f}",
            )
        )
    return markdown_table(header, rows)
