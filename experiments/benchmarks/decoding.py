"""Characters per second of generation, compared with a peer that runs the whole model for every character."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from experiments.benchmarks import models
from experiments.common.reports import markdown_table
from experiments.common.timing import in_turn, timed
from hourglass_jax import HourglassLM

FACTS = {"sizes": models.SIZES, "models": models.METHODS}
PEER_LENGTHS = (1, 64, 256, 512, 1024, 2048, 4096)  # at which the peer is timed; others are interpolated


def peer_step(model: Any, n: int) -> None:
    """Compute the next character's logits after n characters."""
    import torch

    with torch.no_grad():
        model(torch.zeros((1, n), dtype=torch.long))[:, -1]


def measure(repeats: int, peer: bool, lengths: list[int], batches: list[int]) -> list[dict[str, Any]]:
    """Return a row for each model, batch and length; the peer only with batch 1."""
    runs: dict[tuple[str, int, int], Any] = {}
    for name in models.METHODS:
        model = HourglassLM(models.config(name, max_length=max(lengths) + 1), rngs=nnx.Rngs(0))
        for batch in batches:
            for length in lengths if batch == batches[0] else [n for n in lengths if n <= 512]:
                runs[name, batch, length] = models.generation(model, batch, length)
    peer_lengths = sorted({n for n in PEER_LENGTHS if n < max(lengths)} | {max(lengths)}) if peer else []
    if peer:
        peer_model = models.make_peer(max(lengths)).eval()
        runs |= {("peer", 0, n): partial(peer_step, peer_model, n) for n in peer_lengths}
    seconds = in_turn(runs, repeats)
    rows = [
        timed(taken, batch * length, model=name, batch=batch, length=length)
        for (name, batch, length), taken in seconds.items()
        if batch
    ]
    steps = [statistics.median(seconds["peer", 0, n]) for n in peer_lengths]
    for length in lengths if peer else ():
        total = float(np.interp(np.arange(1, length + 1), peer_lengths, steps).sum())
        rows.append(timed([total], length, model="peer", batch=1, length=length, timed_at=peer_lengths))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, with the ratios to the peer and to batch 1 at the same length."""
    speeds = {(row["model"], row["batch"], row["length"]): row["characters_per_second"] for row in rows}
    header = ["model", "batch", "characters generated", "characters/s", "times the peer", "times batch 1"]
    cells = []
    for (model, batch, length), speed in speeds.items():
        others = [("peer", batch, length), *([(model, 1, length)] if batch > 1 else [])]
        ratios = [f"{speed / speeds[other]:.1f}" if other in speeds else "" for other in others]
        cells.append([model, batch, length, f"{speed:,.1f}", *ratios, *[""] * (2 - len(ratios))])
    return markdown_table(header, cells)


def describe(rows: list[dict[str, Any]], repeats: int) -> str:
    timed_at = next((row["timed_at"] for row in rows if row["model"] == "peer"), ())
    peer = (
        f"""The peer
({models.PEER}) runs the whole model for every character: its time was measured at
{", ".join(map(str, timed_at))} characters, interpolated linearly and summed. `learned` is the peer's architecture."""
        if timed_at
        else "The peer was not measured."
    )
    return f"""# Characters per second of generation

{models.SIZES["hierarchy"]}, {models.WIDTH}, vocabulary {models.SIZES["vocab_size"]}, float32,
from a prompt of one character; medians of {repeats} runs in turn, without compilation. {peer}
`relative` is this library's default.

{table(rows)}
"""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw characters per second against the length."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        batch = min(row["batch"] for row in own)
        points = [(row["length"], row["characters_per_second"]) for row in own if row["batch"] == batch]
        label = models.PEER if name == "peer" else f"hourglass_jax, {name} positions"
        axes.loglog(*zip(*points, strict=True), marker="o", label=f"{label}, batch {batch}")
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, map(str, lengths))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="characters generated", ylabel="characters/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
