"""Characters per second of training, compared with a peer; share of the matrix-product peak; cost of input."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks import models
from experiments.common.reports import markdown_table
from hourglass_jax import HourglassConfig, HourglassLM, OptimizerConfig
from hourglass_jax.costs import training_flops
from hourglass_jax.data.corpora import builtin_text
from hourglass_jax.data.pipeline import Batch, random_windows, stream
from hourglass_jax.memory import keep_freed_memory
from hourglass_jax.tokenizers import ByteTokenizer
from hourglass_jax.training.metrics import matmul_ceiling
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.step import TrainState, compile_step, make_train_step

LENGTH, BATCH = 512, 8
DROPOUTS = (0.0, 0.1)
SERIES = 3  # consecutive steps per measurement


class Case(NamedTuple):
    """A timed case."""

    model: str
    dropout: float = 0.0
    input: str = "synthetic"


PEER = Case("peer")


class Step:
    """A training step; each call runs on the next batch and blocks until the step is done."""

    def __init__(self, config: HourglassConfig, batches: Iterator[Batch]):
        started = time.perf_counter()
        model = HourglassLM(config, rngs=nnx.Rngs(0))
        optimizer = make_optimizer(OptimizerConfig(), 1000)
        graph, params = nnx.split(model)
        self.config, self.batches = config, batches
        self.state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
        self.step = compile_step(make_train_step(graph, optimizer, seed=0), self.state, *next(batches))
        self.compile_seconds = time.perf_counter() - started

    def __call__(self) -> None:
        self.state, metrics = self.step(self.state, *next(self.batches))
        jax.block_until_ready((self.state, metrics))


def synthetic(batch: int, length: int) -> Iterator[Batch]:
    """Yield the same random batch forever."""
    tokens = np.random.default_rng(0).integers(0, 256, (batch, length + 1)).astype(np.int32)
    while True:
        yield tokens, np.ones((batch, length), np.float32)


def real() -> Iterator[Batch]:
    """Return windows of the built-in text, through the input pipeline."""
    tokens = ByteTokenizer().encode(builtin_text()).astype(np.uint8)
    return stream(random_windows(tokens, LENGTH, BATCH, seed=0), 0, 10_000)


def peer_step() -> Callable[[], None]:
    """Return a training step of the peer: eager, AdamW, without dropout, which the peer does not support."""
    import torch

    model = models.make_peer(LENGTH).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
    tokens = torch.tensor(next(synthetic(BATCH, LENGTH))[0], dtype=torch.long)

    def step() -> None:
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_step(case: Case) -> Callable[[], None]:
    """Return the step of a case."""
    if case.model == PEER.model:
        return peer_step()
    batches = real() if case.input == "real" else synthetic(BATCH, LENGTH)
    return Step(models.config(case.model, dropout=case.dropout, max_length=LENGTH), batches)


_steps: list[Callable[[], None]] = []  # holds the step of a worker process


def _begin(case: Case) -> None:
    if case.model != PEER.model:
        keep_freed_memory()  # as the launchers do
    _steps.append(make_step(case))


def _go_on() -> None:
    for _ in range(SERIES):
        _steps[0]()


def apart(case: Case) -> Callable[[], None]:
    """Return a function that runs the case's steps in a process of its own, with its own memory."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=partial(_begin, case))
    return lambda: process.submit(_go_on).result()


def measure(repeats: int, *, peer: bool) -> list[dict[str, Any]]:
    """Return a row for each case."""
    cases = [Case(name, dropout) for name in models.METHODS for dropout in DROPOUTS]
    cases.append(Case("learned", input="real"))
    if peer:
        models.find_peer()  # raises if it is missing
        cases.append(PEER)
    seconds = models.in_turn({case: apart(case) for case in cases}, repeats, warm=True)
    ceiling = matmul_ceiling("float32")
    rows = []
    for case, of_series in seconds.items():
        taken = [series / SERIES for series in of_series]
        median = statistics.median(taken)
        row = case._asdict() | {"seconds": taken}
        row |= {"characters_per_second": BATCH * LENGTH / median, "matmul_ceiling": ceiling}
        if case.model in models.METHODS:
            flops = BATCH * training_flops(models.config(case.model, max_length=LENGTH), LENGTH)
            row |= {"flops": flops, "utilisation": flops / median / ceiling}
        rows.append(row)
    return rows


def case_of(row: dict[str, Any]) -> Case:
    return Case(*(row[name] for name in Case._fields))


def paired(rows: list[dict[str, Any]], one: Case, other: Case) -> float | None:
    """Return the speed of `one` relative to `other`: the median of the ratio over rounds."""
    seconds = {case_of(row): row["seconds"] for row in rows}
    if other not in seconds:
        return None
    return statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    def times(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.2f}"

    header = [*Case._fields, "ms a step", "characters/s", "times the peer", "of the matmul ceiling"]
    cells = []
    for row in rows:
        case = case_of(row)
        milliseconds = f"{statistics.median(row['seconds']) * 1e3:,.0f}"
        share = f"{row['utilisation']:.0%}" if "utilisation" in row else ""
        beside_peer = times(paired(rows, case, PEER))
        cells.append([*case, milliseconds, f"{row['characters_per_second']:,.0f}", beside_peer, share])
    return markdown_table(header, cells)


def describe(rows: list[dict[str, Any]], repeats: int) -> str:
    dropout_costs = [f"{name} {paired(rows, Case(name), Case(name, 0.1)) - 1:+.0%}" for name in models.METHODS]
    input_cost = paired(rows, Case("learned"), Case("learned", input="real")) - 1
    ceiling = rows[0]["matmul_ceiling"] / 1e9
    peer = (
        f"""
The peer is {models.PEER}, eager, without dropout. `learned` has the peer's architecture.
"""
        if any(case_of(row) == PEER for row in rows)
        else ""
    )
    return f"""# Characters per second of training

{models.SIZES["hierarchy"]}, d_model {models.SIZES["d_model"]}, {models.SIZES["n_heads"]} heads, vocabulary 256, length
{LENGTH}, batch {BATCH}, AdamW, float32; {repeats} rounds of {2 * SERIES} steps of each case; the last {SERIES} are
timed. Each case runs in its own process. Ratios are medians over rounds, times are medians. `relative` is this
library's default.
{peer}

{table(rows)}

- Time added by dropout 0.1: {", ".join(dropout_costs)}.
- Time added by windows of a real text through the input pipeline, instead of one batch in memory: {input_cost:+.1%}.
- A square matrix product reached {ceiling:,.0f} GFLOP/s in the same run. The last column is the model's FLOP/s
  ({rows[0]["flops"] / 1e9:,.0f} GFLOP per step for `learned`, without recomputation) relative to it.
"""
