"""Curves of a run: JSON lines, TensorBoard, a picture; and what the machine can do and has used."""

from __future__ import annotations

import functools
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hourglass_jax.files import whole_file, write_whole
from hourglass_jax.nn.platform import platform

CURVES = "metrics.jsonl"
RATE = "boundary_rate"  # the name of a curve, with the number of the shortening behind it from the second on


def read_curves(directory: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a half-written last line is left out."""
    path = Path(directory) / CURVES
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class CurveWriter:
    """Appends records to the run's JSON lines and TensorBoard files; drops what lies beyond `start_step`."""

    def __init__(self, directory: Path, start_step: int = 0):
        kept = [record for record in read_curves(directory) if record["step"] <= start_step]
        write_whole(directory / CURVES, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = (directory / CURVES).open("a", buffering=1)
        from tensorboardX import SummaryWriter  # with PyTorch installed it imports that, which takes seconds

        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, **values: float) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_text(self, step: int, sample: str) -> None:
        self._file.write(json.dumps({"step": step, "sample": sample}) + "\n")
        self._board.add_text("sample", sample, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def plot_curves(directory: Path) -> Path:
    """Draws training and validation loss against steps, and how often events fire, to loss.png; returns its path."""
    from matplotlib.figure import Figure

    records = read_curves(directory)
    rates = [r for r in records if any(name.startswith(RATE) for name in r)]
    figure = Figure(figsize=(6, 6 if rates else 4), layout="constrained")
    axes, *below = figure.subplots(2 if rates else 1, sharex=True, squeeze=False)[:, 0]
    for name, style in (("train_loss", {"lw": 1}), ("valid_loss", {"marker": "o", "ms": 4})):
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    for axes in below:
        plot_rates(axes, rates)
    path = Path(directory) / "loss.png"
    with whole_file(path) as file:
        figure.savefig(file, dpi=120)
    return path


def plot_rates(axes: Any, records: list[dict[str, Any]]) -> None:
    """The events a position, with their spread over the rows of a batch, and those that found no room."""
    for level in sorted(name.removeprefix(RATE) for name in records[0] if name.startswith(RATE)):
        names = "step", RATE + level, f"boundary_spread{level}", f"boundary_suppressed{level}"
        steps, rates, spreads, suppressed = ([r[name] for r in records] for name in names)
        low, high = ([rate + sign * spread for rate, spread in zip(rates, spreads, strict=True)] for sign in (-1, 1))
        shortening = f", shortening {level[1:]}" if level else ""
        axes.fill_between(steps, low, high, alpha=0.2, lw=0)
        axes.plot(steps, rates, lw=1, label=f"groups a position{shortening}")
        axes.plot(steps, suppressed, lw=1, label=f"share without room{shortening}")
    axes.set(xlabel="step", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


@functools.cache
def matmul_ceiling(dtype: str) -> float:
    """Floating-point operations a second that one device reaches on a large square matrix product, measured."""
    n = 1024 if platform() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):  # the first compiles
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds[1:])


def peak_memory_bytes() -> int:
    """The most memory a device of this process has held so far; on a CPU, the process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
