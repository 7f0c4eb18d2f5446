"""Train the rows of the paper's tables, measure their cost, and compare them with the paper's figures.

python experiments/ablate.py --table=7 --dataset=enwik8 --scale=paper                   downloads enwik8 to data/
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny --dry_run
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny --max_minutes=60 --workers=4
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny --time
python experiments/ablate.py --curves --data_path=books --scale=micro      learning curves at equal FLOPs
python experiments/ablate.py --lengths --scale=micro                       cost of a step at 256 to 16,384 characters
python experiments/ablate.py --contexts --data_path=books --scale=micro    bits of Table 1's trained rows by context
python experiments/ablate.py --costs                                       parameters, FLOPs and memory of Table 1

A row is a run directory that pretrain.py could have written. Rows that tables share are trained once, finished rows are
skipped, and interrupted ones resume. Training ends with the report; --report writes it without training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

import jax
from absl import flags

from experiments.ablations import contexts, costs, curve_report, curves, lengths, reporting, rows
from experiments.ablations.scales import DATASETS, GPU, SCALES, TEXTS, Setup, find_setup
from experiments.ablations.table import Table
from experiments.ablations.tables import find_table
from experiments.ablations.workers import train_together
from experiments.common import launcher
from hourglass_jax import UsageError
from hourglass_jax.data.downloads import fetch
from hourglass_jax.training.signals import Interrupted, Signals

DOWNLOADS = "data"

TABLE = flags.DEFINE_list("table", [], "Numbers of tables: 1 to 8, A1 and F7 of the paper; B1 compares boundaries.")
DATASET = flags.DEFINE_string("dataset", "enwik8", " | ".join(DATASETS))
SCALE = flags.DEFINE_string(
    "scale",
    "tiny",
    f"{' | '.join((*SCALES, GPU))}: the paper's setup; for one GPU; for two CPU cores; narrower, for more data; for "
    "curves of several models on one GPU.",
)
DATA_PATH = launcher.define_path(
    "data_path",
    "",
    "A text of 100 MB like enwik8, or a directory of images; empty: enwik8 or text8, downloaded to data/.",
)
DATA_NAME = flags.DEFINE_string("data_name", "", "Name of the data in reports; default: the file's or data set's name.")
OUT = launcher.define_path("out", "runs/ablations", "Directory of the runs.")
RESULTS = launcher.define_path("results", "experiments/results/ablations", "Directory of the reports.")
ROWS = flags.DEFINE_list(
    "rows", [], 'Train only these rows, named as --dry_run prints them, "in quotes" if a name has a comma.'
)
SEEDS = flags.DEFINE_integer(
    "seeds",
    2,
    "Seeds of the baseline (other rows: 1, in B1 3); with --curves or --rows, of every row.",
    lower_bound=1,
)
FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "Skip the seeds before this one.", lower_bound=0)
MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", 0, "Stop training after this many minutes; the same command resumes. 0: no limit.", lower_bound=0
)
WORKERS = flags.DEFINE_integer(
    "workers", 1, "Processes that train side by side, each on its own rows; 0: internal.", lower_bound=0
)
COMMENT = flags.DEFINE_string("comment", None, "With --report: a remark on the table, which later reports keep.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the rows and their estimated cost without training.")
TIME = flags.DEFINE_boolean("time", False, "Measure step time and memory of the rows; requires an idle machine.")
REPORT = flags.DEFINE_boolean(
    "report", False, "Write the reports without training, from finished runs and stored records."
)
CURVES = flags.DEFINE_boolean("curves", False, "Train learning curves of pairs at equal FLOPs.")
CHARACTERS = flags.DEFINE_integer(
    "characters", 0, "With --curves: train up to this many characters; 0: all.", lower_bound=0
)
LENGTHS = flags.DEFINE_boolean("lengths", False, "Measure a step at each length; requires an idle machine.")
CONTEXTS = flags.DEFINE_boolean("contexts", False, "Measure bits of Table 1's trained rows by length of context.")
PRETRAINED = flags.DEFINE_list("pretrained", [], "With --contexts: also measure these shipped models.")
COSTS = flags.DEFINE_boolean("costs", False, "Print parameters, FLOPs and memory of Table 1.")
launcher.define_runtime()


MODES = ("table", "curves", "lengths", "contexts", "costs")  # one of them
FOR_TABLES = ("first_seed", "time")
FOR_TRAINING = ("max_minutes", "workers")


def check_options() -> None:
    """Raise UsageError for options that exclude each other."""
    given = [mode for mode in MODES if flags.FLAGS[mode].value]
    if not given:
        raise UsageError(
            "nothing to do; choose tables, e.g. --table=1,5, or pass --curves, --lengths, --contexts or --costs"
        )
    useless = [f"--{mode}" for mode in given[1:]]
    useless += [f"--{name}" for name in FOR_TABLES if flags.FLAGS[name].value and given != ["table"]]
    trains = given[0] in ("table", "curves") and not (REPORT.value or DRY_RUN.value or TIME.value)
    useless += [f"--{name}" for name in FOR_TRAINING if flags.FLAGS[name].present and not trains]
    useless += ["--characters"] * bool(CHARACTERS.value and given != ["curves"])
    useless += ["--pretrained"] * bool(PRETRAINED.value and given != ["contexts"])
    useless += ["--comment"] * (COMMENT.value is not None and not REPORT.value)
    useless += ["--dry_run"] * (DRY_RUN.value and (REPORT.value or CONTEXTS.value))
    if useless:
        with_report = " with --report" * REPORT.value
        raise UsageError(f"{useless[0]} does not apply to --{given[0]}{with_report}; leave it out")


def main(_: list[str]) -> None:
    check_options()
    if COSTS.value:
        print(costs.costs_table())
        return
    path = f"{DOWNLOADS}/{DATASET.value}" if downloaded() else DATA_PATH.value
    setup = find_setup(DATASET.value, SCALE.value, path)
    if LENGTHS.value:
        run_lengths(setup)
        return
    name = DATA_NAME.value or (Path(DATA_PATH.value).name if DATASET.value in TEXTS else "") or DATASET.value
    name = f"{name}-{SCALE.value}"
    run = run_curves if CURVES.value else run_contexts if CONTEXTS.value else run_tables
    run(setup, Path(OUT.value) / name, name)


def downloaded() -> bool:
    """Return whether the text is to be downloaded."""
    return DATASET.value in TEXTS and not DATA_PATH.value


def run_tables(setup: Setup, directory: Path, name: str) -> None:
    tables = [find_table(number, DATASET.value) for number in TABLE.value]
    if COMMENT.value is not None and len(tables) > 1:
        raise UsageError(f"--comment applies to one table; --table={','.join(TABLE.value)} names {len(tables)}")
    if REPORT.value:
        report_tables(tables, setup, directory, name)
        return
    if ROWS.value and SEEDS.present:
        tables = [replace(table, seeds=max(table.seeds, SEEDS.value)) for table in tables]
    jobs = rows.plan(tables, setup, directory, SEEDS.value, ROWS.value, FIRST_SEED.value)
    if DRY_RUN.value:
        print(costs.plan_table(jobs, setup))
        return
    if downloaded() and not TIME.value:
        fetch(DATASET.value, DOWNLOADS)
    if TIME.value:
        with Signals() as signals:
            costs.measure(jobs, signals)
        return

    def report() -> None:
        trained = [table for table in tables if any(map(is_done, rows.plan([table], setup, directory, SEEDS.value)))]
        report_tables(trained, setup, directory, name)

    train_and_report(lambda signals: rows.train(jobs, setup, launcher.read_runtime(), signals), report)


def is_done(job: rows.Job) -> bool:
    return job.result() is not None


def report_tables(tables: list[Table], setup: Setup, directory: Path, name: str) -> None:
    for table in tables:
        path = Path(RESULTS.value) / f"table{table.number}-{name}"
        print(reporting.report(table, setup, directory, path, COMMENT.value))


def train_and_report(train: Callable[[Signals], None], report: Callable[[], None]) -> None:
    """Train to the end, the time limit or a signal; then the first process writes the reports."""
    try:
        train_together(train, WORKERS.value, MAX_MINUTES.value)
    except Interrupted as interruption:
        print(f"\n{interruption}; the same command resumes", flush=True)
    if WORKERS.value and jax.process_index() == 0:
        report()


def run_lengths(setup: Setup) -> None:
    if DATASET.value not in TEXTS:
        raise UsageError(
            f"--lengths requires a text; dataset={DATASET.value!r} is not one, choose {' or '.join(TEXTS)}"
        )
    path = Path(RESULTS.value) / f"lengths-{SCALE.value}"
    if DRY_RUN.value:
        print(lengths.plan_table(setup))
    elif REPORT.value:
        print(lengths.report(setup, SCALE.value, path))
    else:
        with Signals() as signals:
            lengths.measure(setup, SCALE.value, path, signals)


def run_curves(setup: Setup, directory: Path, name: str) -> None:
    if DATASET.value not in TEXTS:
        raise UsageError(f"--curves requires a text; dataset={DATASET.value!r} is none, choose {' or '.join(TEXTS)}")

    def report() -> None:
        path = Path(RESULTS.value) / f"curves-{name}"
        print(curve_report.report(setup, directory / "curves", path, COMMENT.value))

    if REPORT.value:
        report()
        return
    legs = curves.plan(setup, directory / "curves", SEEDS.value, ROWS.value, CHARACTERS.value)
    if DRY_RUN.value:
        print(curves.plan_table(legs))
        return
    if downloaded():
        fetch(DATASET.value, DOWNLOADS)
    train_and_report(
        lambda signals: curves.train(legs, setup, launcher.read_runtime(), signals),
        lambda: report() if any(is_done(leg.job) for leg in legs) else None,
    )


def run_contexts(setup: Setup, directory: Path, name: str) -> None:
    if DATASET.value not in TEXTS:
        raise UsageError(
            f"--contexts requires a text; dataset={DATASET.value!r} is not one, choose {' or '.join(TEXTS)}"
        )
    path = Path(RESULTS.value) / f"contexts-{name}"
    if REPORT.value:
        print(contexts.report(path, COMMENT.value))
        return
    table = replace(find_table("1", DATASET.value), seeds=SEEDS.value)
    models = contexts.of_rows(rows.plan([table], setup, directory, SEEDS.value, ROWS.value))
    models |= contexts.shipped(PRETRAINED.value)
    if not models:
        raise UsageError(f"{directory}: contains no finished row of table 1 with checkpoints; train one first")
    if downloaded():
        fetch(DATASET.value, DOWNLOADS)
    with Signals() as signals:
        contexts.measure(models, setup, path, name, signals)


if __name__ == "__main__":
    launcher.run(main)
