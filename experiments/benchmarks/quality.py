"""Bits of held-out text against minutes of training: this library's recipes and a peer, one after another.

All train on the same batches of the same text, at a constant rate after a warmup, so that every minute is comparable.
Compilation and evaluation do not count.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax import nnx

from experiments.benchmarks import models
from experiments.common.reports import markdown_table
from experiments.common.timing import Step
from hourglass_jax import HourglassConfig, OptimizerConfig, UsageError
from hourglass_jax.data.corpora import builtin_text
from hourglass_jax.data.pipeline import Batch, consecutive_windows, evenly_spaced, random_windows
from hourglass_jax.evaluation import evaluate_batches
from hourglass_jax.recipes import RECIPES
from hourglass_jax.tokenizers import ByteTokenizer

LENGTH, BATCH, WARMUP, N_VALID = 512, 8, 50, 16  # N_VALID: batches of validation
VALID_SHARE = 0.1
MARKS, SHOWN = 20, (2, 4, 10, 20)  # evaluations of a training, evenly spaced, and those in the table
PEER_RATES = (3e-4, 1e-3, 3e-3)
RATES = {"paper": 1e-3, "modern": 3e-3}
FACTS = {"sizes": models.SIZES, "length": LENGTH, "batch": BATCH}


class Case(NamedTuple):
    model: str  # a recipe, or the peer
    rate: float


class Trainer(Protocol):
    """A model in training."""

    def __call__(self) -> None:
        """Take one step on the next batch, and wait until it is done."""

    def bits(self, batches: Sequence[Batch]) -> float:
        """Return the bits per byte of the batches."""


class Ours(Step):
    """This library's model and optimizer of a recipe; compiled when constructed."""

    def __init__(self, recipe: str, rate: float, batches: Iterator[Batch]):
        options = RECIPES[recipe]
        config = HourglassConfig(**models.SIZES, max_length=LENGTH, initialization="xavier", **options.model)
        schedule = OptimizerConfig(learning_rate=rate, schedule="constant", warmup_steps=WARMUP, **options.optimizer)
        super().__init__(config, batches, schedule)

    def bits(self, batches: Sequence[Batch]) -> float:
        model = nnx.merge(self.graph, self.state.params)
        model.eval()
        return evaluate_batches(model, batches).bits_per_character


class Peer:
    """The peer's model at the same sizes, with PyTorch's AdamW."""

    def __init__(self, rate: float, batches: Iterator[Batch]):
        import torch

        torch.manual_seed(0)
        self.torch, self.model, self.batches = torch, models.make_peer(LENGTH), batches
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / WARMUP, total_iters=WARMUP)

    def loss(self, tokens: np.ndarray) -> Any:
        tokens = self.torch.tensor(tokens, dtype=self.torch.long)
        logits = self.model(tokens[:, :-1])
        return self.torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])

    def __call__(self) -> None:
        tokens, _ = next(self.batches)
        self.model.train()
        self.loss(tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def bits(self, batches: Sequence[Batch]) -> float:
        self.model.eval()
        with self.torch.no_grad():
            return float(np.mean([self.loss(tokens) for tokens, _ in batches])) / np.log(2)


def cases(peer: bool) -> list[Case]:
    return [Case(*item) for item in RATES.items()] + [Case(models.PEER, rate) for rate in PEER_RATES if peer]


def curve(trainer: Trainer, valid: Sequence[Batch], minutes: float) -> dict[str, Any]:
    """Return the bits before training and at each of the marks, and the number of steps."""
    times, bits, seconds, n_steps = [0.0], [trainer.bits(valid)], 0.0, 0
    for mark in range(1, MARKS + 1):
        while seconds < 60 * minutes * mark / MARKS:
            started = time.perf_counter()
            trainer()
            seconds += time.perf_counter() - started
            n_steps += 1
        times.append(seconds / 60)
        bits.append(trainer.bits(valid))
    return {"minutes": times, "bits": bits, "steps": n_steps}


def read_text(path: str) -> np.ndarray:
    """Return the bytes of a text; empty: the built-in one."""
    return np.fromfile(path, np.uint8) if path else ByteTokenizer().encode(builtin_text()).astype(np.uint8)


def split(text: np.ndarray) -> tuple[np.ndarray, Sequence[Batch]]:
    """Return the text to train on, and whole batches of the rest. Raises UsageError if there is none."""
    n_train = round(len(text) * (1 - VALID_SHARE))
    n_whole = (len(text) - n_train - 1) // (BATCH * LENGTH) * BATCH * LENGTH  # the peer's loss has no weights
    if n_whole <= 0:
        least = math.ceil((BATCH * LENGTH + 2) / VALID_SHARE)
        raise UsageError(f"the text of {len(text):,} bytes is too short; give one of at least {least:,} as --data_path")
    valid = consecutive_windows(text[n_train : n_train + n_whole + 1], LENGTH, BATCH)
    return text[:n_train], evenly_spaced(valid, N_VALID)


def measure(minutes: float, peer: bool, data_path: str) -> list[dict[str, Any]]:
    """Return a row with the curve of each case."""
    if peer:
        models.make_peer(LENGTH)  # raises if it is missing
    text = read_text(data_path)
    train, valid = split(text)
    batch_at = random_windows(train, LENGTH, BATCH, seed=0)
    facts = {"text_bytes": len(text), "predictions": len(valid) * BATCH * LENGTH}
    rows: list[dict[str, Any]] = []
    for case in cases(peer):
        batches = map(batch_at, itertools.count())
        trainer: Trainer = Peer(case.rate, batches) if case.model == models.PEER else Ours(*case, batches)
        rows.append(case._asdict() | facts | curve(trainer, valid, minutes))
        print(f"{case.model}, rate {case.rate:g}: {rows[-1]['bits'][-1]:.3f} bits", flush=True)
    return rows


def minutes_to(row: dict[str, Any], bits: float) -> float:
    """Return the minute at which a curve first reaches `bits`; infinite if it does not."""
    return next((m for m, b in zip(row["minutes"], row["bits"], strict=True) if b <= bits), np.inf)


def best_peer(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    peers = [row for row in rows if row["model"] == models.PEER]
    return min(peers, key=lambda row: row["bits"][-1]) if peers else None


def describe(rows: list[dict[str, Any]], minutes: float) -> str:
    peer = best_peer(rows)
    marks = [f"{minutes * mark / MARKS:g} min" for mark in SHOWN]
    header = ["model", "rate", "steps", *marks, "minutes to the peer's last bits"]
    about_peer = f"The peer is {models.PEER} with AdamW, at {len(PEER_RATES)} rates; ours" if peer else "The models"
    cells = []
    for row in rows:
        bits = [f"{row['bits'][mark]:.3f}" for mark in SHOWN]
        reached = f"{minutes_to(row, peer['bits'][-1]):.1f}" if peer else ""
        cells.append([row["model"], f"{row['rate']:g}", f"{row['steps']:,}", *bits, reached])
    return f"""# Bits per byte against minutes of training

{models.SIZES["hierarchy"]}, {models.WIDTH}, {BATCH} x {LENGTH} bytes a step of a text of {rows[0]["text_bytes"]:,}
bytes, of which the last {VALID_SHARE:.0%} are for validation ({rows[0]["predictions"]:,} predictions). A constant
rate after {WARMUP} steps of warmup. {about_peer} are the recipes {" and ".join(RATES)}, at one rate each.
Compilation and evaluation do not count.

{markdown_table(header, cells)}
"""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw bits against minutes; of the peer, only the best rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row["model"] != models.PEER or row is best_peer(rows):
            axes.plot(row["minutes"][1:], row["bits"][1:], marker=".", label=f"{row['model']}, rate {row['rate']:g}")
    axes.set(xlabel="minutes of training", ylabel="bits per byte of held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
