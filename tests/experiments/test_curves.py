"""Learning curves: a branch is the run of its own length, and the report is that of its record."""

import json
import math
import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from flax import nnx
from launching import MICRO, run_forked

import hourglass_jax as hg
from experiments.ablations import curve_report, curves, rows
from experiments.ablations.scales import GPU, SCALES, find_setup
from experiments.common.sources import TextSource
from hourglass_jax.training.metrics import read_curves
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import Diverged, fit

# Two models and two budgets, of 5 and 10 steps; a branch of 4 more.
PLUGIN = f"""{MICRO}
from experiments.ablations import curves

pair = curves.Pair(curves.plain("1@1"), (curves.light("0@1 1@2 1@1"),))
curves.COURSES["narrow"], curves.DECAY = curves.Course((pair,), (480, 960), (960,)), 0.4
"""
# Kills a process in the second leg, after a checkpoint of its own.
KILL = """
import os
import signal

from hourglass_jax.training import trainer

train_on = trainer._Training.train_on


def killed(self, step, batch):
    if step == 8:
        self.store.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    train_on(self, step, batch)


trainer._Training.train_on = killed
"""
COMMON = ["--plugin=plugin.py", "--curves", "--data_path=books", "--scale=micro", "--seeds=1"]
COMMON += ["--checkpoint_interval=2"]
BASE = "runs/ablations/books-micro/curves"


def ablate(home, *flags):
    result = run_forked("ablate", *COMMON, "--results=results", *flags, cwd=home)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with both curves, of which the Hourglass's was killed and went on."""
    home = tmp_path_factory.mktemp("curves")
    (home / "plugin.py").write_text(PLUGIN)
    (home / "kill.py").write_text(KILL)
    (home / "books").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    light = "--rows=0@1 1@2 1@1 light"
    assert run_forked("ablate", *COMMON, light, "--plugin=kill.py", cwd=home).returncode == -9
    shown = ablate(home, light, "--dry_run")
    assert shown.count("| done |") == 1 and "| 0@1 1@2 1@1 light, 960-decayed | 0 |" in shown
    assert "6 of 6 trainings are done" in ablate(home)
    return home


def train_in_one_go(leg, directory):
    """What a leg says of itself."""
    config, tokenizer, settings, _ = hg.Run(leg).read()
    train = hg.TrainConfig(**settings["train"])
    source = TextSource(hg.DataConfig(**settings["data"]), tokenizer)
    fit(
        nnx.jit(lambda rngs: hg.HourglassLM(config, rngs=rngs))(nnx.Rngs(train.seed)),
        source.batches(train.seed),
        source.validation()[: train.eval_batches],
        directory,
        optimizer_config=hg.OptimizerConfig(**settings["optimizer"]),
        train_config=train,
    )


@pytest.mark.slow
def test_a_branch_is_the_uninterrupted_run_of_its_length(home, monkeypatch):
    monkeypatch.chdir(home)
    legs = home / BASE / "0@1_1@2_1@1-average-repeat" / "seed0"
    train_in_one_go(legs / "960-decayed", home / "whole")
    tokens = np.frombuffer(b"the quick brown fox jumps", np.uint8).astype(np.int32)[None]
    whole, branch, trunk = (
        hg.load(path)[0](tokens) for path in (home / "whole", legs / "960-decayed", legs / "960-constant")
    )
    # A rate that falls is another program, which rounds otherwise.
    np.testing.assert_allclose(whole, branch, rtol=0, atol=2e-5)
    assert np.abs(whole - trunk).max() > 1e-2  # the decay does something
    whole, branch = (
        [(record["step"], record["train_loss"]) for record in read_curves(path) if "train_loss" in record]
        for path in (home / "whole", legs / "960-decayed")
    )
    assert {5, 10, 14} == dict(branch).keys()
    assert dict(whole) == pytest.approx({step: dict(branch)[step] for step in (10, 14)}, rel=1e-5)


@pytest.mark.slow
def test_a_leg_s_record_is_the_loss_of_its_last_parameters(home):
    leg = home / BASE / "1@1" / "seed0" / "960-decayed"
    result, losses = json.loads((leg / "result.json").read_text()), np.load(leg / "losses.npy")
    assert result["figures"]["bpc"] == pytest.approx(losses.mean() / math.log(2))
    assert result["n_predictions"] == 449  # also those of the last, incomplete sequence
    assert len(losses) == 449 // 24
    model, tokenizer, _ = hg.load(leg)
    valid = tokenizer.encode((home / "books").read_text())[int(0.9 * 4500) :][:25]
    assert losses[0] == pytest.approx(-float(hg.score(model, valid[None]).mean()), rel=1e-5)


@pytest.mark.slow
def test_finished_legs_are_not_trained_again(home):
    before = {path: path.stat().st_mtime_ns for path in (home / BASE).rglob("*.npy")}
    assert "6 of 6 trainings are done" in ablate(home)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_the_report_comes_from_the_record_alone(home, tmp_path):
    ablate(home, "--report", "--comment=Said once.")
    path = home / "results" / "curves-books-micro"
    text, record = path.with_suffix(".md").read_text(), json.loads(path.with_suffix(".json").read_text())
    assert "Said once." in text and "| 1,344 | decayed | 0 |" in text and "All reached." in text
    assert len(record["readings"]) == 6 and len(record["gaps"]) == 3
    shutil.move(home / BASE / "1@1", tmp_path / "1@1")  # a row alone, then all
    ablate(home, "--report")
    assert json.loads(path.with_suffix(".json").read_text())["readings"] == record["readings"]
    shutil.move(home / "runs", tmp_path / "runs")
    for suffix in (".md", ".png"):
        path.with_suffix(suffix).unlink()
    ablate(home, "--report")
    shutil.move(tmp_path / "runs", home / "runs")
    shutil.move(tmp_path / "1@1", home / BASE / "1@1")
    assert path.with_suffix(".md").read_text().splitlines()[:-3] == text.splitlines()[:-3]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_leg_is_reported_and_the_other_curve_continues(tmp_path, monkeypatch, capsys):
    setup = find_setup("enwik8", "micro")
    names = ("6@1", "8@1")
    [one, after_one, *_], [other, after_other, *_] = (
        list(curves.curve(curves.plain(name), setup, tmp_path, 0)) for name in names
    )
    done = []

    def train_job(leg, *_):
        if leg is one:
            raise Diverged("step 3: train_loss is nan")
        done.append(leg.directory)
        return True

    monkeypatch.setattr(rows, "train_job", train_job)
    monkeypatch.setattr(rows, "setup_source", lambda setup, jobs: Mock(validation=lambda: [[[0]]]))
    monkeypatch.setattr(rows.Job, "result", lambda leg: leg.directory in done or None)
    with pytest.raises(hg.UsageError, match=r"1 of 4 trainings diverged and have no result: .*6@1"):
        rows.train([one, after_one, other, after_other], setup, hg.RuntimeConfig(), Signals())
    assert done == [other.directory, after_other.directory] and capsys.readouterr().out.count("train_loss is nan") == 1


@pytest.mark.parametrize("scale, tolerance", [("micro", 0.05), (GPU, 0.13)])
def test_pairs_cost_as_many_flops_as_they_say(scale, tolerance, tmp_path):
    setup = find_setup("enwik8", scale)
    course = curves.COURSES[setup.course]
    for pair in course.pairs:
        plain, *rivals = (next(curves.curve(row, setup, tmp_path, 0)).step_flops() for row in pair.rows)
        assert all(abs(rival / plain - 1) < tolerance for rival in rivals)
        assert len(pair.rows) <= len(curve_report.COLOURS)
    assert len({row.name for row in course.rows}) == len({str(row) for row in course.rows})
    assert set(course.branches) <= set(course.points)


@pytest.mark.parametrize("scale", [*SCALES, GPU])
def test_the_legs_of_a_curve_follow_one_another(scale, tmp_path):
    setup = find_setup("enwik8", scale)
    points = curves.COURSES[setup.course].points[:-1]
    legs = curves.plan(setup, tmp_path, 2, characters=points[-1])
    assert {leg.point for leg in legs} == set(points)
    assert len({leg.directory for leg in legs}) == len(legs)
    for i, leg in enumerate(legs):
        trunk = leg.train.steps - leg.setup.optimizer.decay_steps
        assert abs(trunk * curves.step_characters(setup) - leg.point) <= curves.step_characters(setup) / 2
        assert bool(leg.setup.optimizer.decay_steps) == leg.decayed and leg.steps > 0
        assert leg.before is None or leg.before in legs[:i]
        if leg.decayed:
            assert leg.before.train.steps == trunk


def example_record():
    """A plain model and a rival of twice its FLOPs, whose bits are one line in the logarithm of the FLOPs."""
    flops = {"1@1": 100, "1@1 1@2 1@1": 200}
    readings = [
        {"row": row, "seed": 0, "point": n, "decayed": False, "characters": n, "bpc": 9 - math.log(n * flops[row])}
        for row in flops
        for n in (1000, 3000, 10_000)
    ]
    differences = [
        {**reading, "difference": -math.log(2), "standard_error": 0.1} for reading in readings if " " in reading["row"]
    ]
    return {
        "data": "text-micro",
        "pairs": [{"plain": "1@1", "rivals": ["1@1 1@2 1@1"]}],
        "rows": {row: {"character_flops": flops[row]} for row in flops},
        "readings": readings,
        "gaps": differences,
    }


def test_at_equal_flops_equal_curves_have_no_gap():
    record = example_record()
    for gap in record["gaps"]:
        assert gap["difference"] < -0.6
        assert curve_report.equal_flops(record, "1@1", gap) == pytest.approx(0, abs=1e-9)
    del record["readings"][:2]
    assert curve_report.equal_flops(record, "1@1", record["gaps"][0]) is None


def test_a_trend_is_the_slope_of_late_gaps():
    slope, late = -0.01, [{"characters": n, "standard_error": 0.1 / n} for n in (4000, 8000, 16_000)]
    for gap in late:
        gap["difference"] = 0.3 + slope * math.log2(gap["characters"])
    early = {"characters": 500, "difference": 5.0, "standard_error": 1e-9}
    found = curve_report.trend([early, *late])
    assert found.start == 4000 and found.slope == pytest.approx(slope)
    assert found.at(16_000) == pytest.approx(late[-1]["difference"])
    assert curve_report.trend([late[0], late[0]]) is curve_report.trend([]) is None
    standard = curve_report.trend([{**gap, "standard_error": 0.1} for gap in late])
    assert standard.standard_error == pytest.approx(0.1 / math.sqrt(2))  # sigma / sqrt(sum of (x - mean)^2)


def test_what_is_common_to_both_models_is_not_in_the_error_of_their_gap(tmp_path):
    rng = np.random.default_rng(0)
    hard, own = rng.normal(1, 0.5, 400), rng.normal(0.02, 0.01, 400)
    legs = []
    for name, losses in (("plain", hard), ("rival", hard + own)):
        leg = next(curves.curve(curves.plain("1@1"), find_setup("enwik8", "micro"), tmp_path, 0))
        leg = replace(leg, directory=tmp_path / name)
        leg.directory.mkdir()
        np.save(leg.directory / curves.LOSSES, losses)
        legs.append(leg)
    gap = curve_report.paired(*legs)
    assert gap["difference"] == pytest.approx(own.mean() / math.log(2))
    assert gap["standard_error"] == pytest.approx(own.std(ddof=1) / 20 / math.log(2))


def test_a_record_is_drawn(tmp_path):
    curve_report.draw(example_record(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rows=7@1"], ["rows='7@1'", "6@1", "2@1 4@3 2@1 attention"]),
        (["--dataset=cifar10"], ["--curves", "dataset='cifar10'", "enwik8"]),
        (["--report"], ["there are no results yet"]),
        (["--data_path=nothing"], ["nothing: no such file"]),
    ],
)
def test_invalid_curve_options_raise_one_line_errors(tmp_path, flags, words):
    result = run_forked("ablate", "--curves", "--data_path=books", *flags, cwd=tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())
