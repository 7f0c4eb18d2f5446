"""Characters per second of training and decoding with data-dependent groups, compared with fixed groups."""

from __future__ import annotations

import statistics
from typing import Any

from flax import nnx

from experiments.benchmarks import models
from experiments.benchmarks.training import BATCH, LENGTH, real
from experiments.common.reports import markdown_table
from experiments.common.timing import Step, in_turn, ratio, timed
from hourglass_jax import HourglassConfig, HourglassLM
from hourglass_jax.costs import training_flops

HIERARCHY = "2@1 4@6 2@1"
FACTS = {"sizes": models.SIZES | {"hierarchy": HIERARCHY}}
FIXED, WHITESPACE, TOKENS = "fixed", "whitespace", "tokens"
# Boundary tokens: a sixth of the vocabulary, which the model samples uniformly.
LISTED = tuple(range(models.SIZES["vocab_size"] // 6))
BATCHES = (1, 4, 16)
NEW = 512  # new tokens per row


def config(boundaries: str) -> HourglassConfig:
    options = {"hierarchy": HIERARCHY, "shortening": "average", "upsampling": "repeat", "max_length": LENGTH + 1}
    listed = {"boundaries": boundaries, "boundary_tokens": LISTED if boundaries == TOKENS else ()}
    return HourglassConfig(**models.SIZES | options | listed)


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each kind of boundaries in training, and for each batch in decoding."""
    rows = []
    steps = {name: Step(config(name), real()) for name in (FIXED, WHITESPACE)}
    for name, seconds in in_turn(steps, repeats).items():
        flops = BATCH * training_flops(config(name), LENGTH)
        rows.append(timed(seconds, BATCH * LENGTH, task="training", boundaries=name, batch=BATCH, flops=flops))
    decoders = {name: HourglassLM(config(name), rngs=nnx.Rngs(0)) for name in (FIXED, TOKENS)}
    runs = {(name, n): models.generation(model, n, NEW) for name, model in decoders.items() for n in BATCHES}
    for (name, batch), seconds in in_turn(runs, repeats).items():
        rows.append(timed(seconds, batch * NEW, task="decoding", boundaries=name, batch=batch))
    return rows


def describe(rows: list[dict[str, Any]], repeats: int) -> str:
    header = ["", "boundaries", "batch", "GFLOPs a step", "ms", "characters/s", "times fixed"]
    fixed = {(row["task"], row["batch"]): row["seconds"] for row in rows if row["boundaries"] == FIXED}
    cells = []
    for row in rows:
        flops = f"{row['flops'] / 1e9:,.1f}" if "flops" in row else ""
        speed = (f"{statistics.median(row['seconds']) * 1e3:,.0f}", f"{row['characters_per_second']:,.0f}")
        times = f"{ratio(row['seconds'], fixed[row['task'], row['batch']]):.2f}"
        cells.append([row["task"], row["boundaries"], row["batch"], flops, *speed, times])
    return f"""# Speed with data-dependent groups

{HIERARCHY}, {models.WIDTH}, average and repeat, relative positions, float32;
{repeats} runs of each in turn, without compilation; ratios are medians over rounds, times are medians. Training: a step
of {BATCH} windows of {LENGTH} bytes of real text, AdamW; FLOPs include unused room for groups. Decoding: {NEW} tokens
per row from an untrained model, which samples tokens almost uniformly. A sixth of the vocabulary ends a group, so rows
end groups at different steps.

{markdown_table(header, cells)}
"""
