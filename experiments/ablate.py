"""The paper's tables: trains their rows, measures what they cost, reports them beside the paper's figures.

python experiments/ablate.py --table=7 --dataset=enwik8 --scale=paper                   downloads enwik8 to data/
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny --dry_run
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny --time
python experiments/ablate.py --table=1,5 --dataset=enwik8 --data_path=books --scale=tiny --report
python experiments/ablate.py --curves --data_path=books --scale=micro    learning curves at equal FLOPs; --report, too
python experiments/ablate.py --lengths --scale=micro                     what a step costs at 256 to 16,384 characters
python experiments/ablate.py --contexts --data_path=books --scale=micro    how far back Table 1's trained rows look
python experiments/ablate.py --costs     what Table 1's rows cost: parameters, FLOPs, memory

A row is a run directory that pretrain.py could have written; rows that tables share are trained once, finished ones
are skipped, and one that was interrupted goes on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags

from experiments.ablations import contexts, costs, curve_report, curves, lengths, reporting, rows
from experiments.ablations.scales import DATASETS, SCALES, TEXTS, Setup, find_setup
from experiments.ablations.tables import find_table
from experiments.common import launcher
from hourglass_jax import UsageError
from hourglass_jax.data.downloads import fetch
from hourglass_jax.training.signals import Signals

DOWNLOADS = "data"

TABLE = flags.DEFINE_list("table", [], "Tables of the paper by number, 1 to 8, A1 and F7; B1, where groups end.")
DATASET = flags.DEFINE_string("dataset", "enwik8", " | ".join(DATASETS))
SCALE = flags.DEFINE_string(
    "scale", "tiny", f"{' | '.join(SCALES)}: the paper's set-up, one GPU, two CPU cores, those for longer."
)
DATA_PATH = launcher.define_path(
    "data_path", "", "100 MB in enwik8's shape, or the images' directory; empty: enwik8 or text8, downloaded to data/."
)
DATA_NAME = flags.DEFINE_string("data_name", "", "What reports call the data; default: the file's or data set's name.")
OUT = launcher.define_path("out", "runs/ablations", "Directory of the runs.")
RESULTS = launcher.define_path("results", "experiments/results/ablations", "Directory of the reports.")
ROWS = flags.DEFINE_list(
    "rows", [], 'Only these rows, by the name that --dry_run prints, "in quotes" if it has a comma; default: all.'
)
SEEDS = flags.DEFINE_integer(
    "seeds",
    2,
    "Of the baseline row, the others have one, in B1 three; with --curves, or if given with --rows, of each.",
    lower_bound=1,
)
FIRST_SEED = flags.DEFINE_integer(
    "first_seed", 0, "Only seeds from this one on, for a table whose report has the runs before.", lower_bound=0
)
COMMENT = flags.DEFINE_string("comment", None, "With --report: what there is to say about the one table; kept.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the rows with what they will cost, and train nothing.")
TIME = flags.DEFINE_boolean("time", False, "Measure step time and memory of the rows, on an otherwise idle machine.")
REPORT = flags.DEFINE_boolean("report", False, "Write the tables from what has been trained, and stored before.")
CURVES = flags.DEFINE_boolean("curves", False, "Learning curves of pairs at equal FLOPs, instead of tables.")
CHARACTERS = flags.DEFINE_integer(
    "characters", 0, "With --curves: only up to so many, and what branches off there; 0: all.", lower_bound=0
)
LENGTHS = flags.DEFINE_boolean("lengths", False, "Measure a step at every length, on an otherwise idle machine.")
CONTEXTS = flags.DEFINE_boolean("contexts", False, "Measure what more context gives to Table 1's trained rows.")
PRETRAINED = flags.DEFINE_list("pretrained", [], "With --contexts: also these models that come with the package.")
COSTS = flags.DEFINE_boolean("costs", False, "Print what the rows of Table 1 cost.")
launcher.define_runtime()


MODES = ("table", "curves", "lengths", "contexts", "costs")  # one of them
FOR_TABLES = ("first_seed", "time")


def check_options() -> None:
    """Raises UsageError for options that are of no use together."""
    given = [mode for mode in MODES if flags.FLAGS[mode].value]
    if not given:
        raise UsageError(
            "nothing to do; choose tables, e.g. --table=1,5, or pass --curves, --lengths, --contexts or --costs"
        )
    useless = [f"--{mode}" for mode in given[1:]]
    useless += [f"--{name}" for name in FOR_TABLES if flags.FLAGS[name].value and given != ["table"]]
    useless += ["--characters"] * bool(CHARACTERS.value and given != ["curves"])
    useless += ["--pretrained"] * bool(PRETRAINED.value and given != ["contexts"])
    useless += ["--comment"] * (COMMENT.value is not None and not REPORT.value)
    useless += ["--dry_run"] * (DRY_RUN.value and (REPORT.value or CONTEXTS.value))
    if useless:
        with_report = " with --report" * REPORT.value
        raise UsageError(f"{useless[0]} is of no use to --{given[0]}{with_report}; leave it out")


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
    """Whether the data is a text that comes from the network."""
    return DATASET.value in TEXTS and not DATA_PATH.value


def run_tables(setup: Setup, directory: Path, name: str) -> None:
    tables = [find_table(number, DATASET.value) for number in TABLE.value]
    if COMMENT.value is not None and len(tables) > 1:
        raise UsageError(f"--comment is said of one table; --table={','.join(TABLE.value)} are {len(tables)}")
    if REPORT.value:
        for table in tables:
            path = Path(RESULTS.value) / f"table{table.number}-{name}"
            print(reporting.report(table, setup, directory, path, COMMENT.value))
        return
    if ROWS.value and SEEDS.present:
        tables = [replace(table, seeds=max(table.seeds, SEEDS.value)) for table in tables]
    jobs = rows.plan(tables, setup, directory, SEEDS.value, ROWS.value, FIRST_SEED.value)
    if DRY_RUN.value:
        print(costs.plan_table(jobs, setup))
        return
    if downloaded() and not TIME.value:
        fetch(DATASET.value, DOWNLOADS)
    with Signals() as signals:
        if TIME.value:
            costs.measure(jobs, signals)
        else:
            rows.train(jobs, setup, launcher.read_runtime(), signals)


def run_lengths(setup: Setup) -> None:
    if DATASET.value not in TEXTS:
        raise UsageError(f"--lengths are of texts; dataset={DATASET.value!r} is none, choose {' or '.join(TEXTS)}")
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
        raise UsageError(f"--curves are of texts; dataset={DATASET.value!r} is none, choose {' or '.join(TEXTS)}")
    if REPORT.value:
        path = Path(RESULTS.value) / f"curves-{name}"
        print(curve_report.report(setup, directory / "curves", path, COMMENT.value))
        return
    legs = curves.plan(setup, directory / "curves", SEEDS.value, ROWS.value, CHARACTERS.value)
    if DRY_RUN.value:
        print(curves.plan_table(legs))
        return
    if downloaded():
        fetch(DATASET.value, DOWNLOADS)
    with Signals() as signals:
        curves.train(legs, setup, launcher.read_runtime(), signals)


def run_contexts(setup: Setup, directory: Path, name: str) -> None:
    if DATASET.value not in TEXTS:
        raise UsageError(f"--contexts are of texts; dataset={DATASET.value!r} is none, choose {' or '.join(TEXTS)}")
    path = Path(RESULTS.value) / f"contexts-{name}"
    if REPORT.value:
        print(contexts.report(path, COMMENT.value))
        return
    table = replace(find_table("1", DATASET.value), seeds=SEEDS.value)
    models = contexts.of_rows(rows.plan([table], setup, directory, SEEDS.value, ROWS.value))
    models |= contexts.shipped(PRETRAINED.value)
    if not models:
        raise UsageError(f"{directory}: holds no finished row of table 1 with its checkpoints; train one first")
    if downloaded():
        fetch(DATASET.value, DOWNLOADS)
    with Signals() as signals:
        contexts.measure(models, setup, path, name, signals)


if __name__ == "__main__":
    launcher.run(main)
