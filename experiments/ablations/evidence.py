"""The whole evidence as parts, in the order in which they are wanted, and what is kept of them between slices."""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.ablations import curve_report, curves, reporting, rows
from experiments.ablations.rows import RESULT, Job, Source
from experiments.ablations.scales import Setup
from experiments.ablations.table import Table
from experiments.ablations.tables import find_table
from experiments.common.reports import markdown_table, read_record
from experiments.common.slices import TRIES
from hourglass_jax import RuntimeConfig
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.training.checkpoints import CHECKPOINTS
from hourglass_jax.training.metrics import CURVES
from hourglass_jax.training.run import Run
from hourglass_jax.training.signals import Signals

# Of Table 1: a plain transformer and the Hourglass of its cost, to 15 % at `micro`; 4@1 is where the plain line begins.
PAIRS = (("6@1", "2@1 4@3 2@1"), ("8@1", "2@1 8@3 2@1"), ("10@1", "3@1 8@4 3@1"), ("4@1", "2@1 1@3 2@1"))
NUMBERS = ("1", "5", "6", "7", "8", "B1")  # the tables, as they are wanted
KINDS = ("trained", "failed")  # what may become of a part
SEEDS = 2  # of each row, at least
RECORDS = "slices-*.json"  # in the directory of the runs, one of each worker


@dataclass(frozen=True)
class Part:
    """One training. name: unique; before: the job from whose last checkpoint it goes on."""

    name: str
    job: Job
    train: Callable[[Run, Source, Sequence[Batch], RuntimeConfig, Signals], Any]
    before: Job | None = None

    @property
    def done(self) -> bool:
        return (self.job.directory / RESULT).exists()


def find_tables(numbers: Iterable[str]) -> list[Table]:
    """Raises UsageError for one that there is not."""
    return [find_table(number, "enwik8") for number in numbers]


def groups(setup: Setup, directory: Path, tables: Iterable[Table]) -> dict[str, list[Part]]:
    """The parts of each table and of the learning curves by title; a row that tables share is in all of them."""
    first = find_table("1", "enwik8")
    by_name = {row.name: row for row in first.rows}
    pairs = replace(first, rows=tuple(by_name[name] for pair in PAIRS for name in pair))
    found = {}
    for title, table in {"main pairs": pairs, **{f"table {table.number}": table for table in tables}}.items():
        jobs = rows.plan([replace(table, seeds=max(table.seeds, SEEDS))], setup, directory, SEEDS)
        found[title] = [Part(name_of(job, directory), job, partial(rows.train_row, job)) for job in jobs]
    legs = curves.plan(setup, directory / "curves", n_seeds=1)
    found["learning curves"] = [
        Part(name_of(leg.job, directory), leg.job, partial(curves.train_leg, leg), leg.before) for leg in legs
    ]
    return found


def name_of(job: Job, directory: Path) -> str:
    return job.directory.relative_to(directory).as_posix()


def in_order(groups: Mapping[str, list[Part]]) -> dict[str, Part]:
    """Each part once, by name: the first seeds of all tables, pairs at the head, then further seeds, then curves."""
    *of_tables, of_curves = groups.values()
    seeds = sorted(itertools.chain(*of_tables), key=lambda part: part.job.train.seed)
    return {part.name: part for part in (*seeds, *of_curves)}


def stored(directory: Path, worker: str = "*") -> dict[str, Any]:
    """What all workers, or one, have recorded in `directory`: of each part its row, and how often it was tried."""
    rows: dict[str, Any] = {}
    tries: dict[str, int] = {}
    for record in map(read_record, sorted(directory.glob(RECORDS.replace("*", worker)))):
        rows |= record["rows"]
        tries |= {name: max(n, tries.get(name, 0)) for name, n in record["tries"].items()}
    return {"rows": rows, "tries": tries}


def read_progress(directory: Path, parts: Mapping[str, Part], worker: str = "*") -> dict[str, Any]:
    """The record of a `Slice`: of what all workers, or one, have stored, the parts that are done or given up.

    Raises UsageError where a part was trained with other settings.
    """
    record = stored(directory, worker)
    of_kind = {kind: {n: row for n, row in record["rows"].items() if row["kind"] == kind} for kind in KINDS}
    found = {name: row for name, row in of_kind["failed"].items() if not is_waiting(name, record)}
    names = {part.job.directory: name for name, part in parts.items()}
    for name, part in parts.items():
        if part.job.result() is not None:
            found[name] = of_kind["trained"].get(name, {"kind": "trained"})
        elif part.before and (before := names[part.before.directory]) in found and not part.before.result():
            found[name] = {"kind": "failed", "reason": f"goes on from {before}, which is given up"}
            record["tries"][name] = TRIES
    return {"rows": found, "tries": record["tries"]}


def that_can_begin(parts: Mapping[str, Part], record: Mapping[str, Any]) -> Iterator[str]:
    """What neither `record` nor another worker has, and what goes on from a part only when that is done."""
    for name, part in parts.items():
        if name not in record["rows"] and not part.done and (part.before is None or part.before.result() is not None):
            yield name


def is_waiting(name: str, record: Mapping[str, Any]) -> bool:
    """Whether a part is yet to be trained; one that failed is given up after `TRIES` slices."""
    row = record["rows"].get(name)
    return row is None or (row["kind"] == "failed" and record["tries"][name] < TRIES)


def train(
    part: Part, source: Source, validation: Sequence[Batch], runtime: RuntimeConfig, signals: Signals
) -> dict[str, Any]:
    """Trains a part, or goes on with it; what a `Slice` records of it."""
    print(part.name, flush=True)
    run = Run(part.job.directory)
    try:
        part.train(run, source, validation, runtime, signals)
    finally:
        run.release()
    rates = [record["characters_per_second"] for record in run.curves() if "characters_per_second" in record]
    figures = part.job.result()["figures"]
    return {"kind": "trained", "figures": figures, "characters_per_second": statistics.median(rates)}


def describe(row: Mapping[str, Any]) -> str:
    """What a part came to, in a line."""
    if row["kind"] == "failed":
        return f"failed: {row['reason']}"
    figures = [f"{name} {value:.4f}" for name, value in row["figures"].items()]
    return ", ".join([*figures, f"{row['characters_per_second']:,.0f} characters/s", f"{row['part_seconds']:,.0f} s"])


def tidy(parts: Iterable[Part], directory: Path, compiled: Path, limit: int) -> int:
    """Leaves in `directory` what the next slice needs, in at most `limit` bytes if that can be; returns their number.

    Of a finished run there stay what it is and what it reached; its last checkpoint, too, where a part is yet to go on
    from it. While that is too much, compiled programs go, those of long ago first, then unfinished runs' checkpoints,
    those of the last parts first.
    """
    parts = list(parts)
    needed = {part.before.directory for part in parts if part.before and not part.done}
    unfinished = []
    for part in parts:
        run = part.job.directory
        if not part.done:
            unfinished.append(run / CHECKPOINTS)
        elif run in needed:
            steps = sorted((path for path in (run / CHECKPOINTS).glob("*") if path.name.isdecimal()), key=step_of)
            remove(*steps[:-1], run / "tensorboard")
        else:
            remove(run / CHECKPOINTS, run / "tensorboard", run / CURVES)
    programs = sorted((path for path in compiled.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
    for path in (*programs, *reversed(unfinished)):
        if not limit or size_of(directory) <= limit:
            break
        remove(path)
    return size_of(directory)


def step_of(path: Path) -> int:
    return int(path.name)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def remove(*paths: Path) -> None:
    """Files and directories, these as wholes; what is not there is no error."""
    for path in paths:
        if path.is_dir():  # half of a checkpoint would be a damaged one
            going = path.with_name(f"{path.name}.tmp")
            shutil.rmtree(going, ignore_errors=True)
            shutil.rmtree(path.rename(going))
        else:
            path.unlink(missing_ok=True)


def write_reports(
    groups: Mapping[str, list[Part]], tables: Iterable[Table], setup: Setup, directory: Path, results: Path
) -> list[str]:
    """Of all tables and curves of which anything is done; their paths."""
    written = []
    for table in tables:
        if any(part.done for part in groups[f"table {table.number}"]):
            path = results / f"table{table.number}-{directory.name}"
            written.append(reporting.report(table, setup, directory, path, comment=None))
    if any(part.done for part in groups["learning curves"]):
        path = results / f"curves-{directory.name}"
        written.append(curve_report.report(setup, directory / "curves", path, comment=None))
    return written


def summary(groups: Mapping[str, list[Part]], parts: Mapping[str, Part], record: Mapping[str, Any]) -> str:
    """What is done, how fast it went, what failed and what is next."""
    lines, trained = [], {name: row for name, row in record["rows"].items() if row["kind"] == "trained"}
    for title, group in groups.items():
        own = [trained[part.name] for part in group if part.name in trained]
        rates = [row["characters_per_second"] for row in own if "characters_per_second" in row]
        waiting = [part.name for part in group if is_waiting(part.name, record)]
        speed = f"{statistics.median(rates):,.0f}" if rates else "-"
        lines.append((title, f"{len(own)} of {len(group)}", speed, waiting[0] if waiting else "-"))
    text = [markdown_table(("parts", "done", "characters/s", "next"), lines), ""]
    for name, row in record["rows"].items():
        if row["kind"] == "failed":
            text.append(f"{name} {'waits after' if is_waiting(name, record) else 'is given up'}: {row['reason']}")
    waiting = [name for name in parts if is_waiting(name, record)]
    state = f"next is {waiting[0]}; the same command goes on" if waiting else "nothing is left to train"
    return "\n".join([*text, f"{len(trained)} of {len(parts)} parts are done; {state}"])
