"""Training of a table's rows: each a run directory that `hourglass_jax.load` reads, and its result."""

from __future__ import annotations

import dataclasses
import json
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
from hourglass_jax.data import letters
from hourglass_jax.data.pipeline import Batch, BatchAt, LazyBatches, evenly_spaced
from hourglass_jax.evaluation import accuracy, evaluate_batches
from hourglass_jax.files import write_whole
from hourglass_jax.inspection import GroupCounts, count_groups
from hourglass_jax.ranges import check_choice
from hourglass_jax.training.identity import describe, differences, identity
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


def same_setup(stored: dict[str, Any] | None, setup: dict[str, Any]) -> bool:
    """Return whether a record's set-up is this one; options that are missing in an older record have their defaults."""
    return stored is not None and identity(stored) == identity(setup)


def row_config(row: Row, setup: Setup) -> HourglassConfig:
    options = {**setup.model, **(row.options or {})}
    return HourglassConfig(**options | {"hierarchy": setup.hierarchies.get(options["hierarchy"], options["hierarchy"])})


def row_directory(row: Row, config: HourglassConfig, directory: Path) -> Path:
    """Return a directory named after the row's options, without resampling for a plain transformer."""
    resampling = ("shortening", "upsampling")
    parts = [config.hierarchy.replace(" ", "_")]
    if config.parsed_hierarchy.total_factor > 1:
        parts += [getattr(config, name) for name in resampling]
    parts += [f"{name}={value}" for name, value in row.options.items() if name not in ("hierarchy", *resampling)]
    if row.factors:
        parts.append("k=" + ",".join(map(str, row.factors)))
    return directory / "-".join(parts)


def make_job(table: Table, row: Row, setup: Setup, directory: Path, seed: int) -> Job:
    config = row_config(row, setup)
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
    names = [row.name for table in tables for row in table.rows if row.options is not None]
    for name in only:
        check_choice("rows", name, names)
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


def valid_sample(source: Source, setup: Setup) -> Sequence[Batch]:
    """Return the batches of the final evaluations: about `n_valid` sequences."""
    batches = source.validation()
    return evenly_spaced(batches, setup.n_valid // len(batches[0][0])) if setup.n_valid else batches


def train(jobs: Sequence[Job], setup: Setup, runtime: RuntimeConfig, signals: Signals) -> None:
    """Train the unfinished jobs, and resume interrupted ones. Raises UsageError at the end if a job diverged."""
    source = setup_source(setup, jobs)
    waiting = [job for job in jobs if job.result() is None]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} rows are done")
    validation = valid_sample(source, setup)
    diverged = []
    for number, job in enumerate(waiting, len(jobs) - len(waiting) + 1):
        print(f"[{number}/{len(jobs)}] {job.directory}", flush=True)
        run = Run(job.directory)
        try:
            result = train_row(job, run, source, validation, runtime, signals)
        except RunBusy as busy:
            if jax.process_count() > 1:
                raise
            print(busy, flush=True)
            continue
        except Diverged as error:
            print(error, flush=True)
            diverged.append(str(job.directory))
            continue
        finally:
            run.release()
        print(", ".join(f"{name} {value:.4f}" for name, value in result["figures"].items()), flush=True)
    if diverged:
        raise UsageError(f"{len(diverged)} of {len(waiting)} rows diverged and have no result: {', '.join(diverged)}")


def train_row(
    job: Job, run: Run, source: Source, validation: Sequence[Batch], runtime: RuntimeConfig, signals: Signals
) -> dict[str, Any]:
    """Train a row in `run`; save and return its result. Raises RunBusy if another process trains it."""
    if (result := start_job(job, run, source, runtime)) is not None:
        return result
    model, evaluation = fit_job(job, run, source, validation, runtime, signals)
    if job.metric == "accuracy":
        figures = {"accuracy": accuracy(model, validation)}
    elif job.train.shorten_factors:
        at_each = {k: evaluate_batches(at_shorten_factor(model, k), validation) for k in job.train.shorten_factors}
        figures = {f"{job.metric} at k={k}": at_k.bits_per_character for k, at_k in at_each.items()}
    else:
        figures = {job.metric: evaluation.bits_per_character}
    return save_result(job, figures, evaluation.n_characters, model, validation)


def start_job(job: Job, run: Run, source: Source, runtime: RuntimeConfig) -> dict[str, Any] | None:
    """Lock and start `run`; return the result if another process has finished the job meanwhile."""
    settings, first = job.settings() | source.fingerprint, source.batches(job.train.seed)(0)
    launcher.start_run(run, job.config, source.tokenizer, settings, runtime, first)
    return job.result()


def fit_job(
    job: Job, run: Run, source: Source, validation: Sequence[Batch], runtime: RuntimeConfig, signals: Signals
) -> tuple[HourglassLM, Evaluation]:
    model = nnx.jit(lambda rngs: HourglassLM(job.config, rngs=rngs))(nnx.Rngs(job.train.seed))
    launcher.causality(model)
    evaluation = fit(
        model,
        source.batches(job.train.seed),
        validation,
        run,
        optimizer_config=job.setup.optimizer,
        train_config=job.train,
        runtime_config=runtime,
        unit=source.unit,
        signals=signals,
    )
    return model, evaluation


def save_result(
    job: Job, figures: dict[str, float], n_predictions: int, model: HourglassLM, validation: Sequence[Batch]
) -> dict[str, Any]:
    result = {
        "seed": job.train.seed,
        "figures": figures,
        "n_predictions": n_predictions,
        **measured_groups(model, validation),
        "trained": provenance(),
    }
    write_whole(job.directory / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def measured_groups(model: HourglassLM, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return the mean group length and the share of suppressed boundaries, for groups of varying length."""
    if not model.config.event_levels:
        return {}
    counts = [count_groups(model, tokens[:, :-1]) for tokens, weights in batches if weights.all()]
    total = GroupCounts(*map(sum, zip(*counts, strict=True)))
    return {"groups": {"length": total.length, "suppressed": total.suppressed}}
