"""Training of rows: each a run directory that `hourglass_jax.load` reads, and its result."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments.ablations.scales import BYTES, Setup, for_table
from experiments.ablations.table import Row, Table
from experiments.common import launcher
from experiments.common.reports import provenance, read_record
from experiments.common.sources import ImageSource, TextSource
from hourglass_jax import (
    Evaluation,
    HourglassConfig,
    HourglassLM,
    RuntimeConfig,
    TrainConfig,
    UsageError,
    at_shorten_factor,
)
from hourglass_jax.costs import training_flops
from hourglass_jax.data import letters
from hourglass_jax.data.pipeline import Batch, BatchAt, LazyBatches, evenly_spaced
from hourglass_jax.evaluation import accuracy, evaluate_batches
from hourglass_jax.files import write_whole
from hourglass_jax.inspection import GroupCounts, count_groups
from hourglass_jax.ranges import check_choice
from hourglass_jax.training.identity import describe, differences, identity
from hourglass_jax.training.optimizer import optimizer_flops
from hourglass_jax.training.run import Run, RunBusy
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import Diverged, fit

RESULT = "result.json"


@dataclass(frozen=True)
class Job:
    """One training: a row and a seed. Tables share jobs of equal configurations."""

    row: Row
    metric: str
    config: HourglassConfig
    train: TrainConfig
    setup: Setup
    directory: Path

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def steps(self) -> int:
        """The steps that this job itself trains."""
        return self.train.steps

    @property
    def ready(self) -> bool:
        """Whether nothing else must be trained first."""
        return True

    def settings(self) -> dict[str, Any]:
        parts = {"model": self.config, "data": self.setup.data, "optimizer": self.setup.optimizer, "train": self.train}
        return {name: dataclasses.asdict(part) for name, part in parts.items()}

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None. Raises UsageError if the run used other settings."""
        result = read_record(self.directory / RESULT)
        if result is None:
            return None
        found, asked = Run(self.directory).read().settings, self.settings()
        different = differences(identity({name: found.get(name) for name in asked}), identity(asked))
        if different:
            raise UsageError(
                f"{self.directory}: was trained with other settings ({describe(different)}); remove it or choose "
                "another --out"
            )
        return result

    def configs(self) -> list[HourglassConfig]:
        """Return the configurations that the job trains: one, or one for each drawn shorten factor."""
        hierarchies = [str(self.config.parsed_hierarchy.with_shorten_factor(k)) for k in self.train.shorten_factors]
        return [dataclasses.replace(self.config, hierarchy=each) for each in hierarchies] or [self.config]

    def step_flops(self) -> float:
        """Return the FLOPs of a training step with its optimizer, averaged over drawn shorten factors."""
        data, optimizer = self.setup.data, self.setup.optimizer
        flops = data.batch_size * statistics.mean(training_flops(each, data.block_size) for each in self.configs())
        if optimizer.optimizer == "adamw":  # without matrix products; building the model takes time
            return flops
        model = nnx.eval_shape(lambda: HourglassLM(self.config, rngs=nnx.Rngs(0)))
        return flops + optimizer_flops(optimizer, nnx.state(model))

    def begin(self) -> None:
        """Prepare the run directory before training."""

    def figures(self, model: HourglassLM, evaluation: Evaluation, validation: Sequence[Batch]) -> dict[str, float]:
        """Return the figures of the trained model by name."""
        if self.metric == "accuracy":
            return {"accuracy": accuracy(model, validation)}
        if not self.train.shorten_factors:
            return {self.metric: evaluation.bits_per_character}
        at_each = {k: evaluate_batches(at_shorten_factor(model, k), validation) for k in self.train.shorten_factors}
        return {f"{self.metric} at k={k}": at_k.bits_per_character for k, at_k in at_each.items()}


def row_config(row: Row, setup: Setup) -> HourglassConfig:
    options = {**setup.model, **(row.options or {})}
    return HourglassConfig(**options | {"hierarchy": setup.hierarchies.get(options["hierarchy"], options["hierarchy"])})


def row_directory(row: Row, config: HourglassConfig, directory: Path) -> Path:
    """Return a directory named after the row's options, without resampling for a plain transformer."""
    resampling = ("shortening", "upsampling")
    shown = ("hierarchy", *resampling)
    parts = [config.hierarchy.replace(" ", "_")]
    if config.parsed_hierarchy.total_factor > 1:
        parts += [getattr(config, name) for name in resampling]
    options = {**row.options, **row.optimizer}
    parts += [f"{name}={value}".replace(" ", "") for name, value in options.items() if name not in shown]
    if row.factors:
        parts.append("k=" + ",".join(map(str, row.factors)))
    return directory / "-".join(parts)


def make_job(table: Table, row: Row, setup: Setup, directory: Path, seed: int) -> Job:
    config = row_config(row, setup)
    if row.optimizer:
        setup = dataclasses.replace(setup, optimizer=dataclasses.replace(setup.optimizer, **row.optimizer))
    train = dataclasses.replace(setup.train, seed=seed, shorten_factors=row.factors)
    return Job(row, table.metric, config, train, setup, row_directory(row, config, directory) / f"seed{seed}")


def plan(
    tables: Sequence[Table],
    setup: Setup,
    directory: Path,
    n_seeds: int,
    only: Collection[str] = (),
    first_seed: int = 0,
) -> list[Job]:
    """Return the tables' jobs without repetition: each row with its table's seeds, the baseline with >= `n_seeds`.

    only: names of the rows to train; empty: all.
    first_seed: skip the seeds before this one.

    Raises UsageError for an unknown name, and if no row has a seed >= `first_seed`.
    """
    for name in only:
        check_choice("rows", name, [row.name for table in tables for row in table.rows if row.options is not None])
    jobs: dict[Path, Job] = {}
    for table in tables:
        rows = [row for row in table.rows if row.options is not None and (not only or row.name in only)]
        n_of_row = [max(table.seeds, n_seeds if row.name == table.baseline else 1) for row in rows]
        for seed in range(first_seed, max(n_of_row, default=0)):  # each seed of all rows before the next seed
            for row in (row for row, n in zip(rows, n_of_row, strict=True) if seed < n):
                job = make_job(table, row, for_table(setup, table), directory, seed)
                jobs.setdefault(job.directory, job)
    if first_seed and not jobs:
        raise UsageError(f"first_seed={first_seed}: no row has that many seeds, which count from 0; give a smaller one")
    return list(jobs.values())


class LetterSource:
    """The L#L task, with the interface of a text's source."""

    unit = "bits"
    tokenizer = letters.TOKENIZER
    fingerprint: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, setup: Setup):
        self.setup = setup

    def batches(self, seed: int) -> BatchAt:
        return letters.letter_batches(self.setup.data.block_size // 3, self.setup.data.batch_size, seed)

    def validation(self) -> LazyBatches:
        return LazyBatches(self.batches(seed=1_000_000), range(16))


Source = TextSource | ImageSource | LetterSource


def setup_source(setup: Setup, jobs: Iterable[Job]) -> Source:
    """Return the data of a setup. Raises UsageError if a finished job of `jobs` was trained on other data."""
    if setup.letters:
        return LetterSource(setup)
    source = TextSource(setup.data, BYTES) if setup.data.dataset == "text" else ImageSource(setup.data)
    for job in jobs:
        if job.result() is None:
            continue
        settings = Run(job.directory).read().settings
        if any(settings.get(name) != value for name, value in source.fingerprint.items()):
            raise UsageError(
                f"{job.directory}: was trained on other data than {setup.data.path}; remove it or choose another "
                "--data_name or --out"
            )
    return source


def train(jobs: Sequence[Job], setup: Setup, runtime: RuntimeConfig, signals: Signals) -> None:
    """Train the unfinished jobs, always the first one that can start; several processes may share the work.

    Raises UsageError at the end if a job diverged.
    """
    source = setup_source(setup, jobs)
    validation = source.validation()
    if setup.n_valid:
        validation = evenly_spaced(validation, setup.n_valid // len(validation[0][0]))
    diverged: list[str] = []

    def trained(job: Job) -> bool:
        """Train a job if it is unfinished and free; return whether it did."""
        if str(job.directory) in diverged or not job.ready or job.result() is not None:
            return False
        run = Run(job.directory)
        try:
            return train_job(job, run, source, validation, runtime, signals)
        except RunBusy:
            if jax.process_count() > 1:
                raise
            return False
        except Diverged as error:
            print(error, flush=True)
            diverged.append(str(job.directory))
            return True
        finally:
            run.release()

    while any(map(trained, jobs)):
        pass
    print(f"{sum(job.result() is not None for job in jobs)} of {len(jobs)} trainings are done")
    if diverged:
        raise UsageError(f"{len(diverged)} of {len(jobs)} trainings diverged and have no result: {', '.join(diverged)}")


def train_job(
    job: Job, run: Run, source: Source, validation: Sequence[Batch], runtime: RuntimeConfig, signals: Signals
) -> bool:
    """Train a job in `run` and save its result; return False if another process has finished it meanwhile.

    Raises RunBusy if another process trains it.
    """
    batches = source.batches(job.train.seed)
    settings = job.settings() | source.fingerprint
    launcher.start_run(run, job.config, source.tokenizer, settings, runtime, batches(0))
    if job.result() is not None:
        return False
    print(job.directory, flush=True)
    job.begin()
    model = nnx.jit(lambda rngs: HourglassLM(job.config, rngs=rngs))(nnx.Rngs(job.train.seed))
    launcher.causality(model)
    evaluation = fit(
        model,
        batches,
        validation,
        run,
        optimizer_config=job.setup.optimizer,
        train_config=job.train,
        runtime_config=runtime,
        unit=source.unit,
        signals=signals,
    )
    result = {
        "seed": job.train.seed,
        "figures": job.figures(model, evaluation, validation),
        "n_predictions": evaluation.n_characters,
        **measured_groups(model, validation),
        "trained": provenance(),
    }
    write_whole(job.directory / RESULT, json.dumps(result, indent=1) + "\n")
    print(", ".join(f"{name} {value:.4f}" for name, value in result["figures"].items()), flush=True)
    return True


def measured_groups(model: HourglassLM, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return the mean group length and the share of suppressed boundaries, for groups of varying length."""
    if not model.config.event_levels:
        return {}
    counts = [count_groups(model, tokens[:, :-1]) for tokens, weights in batches if weights.all()]
    total = GroupCounts(*map(sum, zip(*counts, strict=True)))
    return {"groups": {"length": total.length, "suppressed": total.suppressed}}
