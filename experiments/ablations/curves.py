"""Learning curves of plain and Hourglass models at equal FLOPs.

A curve is one training at a constant learning rate, divided into legs that end at the points of its course. At the
branches, a leg lets the rate decay to 0, as a training of that length would. Each leg is a run directory that starts
from the last checkpoint of the previous leg. So a leg equals one uninterrupted run with its settings, up to rounding.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.ablations.rows import Job, row_config, row_directory
from experiments.ablations.scales import Setup
from experiments.ablations.table import Row, resampling
from hourglass_jax import Evaluation, HourglassLM, UsageError, score
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.ranges import check_choice
from hourglass_jax.training.checkpoints import CHECKPOINTS, CheckpointStore, write_manifest
from hourglass_jax.training.metrics import CURVES

LOSSES = "losses.npy"  # nats per prediction of each validation sequence
LIGHT = resampling("average", "repeat")
DECAY = 0.1  # steps of a branch, relative to the steps before it


@dataclass(frozen=True)
class Pair:
    """A plain transformer and Hourglass models of nearly its FLOPs per step: narrow within 5 %, wide within 13 %."""

    plain: Row
    rivals: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return (self.plain, *self.rivals)


def plain(hierarchy: str, name: str = "", **options: str) -> Row:
    return Row(f"{hierarchy} {name}".strip(), {**options, "hierarchy": hierarchy})


light = partial(plain, name="light", **LIGHT)
attention = partial(plain, name="attention", **resampling("attention_average", "attention_linear"))
whitespace = partial(plain, name="whitespace", **LIGHT, boundaries="whitespace")


@dataclass(frozen=True)
class Course:
    """What a scale trains: pairs, and the characters at which legs end and branches start."""

    pairs: tuple[Pair, ...]
    points: tuple[int, ...]
    branches: tuple[int, ...]  # of the points

    @property
    def rows(self) -> list[Row]:
        return [row for pair in self.pairs for row in pair.rows]


def millions(*numbers: int) -> tuple[int, ...]:
    return tuple(number * 10**6 for number in numbers)


COURSES = {
    "narrow": Course(  # equal FLOPs at scale micro
        pairs=(
            Pair(plain("6@1"), (attention("2@1 4@3 2@1"), light("2@1 8@3 2@1"))),
            Pair(plain("6@1"), (whitespace("2@1 9@6 2@1"), light("2@1 10@4 2@1"), light("2@1 15@6 2@1"))),
            Pair(plain("8@1"), (attention("3@1 4@3 3@1"), light("3@1 8@3 3@1"))),
            Pair(plain("10@1"), (attention("3@1 10@3 3@1"), light("4@1 8@3 4@1"))),
        ),
        points=millions(1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100),
        branches=millions(5, 10, 20, 50, 100),
    ),
    "wide": Course(  # at scale gpu
        pairs=(
            Pair(plain("6@1"), (attention("2@1 4@3 2@1"), light("2@1 8@4 2@1"), whitespace("2@1 10@6 2@1"))),
            Pair(plain("9@1"), (attention("3@1 8@4 3@1"),)),
            Pair(plain("6@1"), (attention("2@1 8@4 2@1"),)),
        ),
        points=millions(30, 100, 300),
        branches=millions(30, 100, 300),
    ),
}


@dataclass(frozen=True)
class Leg(Job):
    """One training of a curve: to a point of its course, or the decayed branch there; it resumes the leg `before`."""

    point: int
    decayed: bool
    before: Leg | None

    @property
    def name(self) -> str:
        return f"{self.row.name}, {self.directory.name}"

    @property
    def steps(self) -> int:
        return self.train.steps - (self.before.train.steps if self.before else 0)

    @property
    def ready(self) -> bool:
        if jax.process_count() > 1:
            raise UsageError("--curves trains each curve in one process; use --workers instead of --coordinator")
        return self.before is None or self.before.result() is not None

    @property
    def characters(self) -> int:
        """Characters seen since the start of the curve."""
        return self.train.steps * step_characters(self.setup)

    def begin(self) -> None:
        if self.before:
            inherit(self.before.directory, self.directory)

    def figures(self, model: HourglassLM, evaluation: Evaluation, validation: Sequence[Batch]) -> dict[str, float]:
        """Return the bits of complete sequences, and save the losses of each of them."""
        losses = sequence_losses(model, validation)
        np.save(self.directory / LOSSES, losses)
        return {self.metric: float(losses.mean(dtype=np.float64) / math.log(2))}


def step_characters(setup: Setup) -> int:
    return setup.data.batch_size * setup.data.block_size


def curve(row: Row, setup: Setup, directory: Path, seed: int) -> Iterator[Leg]:
    """Yield the legs of a row in training order: each at a constant rate and, for a branch, with a decay at its end."""
    config = row_config(row, setup)
    place = row_directory(row, config, directory) / f"seed{seed}"

    def leg(point: int, kind: str, steps: int, decay_steps: int, before: Leg | None) -> Leg:
        total = steps + decay_steps  # evaluated once, at the end
        train = replace(setup.train, steps=total, eval_interval=total, seed=seed)
        optimizer = replace(setup.optimizer, schedule="constant", decay_steps=decay_steps)
        own = replace(setup, optimizer=optimizer)
        return Leg(row, "bpc", config, train, own, place / f"{point}-{kind}", point, decay_steps > 0, before)

    course, trunk = COURSES[setup.course], None
    for point in course.points:
        steps = round(point / step_characters(setup))
        trunk = leg(point, "constant", steps, 0, trunk)
        yield trunk
        if point in course.branches:
            yield leg(point, "decayed", steps, max(round(DECAY * steps), 1), trunk)


def plan(setup: Setup, directory: Path, n_seeds: int, only: Collection[str] = (), characters: int = 0) -> list[Leg]:
    """Return the legs of all pairs without repetition, pair by pair, short legs first.

    only: names of the rows to train; empty: all.
    characters: skip legs beyond this point; 0: none.

    Raises UsageError for an unknown name.
    """
    for name in only:
        check_choice("rows", name, [row.name for row in COURSES[setup.course].rows])
    found: dict[Path, Leg] = {}
    for pair, seed in itertools.product(COURSES[setup.course].pairs, range(n_seeds)):
        curves = (curve(row, setup, directory, seed) for row in pair.rows if not only or row.name in only)
        for leg in itertools.chain.from_iterable(zip(*curves, strict=True)):
            found.setdefault(leg.directory, leg)
    return [leg for leg in found.values() if not characters or leg.point <= characters]


def inherit(parent: Path, directory: Path) -> None:
    """Copy the last checkpoint of `parent` and its curves into a run without checkpoints.

    The copy has no validation loss, so that a run's best checkpoint is always its own.
    """
    places = [path / CHECKPOINTS for path in (parent, directory)]
    if places[1].is_dir():
        return
    store = CheckpointStore(parent)
    step = store.sound_step()
    store.close()
    unfinished = directory / f"{CHECKPOINTS}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(places[0] / str(step), unfinished / str(step))
    write_manifest(unfinished / str(step))
    shutil.copy(parent / CURVES, directory / CURVES)
    unfinished.rename(places[1])


@nnx.jit
def sums(model: HourglassLM, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    return -(score(model, tokens) * weights).sum(axis=1)


def sequence_losses(model: HourglassLM, batches: Sequence[Batch]) -> np.ndarray:
    """Return the mean loss of each complete sequence in nats per prediction: float32 [N]."""
    losses = []
    for tokens, weights in batches:
        whole = weights.all(axis=1)
        losses.append((np.asarray(sums(model, tokens, weights)) / weights.shape[1])[whole])
    return np.concatenate(losses)
