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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

import jax
from absl import flags

from experiments.ablations import contexts, costs, curve_report, curves, lengths, reporting, rows
from experiments.ablations.scales import DATASETS, GPU, SCALES, TEXTS, Setup, find_setup
from experiments.ablations.table import Table
from experiments.ablations.tables import find_table
from experiments.ablations.workers import train_together
from experiments.common import launcher
from experiments.common.reports import NoResults, rerender
from hourglass_jax import UsageError
from hourglass_jax.data.downloads import fetch
from hourglass_jax.recipes import RECIPES
from hourglass_jax.training.signals import Interrupted, Signals

DOWNLOADS = "data"

TABLE = flags.DEFINE_list(
    "table", [], "Numbers of tables: 1 to 8, A1 and F7 of the paper; B1 compares boundaries, M1 and M2 recipes."
)
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
RECIPE = launcher.define_recipe("paper", "Defaults of model and optimizer; rows override them.")
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
FOR_TRAINING = ("--table", "--curves")
OF_MODE = {
    "recipe": (*FOR_TRAINING, "--lengths", "--contexts"),
    "first_seed": ("--table",),
    "time": ("--table",),
    "characters": ("--curves",),
    "pretrained": ("--contexts",),
    "max_minutes": FOR_TRAINING,
    "workers": FOR_TRAINING,
    "dry_run": (*FOR_TRAINING, "--lengths"),
}
OF_ACTION = {"comment": ("--report",), "max_minutes": ("training",), "workers": ("training",)}


class Study(NamedTuple):
    """What a mode does: show its plan as Markdown, train or measure, and write reports, which return their paths."""

    plan: Callable[[], str]
    run: Callable[[Signals], None]
    reports: Sequence[Callable[[], str]]


def main(_: list[str]) -> None:
    mode = read_mode()
    if mode == "costs":
        print(costs.costs_table())
        return
    text = DATASET.value in TEXTS
    if mode in ("curves", "lengths", "contexts") and not text:
        raise UsageError(f"--{mode} requires a text; dataset={DATASET.value!r} is none, choose {' or '.join(TEXTS)}")
    downloaded = text and not DATA_PATH.value
    setup = find_setup(DATASET.value, SCALE.value, f"{DOWNLOADS}/{DATASET.value}" if downloaded else DATA_PATH.value)
    recipe = RECIPES[RECIPE.value]
    setup = replace(
        setup, model={**setup.model, **recipe.model}, optimizer=replace(setup.optimizer, **recipe.optimizer)
    )
    name = DATA_NAME.value or (Path(DATA_PATH.value).name if text else "") or DATASET.value
    studies = {"table": tables, "curves": learning_curves, "lengths": step_lengths, "contexts": context_lengths}
    study = studies[mode](setup, f"{name}-{scale_name()}")
    if REPORT.value:
        for report in study.reports:
            print(report())
    elif DRY_RUN.value:
        print(study.plan())
    else:
        if downloaded and mode != "lengths" and not TIME.value:
            fetch(DATASET.value, DOWNLOADS)
        run_and_report(study)


def read_mode() -> str:
    """Return the mode. Raises UsageError for options that exclude each other."""
    given = [mode for mode in MODES if flags.FLAGS[mode].value]
    if len(given) != 1:
        raise UsageError(
            "give one of --table=1,5 or other tables, --curves, --lengths, --contexts and --costs, not "
            f"{' and '.join(f'--{mode}' for mode in given) or 'none'}"
        )
    actions = [f"--{name}" for name in ("report", "dry_run", "time") if flags.FLAGS[name].value] or ["training"]
    if len(actions) > 1:
        raise UsageError(f"{' and '.join(actions)} exclude each other; leave out all but one")
    launcher.check_taken(OF_MODE, f"--{given[0]}")
    launcher.check_taken(OF_ACTION, actions[0])
    return given[0]


def run_and_report(study: Study) -> None:
    """Train or measure to the end, the time limit or a signal; then the first process reports what is there."""
    try:
        train_together(study.run, WORKERS.value, MAX_MINUTES.value)
    except Interrupted as interruption:
        print(f"\n{interruption}; the same command resumes", flush=True)
    if WORKERS.value and jax.process_index() == 0 and not TIME.value:
        for report in study.reports:
            with suppress(NoResults):
                print(report())


def tables(setup: Setup, name: str) -> Study:
    chosen, directory = [find_table(number, DATASET.value) for number in TABLE.value], Path(OUT.value) / name
    if COMMENT.value is not None and len(chosen) > 1:
        raise UsageError(f"--comment applies to one table; --table={','.join(TABLE.value)} names {len(chosen)}")
    if RECIPE.value != "paper" and {"M1", "M2"} & {table.number for table in chosen}:
        raise UsageError(f"--recipe={RECIPE.value}: the rows of tables M1 and M2 have their own recipes; leave it out")
    if ROWS.value and SEEDS.present:
        chosen = [replace(table, seeds=max(table.seeds, SEEDS.value)) for table in chosen]
    jobs = [] if REPORT.value else rows.plan(chosen, setup, directory, SEEDS.value, ROWS.value, FIRST_SEED.value)

    def run(signals: Signals) -> None:
        if TIME.value:
            costs.measure(jobs, signals)
        else:
            rows.train(jobs, setup, launcher.read_runtime(), signals)

    def report(table: Table) -> str:
        return reporting.report(table, setup, directory, report_path(f"table{table.number}-{name}"), COMMENT.value)

    return Study(lambda: costs.plan_table(jobs), run, [partial(report, table) for table in chosen])


def learning_curves(setup: Setup, name: str) -> Study:
    directory = Path(OUT.value) / name / "curves"
    legs = [] if REPORT.value else curves.plan(setup, directory, SEEDS.value, ROWS.value, CHARACTERS.value)
    return Study(
        lambda: costs.plan_table(legs),
        lambda signals: rows.train(legs, setup, launcher.read_runtime(), signals),
        [lambda: curve_report.report(setup, directory, report_path(f"curves-{name}"), COMMENT.value)],
    )


def step_lengths(setup: Setup, name: str) -> Study:
    path = report_path(f"lengths-{scale_name()}")
    return Study(
        lambda: lengths.plan_table(setup),
        lambda signals: lengths.measure(setup, scale_name(), path, signals),
        [partial(rerender, path, lengths.render, lengths.draw, COMMENT.value)],
    )


def context_lengths(setup: Setup, name: str) -> Study:
    directory, path = Path(OUT.value) / name, report_path(f"contexts-{name}")
    models: dict[str, contexts.Load] = {}
    if not REPORT.value:
        table = replace(find_table("1", DATASET.value), seeds=SEEDS.value)
        jobs = rows.plan([table], setup, directory, SEEDS.value, ROWS.value)
        models = contexts.loaders(jobs, PRETRAINED.value)
        if not models:
            raise UsageError(f"{directory}: contains no finished row of table 1 with checkpoints; train one first")

    def run(signals: Signals) -> None:
        contexts.measure(models, setup, path, name, signals)

    return Study(lambda: "", run, [partial(rerender, path, contexts.render, contexts.draw, COMMENT.value)])


def scale_name() -> str:
    """Return the scale for names of files, with the recipe unless it is the paper's."""
    return SCALE.value + f"-{RECIPE.value}" * (RECIPE.value != "paper")


def report_path(name: str) -> Path:
    return Path(RESULTS.value) / name


if __name__ == "__main__":
    launcher.run(main)
