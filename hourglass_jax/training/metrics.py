"""Curves of a run (JSON lines, TensorBoard, a figure), matrix-product speed and peak memory."""

from __future__ import annotations

import functools
import json
import socket
import statistics
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp

from hourglass_jax.files import optional_output, whole_file, write_whole
from hourglass_jax.nn.platform import platform

CURVES = "metrics.jsonl"
RATE = "boundary_rate"  # name of a curve; the second shortening has boundary_rate_2


def read_curves(directory: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first, without incomplete lines."""
    path = Path(directory) / CURVES
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


class CurveWriter:
    """Append-only writer of metrics.jsonl and TensorBoard files; it first removes records after `start_step`.

    If a file cannot be written, one warning is logged, and later records try again.
    """

    def __init__(self, directory: Path, start_step: int = 0):
        path, board = directory / CURVES, directory / "tensorboard"
        with optional_output(path):
            kept = [record for record in read_curves(directory) if record["step"] <= start_step]
            write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        with optional_output(board):
            board.mkdir(exist_ok=True)
        self._lines = _AppendedFile(path)
        self._events = _AppendedFile(board / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
        self._events.append(tf_record(0, file_version="brain.Event:2"))
        self._events.append(tf_record(start_step + 1, session_log={"status": "START"}))  # TensorBoard drops later steps

    def write(self, step: int, **values: float) -> None:
        self._lines.append(json.dumps({"step": step, **values}).encode() + b"\n")
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._events.append(tf_record(step, summary={"value": scalars}))

    def write_text(self, step: int, sample: str) -> None:
        self._lines.append(json.dumps({"step": step, "sample": sample}).encode() + b"\n")
        text = {"dtype": "DT_STRING", "string_val": [sample.encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        value = {"tag": "sample/text_summary", "metadata": {"plugin_data": {"plugin_name": "text"}}, "tensor": text}
        self._events.append(tf_record(step, summary={"value": [value]}))

    def close(self) -> None:
        self._lines.close()
        self._events.close()


class _AppendedFile:
    """Append complete records to a file; the buffer keeps records that a full disk rejects."""

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[bytes] | None = None
        self._waiting: list[bytes] = []  # until the file can be opened

    def append(self, record: bytes) -> None:
        self._waiting.append(record)
        with optional_output(self._path):
            self._file = self._file or self._path.open("ab")
            while self._waiting:
                self._file.write(self._waiting.pop(0))
            self._file.flush()

    def close(self) -> None:
        if self._file:
            with optional_output(self._path):
                self._file.close()


def tf_record(step: int, **fields: Any) -> bytes:
    """Return a TensorBoard event with its length and checksums.

    tensorboardX's own writer uses a thread that ends on a full disk; later events would then block forever.
    """
    from tensorboardX.proto.event_pb2 import Event  # slow: it imports PyTorch if that is installed
    from tensorboardX.record_writer import masked_crc32c

    event = Event(step=step, wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(event))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), event, struct.pack("<I", masked_crc32c(event))))


def plot_curves(directory: Path) -> Path:
    """Plot losses and boundary rates against steps to loss.png; return its path."""
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
    with optional_output(path), whole_file(path) as file:
        figure.savefig(file, dpi=120)
    return path


def plot_rates(axes: Any, records: list[dict[str, Any]]) -> None:
    """Plot boundaries per position, their spread over the rows of a batch, and the suppressed fraction."""
    for level in sorted(name.removeprefix(RATE) for name in records[0] if name.startswith(RATE)):
        names = "step", RATE + level, f"boundary_spread{level}", f"boundary_suppressed{level}"
        steps, rates, spreads, suppressed = ([r[name] for r in records] for name in names)
        low, high = ([rate + sign * spread for rate, spread in zip(rates, spreads, strict=True)] for sign in (-1, 1))
        shortening = f", shortening {level[1:]}" if level else ""
        axes.fill_between(steps, low, high, alpha=0.2, lw=0)
        axes.plot(steps, rates, lw=1, label=f"groups per position{shortening}")
        axes.plot(steps, suppressed, lw=1, label=f"suppressed fraction{shortening}")
    axes.set(xlabel="step", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


@functools.cache
def matmul_ceiling(dtype: str) -> float:
    """Measure the FLOP/s of one device on a large square matrix product."""
    n = 1024 if platform() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):  # the first one compiles
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds[1:])


def peak_memory_bytes() -> int:
    """Return the peak memory of any device of this process; on a CPU, that of the process, or 0 on Windows."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    try:
        import resource
    except ImportError:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
