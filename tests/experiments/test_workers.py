"""Trainings of ablate.py that stop in time, resume, and share the rows among workers."""

import json

import numpy as np
import pytest
from launching import MICRO, run_forked

# Two rows and a curve of two legs and a branch, which train in seconds. Each step is noted in a file; the time is up
# after the step STOP_AT.
PLUGIN = f"""{MICRO}
import os

from experiments.ablations import curves
from experiments.ablations.table import TEXT, Row, resampling
from experiments.ablations.tables import TABLES
from hourglass_jax.training import trainer

light = resampling("average", "repeat") | {{"hierarchy": "0@1 1@2 1@1"}}
rows = (Row("light", light, {{"bpc": 1.1}}), Row("1@1", TEXT | {{"hierarchy": "1@1"}}, {{"bpc": 1.2}}))
TABLES["1", "enwik8"] = replace(TABLES["1", "enwik8"], rows=rows, baseline="1@1")
pair = curves.Pair(curves.plain("1@1"), ())
curves.COURSES["narrow"], curves.DECAY = curves.Course((pair,), (480, 960), (960,)), 0.4
train_on = trainer._Training.train_on


def watched(self, step, batch):
    at = f"{{self.run.directory.parent.name}} {{self.run.directory.name}} {{step}}"
    with open("steps", "a") as file:
        file.write(at + "\\n")
    train_on(self, step, batch)
    if os.environ.get("STOP_AT") == at:
        self.signals.end = 0


trainer._Training.train_on = watched
"""
PLAIN, LIGHT = "1@1 seed0", "0@1_1@2_1@1-average-repeat seed0"
TABLE = ("--table=1", "--seeds=1")


@pytest.fixture
def home(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "books").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    return tmp_path


def ablate(home, *flags, **environment):
    """Return what the process printed, and the steps that it trained by run."""
    (home / "steps").write_text("")
    flags = ["--plugin=plugin.py", "--data_path=books", "--scale=micro", "--results=results", *flags]
    process = run_forked("ablate", *flags, cwd=home, **environment)
    assert process.returncode == 0, process.stderr
    steps = {}
    for line in (home / "steps").read_text().splitlines():
        name, _, step = line.rpartition(" ")
        steps.setdefault(name, []).append(int(step))
    return process.stdout, steps


def reached(directory):
    """Return the figures and sequence losses of each run."""
    figures = {
        path.parent.relative_to(directory): json.loads(path.read_text())["figures"]
        for path in directory.rglob("result.json")
    }
    return figures, {path.parent.name: np.load(path).tobytes() for path in directory.rglob("losses.npy")}


def test_a_training_stops_in_time_and_the_same_command_resumes(home):
    printed, steps = ablate(home, *TABLE, "--max_minutes=9", STOP_AT=f"{PLAIN} 5")
    assert steps == {LIGHT: list(range(1, 13)), PLAIN: list(range(1, 6))}
    assert "stopped by the time limit after step 5" in printed and "; the same command resumes" in printed
    record = json.loads((home / "results/table1-books-micro.json").read_text())
    assert [len(row["runs"]) for row in record["rows"]] == [1, 0]  # the report holds what is there
    printed, steps = ablate(home, *TABLE, "--max_minutes=9")
    assert steps == {PLAIN: list(range(6, 13))} and printed.endswith("results/table1-books-micro.md\n")
    assert not ablate(home, *TABLE, "--max_minutes=9")[1]
    ablate(home, *TABLE, "--out=whole")
    assert reached(home / "runs/ablations") == reached(home / "whole")


@pytest.mark.slow
def test_a_curve_that_stops_in_every_leg_is_the_uninterrupted_curve(home):
    for stop in ("480-constant 3", "960-constant 8", "960-decayed 12"):
        _, steps = ablate(home, "--curves", "--seeds=1", STOP_AT=f"seed0 {stop}")
        assert f"seed0 {stop}".rpartition(" ")[0] == list(steps)[-1]
    assert ablate(home, "--curves", "--seeds=1")[1] == {"seed0 960-decayed": [13, 14]}
    ablate(home, "--curves", "--seeds=1", "--out=whole")
    found, whole = reached(home / "runs/ablations"), reached(home / "whole")
    assert found == whole and len(found[0]) == len(found[1]) == 3


@pytest.mark.slow
def test_workers_share_the_rows_and_train_nothing_twice(home):
    _, steps = ablate(home, *TABLE, "--workers=2", XLA_FLAGS="")
    assert steps == {name: list(range(1, 13)) for name in (PLAIN, LIGHT)}
    record = json.loads((home / "results/table1-books-micro.json").read_text())
    assert [len(row["runs"]) for row in record["rows"]] == [1, 1]


def test_training_options_without_training_raise_one_line_errors(tmp_path):
    for flags in (["--table=1", "--dry_run", "--workers=2"], ["--contexts", "--max_minutes=5"]):
        result = run_forked("ablate", *flags, cwd=tmp_path)
        assert result.returncode == 2 and f"{flags[-1].partition('=')[0]} is for " in result.stderr
