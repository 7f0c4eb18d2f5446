"""Speed beside the PyPI package hourglass-transformer-pytorch, at the same sizes and in the same run.

pip install -e ".[bench]" && python experiments/benchmark.py --report=experiments/results/decoding/cpu
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from experiments import launcher
from experiments.reports import PACKAGES, markdown_table, provenance, write_report
from hourglass_jax import HourglassConfig, HourglassLM, UsageError, generate

LENGTHS = flags.DEFINE_list("lengths", ["128", "512", "1024", "2048", "4096"], "Characters to generate.")
BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Texts at a time; the first also beside the peer.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Each figure is a median of so many.", lower_bound=1)
PEER = flags.DEFINE_boolean("peer", True, "Measure the peer too (needs the extra [bench]).")
REPORT = flags.DEFINE_string("report", "", "Write PATH.json, PATH.md and PATH.png.")

SIZES = {"vocab_size": 256, "hierarchy": "2@1 4@4 2@1", "d_model": 256, "n_heads": 8, "d_ff": 1024}
# The peer's resampling with learned positions is the same architecture; the other is this library's default.
MODELS = {
    "learned": {"shortening": "attention_average", "upsampling": "attention_repeat", "positions": "learned"},
    "relative": {"shortening": "attention_average", "upsampling": "attention_linear", "positions": "relative"},
}
PEER_LENGTHS = (1, 64, 256, 512, 1024, 2048, 4096)  # where the peer's cost is measured; linear in between


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def make_peer(max_length: int) -> Callable[[int], None]:
    """A function that lets the peer compute the next character's logits after n characters."""
    import math

    try:
        import hourglass_transformer_pytorch.hourglass_transformer_pytorch as peer
        import torch
    except ImportError as error:
        raise UsageError(f"{error}; pip install -e '.[bench]', or give --nopeer") from None
    peer.math = math  # which it uses without importing it, at lengths that are no multiple of its factor
    model = peer.HourglassTransformerLM(
        num_tokens=256, dim=256, max_seq_len=max_length, depth=(2, 4, 2), shorten_factor=4, heads=8, dim_head=32
    ).eval()

    def step(n: int) -> None:
        with torch.no_grad():
            model(torch.zeros((1, n), dtype=torch.long))[:, -1]

    return step


def measure_ours(model: HourglassLM, batch: int, length: int, key: jax.Array) -> float:
    prompts = [[i % 256] for i in range(batch)]
    return seconds(lambda: generate(model, prompts, max_tokens=length, key=key))


def measure(lengths: list[int], batches: list[int]) -> list[dict[str, Any]]:
    """One row a measurement: who, batch, length, seconds of each repeat."""
    models = {
        name: HourglassLM(HourglassConfig(**SIZES, **options, max_length=max(lengths) + 1), rngs=nnx.Rngs(0))
        for name, options in MODELS.items()
    }
    rows = [
        {"model": name, "batch": batch, "length": length, "seconds": []}
        for name in models
        for batch in batches
        for length in (lengths if batch == batches[0] else [n for n in lengths if n <= 512])
    ]
    peer = make_peer(max(lengths)) if PEER.value else None
    peer_lengths = [n for n in PEER_LENGTHS if n <= max(lengths)]
    steps: dict[int, list[float]] = {n: [] for n in peer_lengths}
    for repeat in range(REPEATS.value + 1):  # the first compiles
        for row in rows:
            taken = measure_ours(models[row["model"]], row["batch"], row["length"], jax.random.key(repeat))
            row["seconds"] += [taken] if repeat else []
        for n in peer_lengths if peer else []:
            taken = seconds(lambda n=n: peer(n))
            steps[n] += [taken] if repeat else []
        print(f"repeat {repeat} of {REPEATS.value} done", flush=True)
    if peer:
        medians = [statistics.median(steps[n]) for n in peer_lengths]
        for length in lengths:
            total = float(np.interp(np.arange(1, length + 1), peer_lengths, medians).sum())
            rows.append({"model": "peer", "batch": 1, "length": length, "seconds": [total]})
    for row in rows:
        row["characters_per_second"] = row["batch"] * row["length"] / statistics.median(row["seconds"])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with the ratios to the peer and to one text at a time, at the same length."""
    speeds = {(row["model"], row["batch"], row["length"]): row["characters_per_second"] for row in rows}

    def ratio(row: dict[str, Any], other: tuple[str, int, int]) -> str:
        return f"{row['characters_per_second'] / speeds[other]:.1f}" if other in speeds else ""

    header = ["model", "batch", "characters generated", "characters/s", "times the peer", "times batch 1"]
    cells = []
    for row in rows:
        model, batch, length = row["model"], row["batch"], row["length"]
        speed = f"{row['characters_per_second']:,.1f}"
        beside_peer = ratio(row, ("peer", batch, length))
        cells.append([model, batch, length, speed, beside_peer, ratio(row, (model, 1, length)) if batch > 1 else ""])
    return markdown_table(header, cells)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in dict.fromkeys(row["model"] for row in rows):
        points = [
            (row["length"], row["characters_per_second"]) for row in rows if row["model"] == name and row["batch"] == 1
        ]
        label = "hourglass-transformer-pytorch" if name == "peer" else f"hourglass_jax, {name} positions"
        axes.loglog(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="characters generated", ylabel="characters/s, batch 1")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(_: list[str]) -> None:
    rows = measure([int(n) for n in LENGTHS.value], [int(n) for n in BATCHES.value])
    print(table(rows))
    if REPORT.value:
        path = Path(REPORT.value)
        text = f"""# Characters per second of generation

{SIZES["hierarchy"]}, d_model {SIZES["d_model"]}, {SIZES["n_heads"]} heads, vocabulary {SIZES["vocab_size"]}, float32,
from a prompt of one character; medians of {REPEATS.value} runs, compilation left out. The peer
(hourglass-transformer-pytorch) runs the whole model for every character: its cost was timed at
{", ".join(map(str, PEER_LENGTHS))} characters and summed, linear in between.
`learned` is the peer's architecture, `relative` this library's default.

{table(rows)}

![characters per second]({path.name}.png)
"""
        packages = (*PACKAGES, "torch", "hourglass-transformer-pytorch") if PEER.value else PACKAGES
        write_report(path, provenance(packages) | {"sizes": SIZES, "models": MODELS, "rows": rows}, text)
        plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    launcher.run(main)
