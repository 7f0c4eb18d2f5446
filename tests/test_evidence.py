"""The whole evidence in slices: its order, stops of every kind, and what is kept between two slices."""

import itertools
import json
import os

import jax
import numpy as np
import pytest
from launching import MICRO, run_forked

from experiments.ablations import evidence
from experiments.ablations.costs import step_flops
from experiments.ablations.rows import plan
from experiments.ablations.scales import SCALES, find_setup
from experiments.ablations.tables import find_table
from experiments.common.slices import TRIES, keep_compiled

TABLES = evidence.find_tables(evidence.NUMBERS)
# A pair of rows that train in seconds.
PLUGIN = f"""{MICRO}
from experiments.ablations import curves, evidence
from experiments.ablations.table import TEXT, Row, resampling
from experiments.ablations.tables import TABLES

light = resampling("average", "repeat") | {{"hierarchy": "0@1 1@2 1@1"}}
rows = (Row("light", light, {{"bpc": 1.1}}), Row("1@1", TEXT | {{"hierarchy": "1@1"}}, {{"bpc": 1.2}}))
TABLES["1", "enwik8"] = replace(TABLES["1", "enwik8"], rows=rows, baseline="1@1")
evidence.PAIRS, evidence.SEEDS = (("1@1", "light"),), 1
curves.POINTS, curves.BRANCHES, curves.DECAY, curves.PAIRS = (480, 960), (960,), 0.4, ()
"""
CURVE = "curves.PAIRS = (curves.Pair(curves.light('0@1 1@2 1@1'), ()),)"  # two legs and a branch
# Notes every step, kills the process before one, and lets the time be up after one.
WATCH = """
import os
import signal

from hourglass_jax.training import trainer

train_on = trainer._Training.train_on


def watched(self, step, batch):
    at = f"{self.run.directory.parent.name} {self.run.directory.name} {step}"
    if os.environ.get("KILL_AT") == at:
        self.store.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    with open("steps", "a") as file:
        file.write(at + "\\n")
    train_on(self, step, batch)
    if os.environ.get("STOP_AT") == at:
        self.signals.end = 0


trainer._Training.train_on = watched
"""
PLAIN, LIGHT = "1@1 seed0", "0@1_1@2_1@1-average-repeat seed0"


def make_home(home, plugin):
    (home / "plugin.py").write_text(plugin)
    (home / "watch.py").write_text(WATCH)
    (home / "books").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    return home


def run_slice(home, *flags, **environment):
    """What the process said, its exit code, and the steps that it trained by run."""
    (home / "steps").write_text("")
    flags = ["--plugin=plugin.py", "--plugin=watch.py", "--data_path=books", "--tables=1", *flags]
    process = run_forked("evidence", *flags, cwd=home, **environment)
    steps = {}
    for line in (home / "steps").read_text().splitlines():
        name, _, step = line.rpartition(" ")
        steps.setdefault(name, []).append(int(step))
    return process, steps


def reached(directory):
    """Figures and losses of sequences, of each run."""
    paths = {path.parent.relative_to(directory).as_posix(): path for path in directory.rglob("result.json")}
    figures = {name: json.loads(path.read_text())["figures"] for name, path in paths.items()}
    losses = {path.parent.name: np.load(path).tobytes() for path in directory.rglob("losses.npy")}
    return figures, losses


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """A directory, and the slices in it: the time is up in the second row; the rest."""
    home = make_home(tmp_path_factory.mktemp("evidence"), PLUGIN)
    return home, [run_slice(home, STOP_AT=f"{LIGHT} 5"), run_slice(home)]


def test_a_slice_ends_in_time_and_says_what_is_done_and_next(slices):
    process, steps = slices[1][0]
    assert process.returncode == 0, process.stderr
    assert steps == {PLAIN: list(range(1, 13)), LIGHT: list(range(1, 6))}  # the pair, side by side
    assert "stopped at the end of its time after step 5" in process.stdout
    following = LIGHT.replace(" ", "/")
    *_, pairs, table, _, _, last = process.stdout.splitlines()
    for line, title in ((pairs, "main pairs"), (table, "table 1")):
        assert line.startswith(f"| {title} | 1 of 2 | ") and line.endswith(f" | {following} |")
    assert last == f"1 of 2 parts are done; next is {following}; the same command goes on"


def test_the_same_command_goes_on_and_trains_nothing_twice(slices):
    process, steps = slices[1][1]
    assert process.returncode == 0 and steps == {LIGHT: list(range(6, 13))}, process.stderr
    assert process.stdout.endswith("2 of 2 parts are done; nothing is left to train\n")


def test_reports_stay_and_checkpoints_go(slices):
    out = slices[0] / "runs/evidence"
    assert {path.suffix for path in (out / "results").glob("table1-books-micro.*")} == {".json", ".md", ".png"}
    record = json.loads((out / "results/table1-books-micro.json").read_text())
    assert [len(row["runs"]) for row in record["rows"]] == [1, 1]
    for name in ("checkpoints", "tensorboard", "metrics.jsonl"):
        assert not list(out.rglob(name))


@pytest.mark.slow
def test_slices_that_are_stopped_or_killed_leave_what_one_run_leaves(tmp_path):
    home = make_home(tmp_path, f"{PLUGIN}{CURVE}\n")
    process, steps = run_slice(home, KILL_AT=f"{LIGHT} 9")
    assert process.returncode == -9 and steps == {PLAIN: list(range(1, 13)), LIGHT: list(range(1, 9))}
    for stop in ("960-constant 8", "960-decayed 12"):  # of ten steps, five of them before, and of four more
        process, steps = run_slice(home, STOP_AT=f"seed0 {stop}")
        name, _, step = f"seed0 {stop}".rpartition(" ")
        assert process.returncode == 0 and steps[name][-1] == int(step), process.stderr
        assert PLAIN not in steps and steps.get(LIGHT, range(7, 13))[0] == 7  # the last checkpoint is that of step 6
        assert len(list(home.rglob("checkpoints"))) == 2  # of the leg, and of the one before
    for flags, n_steps in (((), 2), ((), 0), (("--out=whole",), 38)):
        process, steps = run_slice(home, *flags)
        assert process.stdout.endswith("5 of 5 parts are done; nothing is left to train\n"), process.stderr
        assert sum(map(len, steps.values())) == n_steps
    found, whole = (reached(home / out / "books-micro") for out in ("runs/evidence", "whole"))
    assert found == whole and len(found[0]) == 5 and len(found[1]) == 3
    assert (home / "runs/evidence/results/curves-books-micro.md").exists()
    assert not list(home.rglob("checkpoints"))


@pytest.mark.slow
def test_workers_share_the_parts_and_train_nothing_twice(slices, tmp_path):
    home = make_home(tmp_path, PLUGIN)
    process, steps = run_slice(home, "--workers=2", XLA_FLAGS="")
    assert process.returncode == 0 and steps == {name: list(range(1, 13)) for name in (PLAIN, LIGHT)}, process.stderr
    assert process.stdout.endswith("2 of 2 parts are done; nothing is left to train\n")
    runs = home / "runs/evidence/books-micro"
    assert sorted(path.name for path in runs.glob("slices-*")) == ["slices-0.json", "slices-1.json"]
    assert reached(runs) == reached(slices[0] / "runs/evidence/books-micro")


def test_without_time_nothing_begins(slices):
    process, steps = run_slice(slices[0], "--out=none", "--slice_minutes=0")
    assert process.returncode == 0 and not steps, process.stderr
    assert process.stdout.endswith("0 of 2 parts are done; next is 1@1/seed0; the same command goes on\n")


def test_compiled_programs_stay_where_the_environment_names_no_other_place(tmp_path, monkeypatch):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for place in (str(tmp_path), ""):
            monkeypatch.setenv(names[0].upper(), place)
            keep_compiled(tmp_path / "own")
            assert (jax.config.jax_compilation_cache_dir == str(tmp_path / "own")) == (not place)
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--data_path", "enwik8's shape"]),
        (["--data_path=nothing"], ["nothing: no such file"]),
        (["--data_path=books", "--scale=huge"], ["scale='huge'", "micro"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    result = run_forked("evidence", *flags, cwd=tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", SCALES)
def test_pairs_come_first_then_tables_then_seeds_then_curves(scale, tmp_path):
    setup = find_setup("enwik8", scale)
    groups = evidence.groups(setup, tmp_path, TABLES)
    parts = list(evidence.in_order(groups).values())
    pairs = list(itertools.chain(*evidence.PAIRS))
    assert [part.job.config.hierarchy for part in parts[: len(pairs)]] == pairs
    assert len({part.job.directory for part in parts}) == len(parts)
    jobs = plan(TABLES, setup, tmp_path, 2)
    rows = [part for part in parts if "curves" not in part.name]
    assert {job.directory for job in jobs} < {part.job.directory for part in rows}
    assert parts[len(rows) :] == groups["learning curves"]
    seeds = [part.job.train.seed for part in rows]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}
    assert {row.job.config.hierarchy for row in rows if row.job.train.seed == 1} >= set(pairs)
    of_table_1 = {part.name for part in groups["table 1"]}
    assert [i for i, part in enumerate(rows) if part.name in of_table_1 and not part.job.train.seed] == list(range(18))
    for i, part in enumerate(parts):
        assert part.before is None or part.before in [earlier.job for earlier in parts[:i]]


def test_pairs_are_of_about_the_same_cost(tmp_path):
    table, setup = find_table("1", "enwik8"), find_setup("enwik8", "micro")
    flops = {job.row.name: step_flops(job) for job in plan([table], setup, tmp_path, 1)}
    for plain, hourglass in evidence.PAIRS[:3]:
        assert 0.85 < flops[hourglass] / flops[plain] < 1.15
    costs = [flops[plain] for plain, _ in evidence.PAIRS]
    assert all(min(costs) < flops[hourglass] < max(costs) for _, hourglass in evidence.PAIRS)


def leave(directory, **sizes):
    """Files of so many bytes."""
    for name, size in sizes.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))


def test_what_nobody_goes_on_from_goes(tmp_path):
    parts = evidence.groups(find_setup("enwik8", "micro"), tmp_path / "runs", TABLES)["learning curves"]
    first, second, third = [part for part in parts if "curves/6@1/" in part.name and "constant" in part.name][:3]
    for part in (first, second):
        leave(part.job.directory, **{"result.json": 1, "metrics.jsonl": 5, "tensorboard__events": 7})
    leave(first.job.directory, checkpoints__488__params=10)
    leave(second.job.directory, checkpoints__488__params=10, checkpoints__977__params=10, **{"losses.npy": 3})
    leave(third.job.directory, checkpoints__977__params=20, checkpoints__1200__params=20)
    leave(tmp_path / "compiled", old=40, new=30)
    os.utime(tmp_path / "compiled" / "old", (1, 1))

    def left(limit):
        size = evidence.tidy(parts, tmp_path, tmp_path / "compiled", limit)
        files = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert size == sum(path.stat().st_size for path in files)
        return {
            path.parent.name if path.name == "params" else path.name for path in files if path.name != "result.json"
        }

    kept = {"losses.npy", "metrics.jsonl", "977", "1200", "old", "new"}
    assert left(0) == kept and left(1000) == kept
    assert not (first.job.directory / "checkpoints").exists()
    assert left(100) == kept - {"old"}
    assert left(40) == kept - {
        "old",
        "new",
        "1200",
    }  # of the second leg, the checkpoint stays: the third goes on from it
    assert left(1) == {"losses.npy", "metrics.jsonl", "977"}


def test_a_part_that_failed_is_tried_once_more_and_then_given_up(tmp_path):
    parts = evidence.in_order(evidence.groups(find_setup("enwik8", "micro"), tmp_path, TABLES))
    first, second, *_ = parts
    record = {"rows": {name: {"kind": "failed", "reason": "no"} for name in (first, second)}, "tries": {}}
    record["tries"] = {first: TRIES - 1, second: TRIES}
    (tmp_path / "slices-0.json").write_text(json.dumps(record))
    assert evidence.read_progress(tmp_path, parts)["rows"] == {second: record["rows"][second]}
    text = evidence.summary(evidence.groups(find_setup("enwik8", "micro"), tmp_path, TABLES), parts, record)
    assert f"{first} waits after: no" in text and f"{second} is given up: no" in text
    assert f"0 of {len(parts)} parts are done; next is {first}; the same command goes on" in text


def test_what_another_worker_is_at_counts_for_no_try(tmp_path):
    parts = evidence.in_order(evidence.groups(find_setup("enwik8", "micro"), tmp_path, TABLES))
    name = next(iter(parts))
    for worker, tries in enumerate(({name: 1}, {})):
        (tmp_path / f"slices-{worker}.json").write_text(json.dumps({"rows": {}, "tries": tries}))
    assert [evidence.read_progress(tmp_path, parts, worker)["tries"] for worker in "1*"] == [{}, {name: 1}]


def test_what_goes_on_from_a_part_that_is_given_up_is_given_up_too(tmp_path):
    groups = evidence.groups(find_setup("enwik8", "micro"), tmp_path, TABLES)
    parts, curve = evidence.in_order(groups), [part for part in groups["learning curves"] if "/6@1/" in part.name]
    first = curve[0].name
    record = {"rows": {first: {"kind": "failed", "reason": "diverged"}}, "tries": {first: TRIES}}
    (tmp_path / "slices-0.json").write_text(json.dumps(record))
    progress = evidence.read_progress(tmp_path, parts)
    assert progress["rows"].keys() == {part.name for part in curve}
    assert not any(evidence.is_waiting(part.name, progress) for part in curve)
    assert evidence.is_waiting(next(iter(parts)), progress)


def test_of_unfinished_runs_the_last_in_the_order_goes_first(tmp_path):
    parts = evidence.groups(find_setup("enwik8", "micro"), tmp_path / "runs", TABLES)["table 1"]
    for part in parts[:3]:
        leave(part.job.directory, checkpoints__488__params=10)
    for limit, n_left in ((30, 3), (20, 2), (19, 1)):
        evidence.tidy(parts, tmp_path, tmp_path / "compiled", limit)
        assert [(part.job.directory / "checkpoints").exists() for part in parts[:3]] == [i < n_left for i in range(3)]
