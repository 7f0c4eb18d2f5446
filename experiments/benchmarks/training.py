"""Characters per second of training, compared with a peer; share of the matrix-product peak; cost of input."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import models
from experiments.common.reports import markdown_table
from experiments.common.timing import Step, in_turn, ratio, synthetic, timed
from hourglass_jax.costs import training_flops
from hourglass_jax.data.corpora import builtin_text
from hourglass_jax.data.pipeline import Batch, random_windows, stream
from hourglass_jax.memory import keep_freed_memory
from hourglass_jax.tokenizers import ByteTokenizer
from hourglass_jax.training.metrics import matmul_ceiling

FACTS = {"sizes": models.SIZES, "models": models.METHODS}
LENGTH, BATCH = 512, 8
DROPOUTS = (0.0, 0.1)
SERIES = 3  # consecutive steps per measurement


class Case(NamedTuple):
    """A timed case."""

    model: str
    dropout: float = 0.0
    input: str = "synthetic"


PEER, REAL = Case("peer"), Case("learned", input="real")


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


_steps: list[Callable[[], None]] = []  # holds the step of a worker process


def _begin(case: Case) -> None:
    if case == PEER:
        _steps.append(peer_step())
        return
    keep_freed_memory()  # as the launchers do
    config = models.config(case.model, dropout=case.dropout, max_length=LENGTH)
    _steps.append(Step(config, real() if case.input == "real" else synthetic(BATCH, LENGTH)))


def _run_series() -> None:
    for _ in range(SERIES):
        _steps[0]()


def apart(case: Case) -> Callable[[], None]:
    """Return a function that runs the case's steps in a process of its own, with its own memory."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=partial(_begin, case))
    return lambda: process.submit(_run_series).result()


def measure(repeats: int, peer: bool) -> list[dict[str, Any]]:
    """Return a row for each case."""
    cases = [Case(name, dropout) for name in models.METHODS for dropout in DROPOUTS] + [REAL]
    if peer:
        models.make_peer(LENGTH)  # raises if it is missing
        cases.append(PEER)
    seconds = in_turn({case: apart(case) for case in cases}, repeats, warm=True)
    ceiling = matmul_ceiling("float32")
    rows = []
    for case, of_series in seconds.items():
        row = timed([series / SERIES for series in of_series], BATCH * LENGTH, **case._asdict(), matmul_ceiling=ceiling)
        if case != PEER:
            row["flops"] = BATCH * training_flops(models.config(case.model, max_length=LENGTH), LENGTH)
            row["utilisation"] = row["flops"] / statistics.median(row["seconds"]) / ceiling
        rows.append(row)
    return rows


def describe(rows: list[dict[str, Any]], repeats: int) -> str:
    of_case = {Case(*(row[name] for name in Case._fields)): row for row in rows}
    seconds = {case: row["seconds"] for case, row in of_case.items()}
    header = [*Case._fields, "ms a step", "characters/s", "times the peer", "of the matmul ceiling"]
    cells = []
    for case, row in of_case.items():
        speed = (f"{statistics.median(row['seconds']) * 1e3:,.0f}", f"{row['characters_per_second']:,.0f}")
        beside_peer = f"{ratio(seconds[case], seconds[PEER]):.2f}" if PEER in seconds else ""
        cells.append([*case, *speed, beside_peer, f"{row['utilisation']:.0%}" if "utilisation" in row else ""])
    peer = f"The peer is {models.PEER}, eager, without dropout. `learned` has the peer's architecture.\n\n"
    added = {name: ratio(seconds[Case(name)], seconds[Case(name, 0.1)]) - 1 for name in models.METHODS}
    input_cost = ratio(seconds[Case("learned")], seconds[REAL]) - 1
    ceiling = rows[0]["matmul_ceiling"] / 1e9
    return f"""# Characters per second of training

{models.SIZES["hierarchy"]}, {models.WIDTH}, vocabulary 256, length
{LENGTH}, batch {BATCH}, AdamW, float32; {repeats} rounds of {2 * SERIES} steps of each case; the last {SERIES} are
timed. Each case runs in its own process. Ratios are medians over rounds, times are medians. `relative` is this
library's default.

{peer if PEER in seconds else ""}{markdown_table(header, cells)}

- Time added by dropout 0.1: {", ".join(f"{name} {share:+.0%}" for name, share in added.items())}.
- Time added by windows of a real text through the input pipeline, instead of one batch in memory: {input_cost:+.1%}.
- A square matrix product reached {ceiling:,.0f} GFLOP/s in the same run. The last column is the model's FLOP/s
  ({rows[0]["flops"] / 1e9:,.0f} GFLOP per step for `learned`, without recomputation) relative to it.
"""
