"""Cost of rows: estimated and measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from experiments.ablations.rows import Job, row_config
from experiments.ablations.scales import find_setup
from experiments.ablations.tables import TABLE_1
from experiments.common.reports import markdown_table, provenance
from experiments.common.timing import ADAMW, Step, in_turn, synthetic
from hourglass_jax import HourglassConfig, OptimizerConfig
from hourglass_jax.costs import activation_bytes, cache_bytes, count_parameters, forward_flops, state_bytes
from hourglass_jax.files import write_whole
from hourglass_jax.training.metrics import matmul_ceiling
from hourglass_jax.training.signals import Signals

COST = "cost.json"  # in a configuration's directory, beside its seeds
ROUNDS = 15  # of all configurations
UTILISATION = 0.33  # assumed share of the matrix-product ceiling, for estimates


def plan_table(jobs: Sequence[Job]) -> str:
    """Return the jobs as Markdown, with their estimated cost and their state."""
    ceiling = matmul_ceiling(jobs[0].config.dtype) * jax.device_count()
    header = ("row", "seed", "parameters", "GFLOPs a step", "memory MB", "steps", "minutes", "state")
    rows, hours = [], 0.0
    for job in jobs:
        flops, data, done = job.step_flops(), job.setup.data, job.result() is not None
        minutes = job.steps * flops / (UTILISATION * ceiling) / 60
        memory = state_bytes(job.config) + activation_bytes(job.config, data.block_size, data.batch_size)
        hours += 0 if done else minutes / 60
        size = f"{count_parameters(job.config) / 1e6:.2f}M"
        cost = (f"{flops / 1e9:.1f}", f"{memory / 1e6:,.0f}", f"{job.steps:,}", f"{minutes:,.1f}")
        rows.append((job.name, job.train.seed, size, *cost, "done" if done else "to train"))
    kind = f"{UTILISATION:.0%} of the {ceiling / 1e9:,.0f} GFLOP/s that matrix products reach here"
    return f"{markdown_table(header, rows)}\n\n{hours:,.1f} hours to go, at {kind}; memory is a lower bound"


def keeping_activations(config: HourglassConfig) -> HourglassConfig:
    """Return a configuration that keeps all activations, as in the paper: no stack is scanned or rematerialized."""
    return replace(config, remat="none", max_unrolled_layers=100)


def timed_step(config: HourglassConfig, batch_size: int, block_size: int, optimizer: OptimizerConfig = ADAMW) -> Step:
    return Step(keeping_activations(config), synthetic(batch_size, block_size, config.vocab_size), optimizer)


def measure(jobs: Sequence[Job], signals: Signals) -> None:
    """Measure time and memory of a training step of each configuration, and save them in its directory.

    The configurations take turns, so that other load on the machine affects all of them alike.
    """
    steps: dict[tuple[Path, HourglassConfig], Step] = {}
    for job in jobs:
        for config in job.configs():
            if (job.directory.parent, config) not in steps:
                signals.check()
                data, optimizer = job.setup.data, job.setup.optimizer
                steps[job.directory.parent, config] = timed_step(config, data.batch_size, data.block_size, optimizer)
                print(f"{job.directory.parent.name}: compiled", flush=True)
    seconds = in_turn(steps, ROUNDS, warm=True, check=signals.check)
    for directory in dict.fromkeys(directory for directory, _ in steps):
        own = [key for key in steps if key[0] == directory]  # one for each drawn shorten factor
        cost: dict[str, Any] = {
            "step_seconds": statistics.mean(statistics.median(seconds[key]) for key in own),
            "memory_bytes": max(steps[key].memory_bytes for key in own),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / COST, json.dumps(cost | {"measured": provenance()}, indent=1) + "\n")
        words = f"{cost['step_seconds']:.3f} s a step, {cost['memory_bytes'] / 1e6:,.0f} MB"
        print(f"{directory.name}: {words}", flush=True)


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
        theirs, millions = row.paper["parameters_millions"], count_parameters(config) / 1e6
        factor = config.parsed_hierarchy.total_factor  # a cache's length is a multiple of it
        costs = (
            sum(forward_flops(config, length).values()) / 1e9,
            activation_bytes(keeping_activations(config), length) / 1e6,
            activation_bytes(config, length) / 1e6,
        )
        cache = cache_bytes(config, -(-length // factor) * factor) / 1e6
        shown = (f"{millions:.2f}M", f"{theirs}M", f"{millions / theirs:.3f}", *(f"{cost:.0f}" for cost in costs))
        rows.append((row.name, *shown, f"{cache:.1f}"))
    return markdown_table(header, rows)
