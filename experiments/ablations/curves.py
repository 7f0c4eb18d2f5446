"""Learning curves of plain and Hourglass models at equal FLOPs.

A curve is one training at a constant learning rate, divided into legs that end at POINTS (scale gpu: WIDE.points). At
BRANCHES, a branch lets the rate decay to 0, as a training of that length would. Each leg is a run directory that starts
from the last checkpoint of the previous leg. So a leg equals one uninterrupted run with its settings, up to rounding.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.ablations.costs import UTILISATION, step_flops
from experiments.ablations.rows import (
    Job,
    fit_job,
    row_config,
    row_directory,
    save_result,
    setup_source,
    start_job,
    valid_sample,
)
from experiments.ablations.scales import Setup
from experiments.ablations.table import Row, resampling
from experiments.common.reports import markdown_table
from experiments.common.sources import ImageSource, TextSource
from hourglass_jax import HourglassConfig, HourglassLM, RuntimeConfig, UsageError, score
from hourglass_jax.costs import count_parameters
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.ranges import check_choice
from hourglass_jax.training.checkpoints import CHECKPOINTS, CheckpointStore, write_manifest
from hourglass_jax.training.metrics import CURVES, matmul_ceiling
from hourglass_jax.training.run import Run, RunBusy
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import Diverged

LOSSES = "losses.npy"  # nats per prediction of each validation sequence
POINTS = tuple(millions * 10**6 for millions in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100))  # characters
BRANCHES = tuple(millions * 10**6 for millions in (5, 10, 20, 50, 100))  # of POINTS
DECAY = 0.1  # steps of a branch, relative to the steps before it


@dataclass(frozen=True)
class Pair:
    """A plain transformer and Hourglass models of nearly its FLOPs per step: within 5 %, or 13 % in `WIDE`."""

    plain: Row
    rivals: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return (self.plain, *self.rivals)


def plain(hierarchy: str) -> Row:
    return Row(hierarchy, {"hierarchy": hierarchy})


def light(hierarchy: str) -> Row:
    return Row(f"{hierarchy} light", resampling("average", "repeat") | {"hierarchy": hierarchy})


def attention(hierarchy: str) -> Row:
    options = resampling("attention_average", "attention_linear") | {"hierarchy": hierarchy}
    return Row(f"{hierarchy} attention", options)


def whitespace(hierarchy: str) -> Row:
    options = resampling("average", "repeat") | {"hierarchy": hierarchy, "boundaries": "whitespace"}
    return Row(f"{hierarchy} whitespace", options)


PAIRS = (
    Pair(plain("6@1"), (attention("2@1 4@3 2@1"), light("2@1 8@3 2@1"))),
    Pair(plain("6@1"), (whitespace("2@1 9@6 2@1"), light("2@1 10@4 2@1"), light("2@1 15@6 2@1"))),
    Pair(plain("8@1"), (attention("3@1 4@3 3@1"), light("3@1 8@3 3@1"))),
    Pair(plain("10@1"), (attention("3@1 10@3 3@1"), light("4@1 8@3 4@1"))),
)


@dataclass(frozen=True)
class Course:
    """The pairs of a scale, and its legs' ends and branches in characters."""

    pairs: tuple[Pair, ...]
    points: tuple[int, ...]
    branches: tuple[int, ...]


WIDE = Course(
    pairs=(
        Pair(plain("6@1"), (attention("2@1 4@3 2@1"), light("2@1 8@4 2@1"), whitespace("2@1 10@6 2@1"))),
        Pair(plain("9@1"), (attention("3@1 8@4 3@1"),)),
        Pair(plain("6@1"), (attention("2@1 8@4 2@1"),)),
    ),
    points=(30 * 10**6, 100 * 10**6, 300 * 10**6),
    branches=(30 * 10**6, 100 * 10**6, 300 * 10**6),
)


def course(setup: Setup) -> Course:
    """Return the curves of a setup."""
    return WIDE if setup.wide else Course(PAIRS, POINTS, BRANCHES)


@dataclass(frozen=True)
class Leg:
    """One run of a curve: to one of the course's points, or the decayed branch there; it resumes the job `before`."""

    point: int
    decayed: bool
    job: Job
    before: Job | None

    @property
    def characters(self) -> int:
        """Characters seen since the start of the curve."""
        return self.job.train.steps * step_characters(self.job.setup)

    @property
    def steps(self) -> int:
        """Steps of this leg, without earlier legs."""
        return self.job.train.steps - (self.before.train.steps if self.before else 0)


def step_characters(setup: Setup) -> int:
    return setup.data.batch_size * setup.data.block_size


def curve(row: Row, setup: Setup, directory: Path, seed: int) -> Iterator[Leg]:
    """Yield the legs of a row in training order."""
    config = row_config(row, setup)
    place = row_directory(row, config, directory) / f"seed{seed}"
    before, its_course = None, course(setup)
    for point in its_course.points:
        steps = round(point / step_characters(setup))
        trunk = make_job(row, config, setup, place / f"{point}-constant", seed, steps)
        yield Leg(point, False, trunk, before)
        if point in its_course.branches:
            decay = max(round(DECAY * steps), 1)
            yield Leg(point, True, make_job(row, config, setup, place / f"{point}-decayed", seed, steps, decay), trunk)
        before = trunk


def make_job(
    row: Row, config: HourglassConfig, setup: Setup, directory: Path, seed: int, steps: int, decay_steps: int = 0
) -> Job:
    """Return a job of `steps` at a constant rate and `decay_steps` of decay, evaluated at the end."""
    train = replace(setup.train, steps=steps + decay_steps, eval_interval=steps + decay_steps, seed=seed)
    optimizer = replace(setup.optimizer, schedule="constant", decay_steps=decay_steps)
    return Job(row, "bpc", config, train, replace(setup, optimizer=optimizer), directory)


def plan(setup: Setup, directory: Path, n_seeds: int, only: Collection[str] = (), characters: int = 0) -> list[Leg]:
    """Return the legs of all pairs without repetition, pair by pair, short legs first.

    only: names of the rows to train; empty: all.
    characters: skip legs beyond this point; 0: none.

    Raises UsageError for an unknown name.
    """
    for name in only:
        check_choice("rows", name, [row.name for pair in course(setup).pairs for row in pair.rows])
    found: dict[Path, Leg] = {}
    for pair in course(setup).pairs:
        rows = [row for row in pair.rows if not only or row.name in only]
        for seed in range(n_seeds):
            curves = (curve(row, setup, directory, seed) for row in rows)
            for leg in itertools.chain.from_iterable(zip(*curves, strict=True)):
                found.setdefault(leg.job.directory, leg)
    return [leg for leg in found.values() if not characters or leg.point <= characters]


def plan_table(legs: Sequence[Leg]) -> str:
    """Return the curves as Markdown, with their progress and estimated cost."""
    by_curve: dict[Path, list[Leg]] = {}
    for leg in legs:
        by_curve.setdefault(leg.job.directory.parent, []).append(leg)
    lines, hours = [], 0.0
    for own in by_curve.values():
        job, flops = own[0].job, step_flops(own[0].job)
        waiting = [leg for leg in own if leg.job.result() is None]
        steps = sum(leg.steps for leg in waiting)
        hours += steps * flops / (UTILISATION * matmul_ceiling(job.config.dtype)) / 3600
        reached = max((leg.point for leg in own if not leg.decayed and leg not in waiting), default=0)
        size = f"{count_parameters(job.config) / 1e6:.3f}M"
        to_go = steps * step_characters(job.setup)
        lines.append((job.row.name, job.train.seed, size, f"{flops / 1e9:.2f}", f"{reached:,}", f"{to_go:,}"))
    header = ("row", "seed", "parameters", "GFLOPs a step", "characters reached", "to go, with branches")
    return f"{markdown_table(header, lines)}\n\n{hours:,.1f} hours to go, estimated"


def train(legs: Sequence[Leg], setup: Setup, runtime: RuntimeConfig, signals: Signals) -> None:
    """Train the unfinished legs, always the first one that can start; several processes may share the work."""
    if jax.process_count() > 1:
        raise UsageError("--curves trains each curve in one process; use --workers instead of --coordinator")
    source = setup_source(setup, [leg.job for leg in legs])
    validation = valid_sample(source, setup)
    diverged: list[str] = []

    def trained(leg: Leg) -> bool:
        try:
            return train_if_ready(leg, source, validation, runtime, signals)
        except Diverged as error:
            print(error, flush=True)
            diverged.append(str(leg.job.directory))
            return False

    while any(trained(leg) for leg in legs if str(leg.job.directory) not in diverged):
        pass
    print(f"{sum(leg.job.result() is not None for leg in legs)} of {len(legs)} legs are done")
    if diverged:
        raise UsageError(f"{len(diverged)} legs diverged, so the legs after them cannot start: {', '.join(diverged)}")


def train_if_ready(
    leg: Leg, source: TextSource | ImageSource, validation: Sequence[Batch], runtime: RuntimeConfig, signals: Signals
) -> bool:
    """Train a leg if it is unfinished, free, and the previous leg is done; return whether it did."""
    if leg.job.result() is not None or (leg.before and leg.before.result() is None):
        return False
    run = Run(leg.job.directory)
    try:
        return train_leg(leg, run, source, validation, runtime, signals)
    except RunBusy:
        return False
    finally:
        run.release()


def train_leg(
    leg: Leg,
    run: Run,
    source: TextSource | ImageSource,
    validation: Sequence[Batch],
    runtime: RuntimeConfig,
    signals: Signals,
) -> bool:
    """Train a leg, and save the result of its last parameters, in total and per sequence.

    Returns False if another process has finished it meanwhile. Raises RunBusy if another process trains it.
    """
    job = leg.job
    if start_job(job, run, source, runtime) is not None:
        return False
    print(job.directory, flush=True)
    if leg.before:
        inherit(leg.before.directory, job.directory)
    model, _ = fit_job(job, run, source, validation[: job.train.eval_batches], runtime, signals)
    losses = sequence_losses(model, validation, signals)
    np.save(job.directory / LOSSES, losses)
    bits = float(losses.mean(dtype=np.float64) / math.log(2))
    save_result(job, {job.metric: bits}, losses.size * job.setup.data.block_size, model, validation)
    print(f"{leg.characters:,} characters: {job.metric} {bits:.4f}", flush=True)
    return True


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


def sequence_losses(model: HourglassLM, batches: Sequence[Batch], signals: Signals) -> np.ndarray:
    """Return the mean loss of each complete sequence in nats per prediction: float32 [N]."""
    losses = []
    for tokens, weights in batches:
        signals.check()
        whole = weights.all(axis=1)
        losses.append((np.asarray(sums(model, tokens, weights)) / weights.shape[1])[whole])
    return np.concatenate(losses)
