"""Characters per second of training and decoding with data-dependent groups, compared with fixed groups."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import jax
from flax import nnx

from experiments.benchmarks import models
from experiments.benchmarks.training import BATCH, LENGTH, Step, real
from experiments.common.reports import markdown_table
from hourglass_jax import HourglassConfig, HourglassLM, generate
from hourglass_jax.costs import training_flops

HIERARCHY = "2@1 4@6 2@1"
FIXED, WHITESPACE, TOKENS = "fixed", "whitespace", "tokens"
LISTED = tuple(
    range(models.SIZES["vocab_size"] // 6)
)  # boundary tokens: a sixth of the vocabulary, which the model samples uniformly
BATCHES = (1, 4, 16)
NEW = 512  # new tokens per row


def config(boundaries: str) -> HourglassConfig:
    return HourglassConfig(
        **models.SIZES | {"hierarchy": HIERARCHY},
        shortening="average",
        upsampling="repeat",
        boundaries=boundaries,
        boundary_tokens=LISTED if boundaries == TOKENS else (),
        max_length=LENGTH + 1,
    )


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each kind of boundaries in training, and for each batch in decoding."""
    steps = {name: Step(config(name), real()) for name in (FIXED, WHITESPACE)}
    trained = models.in_turn(steps, repeats)
    rows = [
        {
            "task": "training",
            "boundaries": name,
            "batch": BATCH,
            "seconds": seconds,
            "characters_per_second": BATCH * LENGTH / statistics.median(seconds),
            "flops": BATCH * training_flops(steps[name].config, LENGTH),
        }
        for name, seconds in trained.items()
    ]
    runs = {}
    for name in (FIXED, TOKENS):
        model = HourglassLM(config(name), rngs=nnx.Rngs(0))
        for batch in BATCHES:
            prompts = [[i % 256] for i in range(batch)]
            runs[name, batch] = partial(generate, model, prompts, max_tokens=NEW, key=jax.random.key(0))
    decoded = models.in_turn(runs, repeats)
    return rows + [
        {
            "task": "decoding",
            "boundaries": name,
            "batch": batch,
            "seconds": seconds,
            "characters_per_second": batch * NEW / statistics.median(seconds),
        }
        for (name, batch), seconds in decoded.items()
    ]


def times_fixed(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """Return the speed relative to fixed groups: the median of the ratio over rounds."""
    [fixed] = (r for r in rows if (r["task"], r["batch"], r["boundaries"]) == (row["task"], row["batch"], FIXED))
    return statistics.median(a / b for a, b in zip(fixed["seconds"], row["seconds"], strict=True))


def describe(rows: list[dict[str, Any]], repeats: int) -> str:
    header = ["", "boundaries", "batch", "GFLOPs a step", "ms", "characters/s", "times fixed"]
    cells = [
        [
            row["task"],
            row["boundaries"],
            row["batch"],
            f"{row['flops'] / 1e9:,.1f}" if "flops" in row else "",
            f"{statistics.median(row['seconds']) * 1e3:,.0f}",
            f"{row['characters_per_second']:,.0f}",
            f"{times_fixed(rows, row):.2f}",
        ]
        for row in rows
    ]
    sizes = models.SIZES
    return f"""# Speed with data-dependent groups

{HIERARCHY}, d_model {sizes["d_model"]}, {sizes["n_heads"]} heads, average and repeat, relative positions, float32;
{repeats} runs of each in turn, without compilation; ratios are medians over rounds, times are medians. Training: a step
of {BATCH} windows of {LENGTH} bytes of real text, AdamW; FLOPs include unused room for groups. Decoding: {NEW} tokens
per row from an untrained model, which samples tokens almost uniformly. A sixth of the vocabulary ends a group, so rows
end groups at different steps.

{markdown_table(header, cells)}
"""
