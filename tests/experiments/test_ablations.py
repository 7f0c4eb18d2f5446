"""The paper's tables: their data, their rows as runs, and what a report takes from these and from its record."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import pytest
from flax import nnx
from launching import METHOD, run_forked

import hourglass_jax as hg
from experiments.ablations import costs, reporting, rows
from experiments.ablations.rows import make_job, plan, row_config
from experiments.ablations.scales import SCALES, find_setup, for_table
from experiments.ablations.tables import TABLES, find_table
from hourglass_jax.training.optimizer import optimizer_flops
from hourglass_jax.training.run import RunBusy
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import Diverged

# A table of one's own at a scale that trains in seconds; its shortening is that of the README.
PLUGIN = """
from dataclasses import replace

from experiments.ablations.scales import SETUPS
from experiments.ablations.table import TEXT, Row, Table
from experiments.ablations.tables import TABLES

setup = SETUPS["text", "tiny"]
SETUPS["text", "tiny"] = replace(
    setup,
    model=setup.model | {"d_model": 16, "n_heads": 2, "d_ff": 32},
    data=replace(setup.data, split="fraction", block_size=24),
    train=replace(setup.train, steps=4, eval_interval=2, eval_batches=2),
    n_valid=8,
)
free = {"shortening": "gated", "upsampling": "repeat", "hierarchy": "0@1 1@2 1@1"}
rows = (
    Row("plain", TEXT | {"hierarchy": "1@1"}, {"bpc": 1.2}),
    Row("own", free | {"boundaries": "whitespace"}, {"bpc": 1.1}),
    Row("k drawn", free, {"bpc at k=2": 1.1, "bpc at k=3": 1.2}, factors=(2, 3)),
)
TABLES["own", "enwik8"] = Table("own", "enwik8", "A table of one's own", "model", "bpc", rows, "plain")
"""


def test_the_paper_s_tables_are_complete():
    assert {number for number, _ in TABLES} == {*"12345678", "A1", "B1", "F7", "M1", "M2"}
    n_paper = {key: sum(bool(row.paper) for row in table.rows) for key, table in TABLES.items()}
    assert n_paper["1", "enwik8"] == 15 and n_paper["4", "enwik8"] == 9
    for number, n_rows in (("5", 4), ("6", 5), ("7", 4), ("8", 4)):
        assert n_paper[number, "enwik8"] == n_paper[number, "cifar10"] == n_rows


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("number, dataset", TABLES)
def test_every_row_is_a_model_and_differs_from_the_others(number, dataset, scale):
    table, setup = find_table(number, dataset), find_setup(dataset, scale)
    setup = for_table(setup, table)
    assert bool(setup.scaled) == (scale != "paper" and dataset != "letters")
    rows = [row for row in table.rows if row.options is not None]
    assert len({row.name for row in table.rows}) == len(table.rows)
    assert table.baseline in [row.name for row in rows]
    assert len({(row_config(row, setup), row.factors, str(row.optimizer)) for row in rows}) == len(rows)
    assert all(f"{table.metric} at k={k}" in row.paper for row in rows for k in row.factors)


def test_the_paper_s_set_ups():
    text, images = find_setup("enwik8", "paper"), find_setup("cifar10", "paper")
    assert (text.train.steps, text.data.block_size, text.data.batch_size) == (200_000, 2048, 8)
    assert (images.train.steps, images.data.block_size, images.data.batch_size) == (100_000, 3072, 8)
    assert text.model["dropout"] == 0.15 and text.optimizer.learning_rate == 4e-4
    assert find_setup("imagenet32", "paper").data.batch_size == 64
    main = find_table("2", "enwik8")
    for scale, found in (("paper", (768, 350_000, 20_000)), ("tiny", (128, 2000, 100))):
        setup = for_table(find_setup("enwik8", scale), main)
        assert (setup.model["d_model"], setup.train.steps, setup.optimizer.warmup_steps) == found
    assert "model.d_model: 768 -> 128" in setup.scaled and "steps: 350000 -> 2000" in setup.scaled
    muon = for_table(replace(text, optimizer=replace(text.optimizer, optimizer="muon")), main)
    assert muon.train.steps == 350_000 and muon.scaled == "optimizer.optimizer: adamw -> muon"


@pytest.mark.parametrize("scale", SCALES)
def test_boundaries_are_compared_at_equal_flops(scale, tmp_path):
    table, setup = find_table("B1", "enwik8"), find_setup("enwik8", scale)
    flops = {row.name: make_job(table, row, setup, tmp_path, 0).step_flops() for row in table.rows}
    assert all(
        abs(of_row / flops["plain"] - 1) < (0.06 if name == "gumbel" else 0.05) for name, of_row in flops.items()
    )
    assert flops["spacelike"] == flops["whitespace"] <= min(flops["fixed, k=4"], flops["fixed, k=6"])
    jobs = plan([table, find_table("1", "enwik8")], setup, tmp_path, 2)
    assert len(jobs) == 21 + 19 - 2  # three seeds of every row; the plain one is Table 1's baseline
    assert plan([table], setup, tmp_path, 2, first_seed=2) == [job for job in jobs[:21] if job.train.seed == 2]
    with pytest.raises(hg.UsageError, match="first_seed=3: no row has that many seeds"):
        plan([table], setup, tmp_path, 2, first_seed=3)
    known = {name for column in table.published.values() for name in column}
    assert {row.name for row in table.rows} < known


def test_flops_of_a_drawn_factor_are_the_mean_of_those_of_its_values(tmp_path):
    table, setup = find_table("4", "enwik8"), find_setup("enwik8", "tiny")
    drawn, at_2, at_3 = (make_job(table, row, setup, tmp_path, 0).step_flops() for row in table.rows[:3])
    assert at_3 < at_2 and drawn == (at_2 + at_3) / 2


def test_flops_of_a_row_include_those_of_its_optimizer(tmp_path):
    table, setup = find_table("M1", "enwik8"), find_setup("enwik8", "micro")
    paper, muon = (
        make_job(table, row, setup, tmp_path, 0) for row in table.rows if row.name in ("6@1, paper", "6@1, muon")
    )
    params = nnx.state(nnx.eval_shape(lambda: hg.HourglassLM(muon.config, rngs=nnx.Rngs(0))))
    own = optimizer_flops(muon.setup.optimizer, params)
    assert muon.step_flops() - paper.step_flops() == own > 0.05 * paper.step_flops()


def test_rows_are_timed_with_their_own_optimizer(tmp_path, monkeypatch):
    class FakeStep:
        memory_bytes = 0

        def __init__(self, config, batches, *optimizer):
            timed.append(optimizer)

        def __call__(self):
            pass

    timed = []
    monkeypatch.setattr(costs, "Step", FakeStep)
    jobs = plan([find_table("M1", "enwik8")], find_setup("enwik8", "micro"), tmp_path, 1, ["6@1, paper", "6@1, muon"])
    costs.measure(jobs, Signals())
    assert timed == [(job.setup.optimizer,) for job in jobs] and timed[0] != timed[1]


def test_jobs_that_are_busy_or_diverge_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    jobs = plan([find_table("A1", "letters")], find_setup("letters", "tiny"), tmp_path, 2)
    trained = []

    def train_job(job, *_):
        if job is jobs[0] and len(trained) < 2:
            raise RunBusy("host, process 7 trains here")
        if job is jobs[1]:
            raise Diverged("step 3: train_loss is nan")
        trained.append(job.directory)
        return True

    monkeypatch.setattr(rows, "train_job", train_job)
    monkeypatch.setattr(rows.Job, "result", lambda job: job.directory in trained or None)
    with pytest.raises(
        hg.UsageError, match=rf"1 of {len(jobs)} trainings diverged .*{re.escape(str(jobs[1].directory))}"
    ):
        rows.train(jobs, find_setup("letters", "tiny"), hg.RuntimeConfig(), Signals())
    assert sorted(trained) == sorted(job.directory for job in jobs if job is not jobs[1]) and len(jobs) > 3
    assert trained.index(jobs[0].directory) == 2 and capsys.readouterr().out.count("train_loss is nan") == 1


def test_tables_share_the_runs_of_equal_rows(tmp_path):
    setup = find_setup("enwik8", "tiny")
    alone = [plan([find_table(number, "enwik8")], setup, tmp_path, 2) for number in "15"]
    together = plan([find_table(number, "enwik8") for number in "15"], setup, tmp_path, 2)
    assert len(alone[0]) == 19 and len(alone[1]) == 5
    assert len(together) == 20  # all of Table 5 is in Table 1, but for the second seed of its baseline
    assert len({job.directory for job in together}) == len(together)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory in which the plugin's table has been trained and timed."""
    home = tmp_path_factory.mktemp("ablations")
    (home / "gated.py").write_text(METHOD)
    (home / "plugin.py").write_text(PLUGIN)
    (home / "books").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    assert "to train" in ablate(home, "--dry_run")
    assert not (home / "runs").exists()
    assert "4 of 4 trainings are done" in ablate(home)
    ablate(home, "--time")
    return home


COMMON = ("--plugin=gated.py", "--plugin=plugin.py", "--table=own", "--data_path=books", "--results=results")


def ablate(home, *flags):
    result = run_forked("ablate", *COMMON, *flags, cwd=home)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_finished_rows_are_skipped_and_interrupted_ones_resume(home):
    assert "seed0\n" not in ablate(home)  # the directories of trained rows
    result = home / "runs/ablations/books-tiny/0@1_1@2_1@1-gated-repeat-boundaries=whitespace/seed0/result.json"
    before = json.loads(result.read_text())
    result.unlink()  # as if the process had been killed between the last checkpoint and this file
    assert ablate(home).count("seed0\n") == 1
    assert json.loads(result.read_text())["figures"] == before["figures"]


def test_a_row_trained_with_other_settings_is_trained_again(home):
    path = home / "runs/ablations/books-tiny/1@1/seed0/config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"steps": 4', '"steps": 5'))
    for flags in ([], ["--report"]):
        result = run_forked("ablate", *COMMON, *flags, cwd=home)
        assert result.returncode == 2 and "train.steps: 5 -> 4" in result.stderr
    path.write_text(whole)


def test_a_row_trained_on_another_text_of_the_same_name_is_trained_again(home, tmp_path):
    (tmp_path / "books").write_bytes(b"sphinx of black quartz, judge my vow. " * 100)
    result = run_forked("ablate", *COMMON, f"--data_path={tmp_path / 'books'}", cwd=home)
    assert result.returncode == 2 and "seed0: was trained on other data than" in result.stderr


def test_seeds_and_costs_of_a_record_stay_where_their_runs_are_gone(home, tmp_path):
    ablate(home, "--report")
    row = home / "runs/ablations/books-tiny/1@1"
    record = home / "results" / "tableown-books-tiny.json"
    before = json.loads(record.read_text())["rows"]
    for name in ("seed1", "cost.json"):
        shutil.move(row / name, tmp_path / name)
    ablate(home, "--report", "--data_path=elsewhere/books")  # the text is gone, too
    for name in ("seed1", "cost.json"):
        shutil.move(tmp_path / name, row / name)
    assert json.loads(record.read_text())["rows"] == before


def test_a_row_that_tables_share_is_stored_in_all_of_them(tmp_path):
    """The plain row of B1 is Table 1's 6@1, if set-up and data are the same; older records lack newer options."""
    setup = find_setup("enwik8", "micro", "text")
    stored = reporting.collect(find_table("B1", "enwik8"), setup, tmp_path / "text-micro", tmp_path)
    stored["rows"][0]["runs"] = [{"seed": 0, "figures": {"bpc": 2.0}}, {"seed": 1, "figures": {"bpc": 2.1}}]
    other_setup, other_data = {"setup": stored["setup"] | {"steps": 5_000}}, {"data": "my-text-micro"}
    without_background = {name: value for name, value in stored["setup"]["data"].items() if name != "background"}
    older = {"setup": stored["setup"] | {"data": without_background}}
    for changed, n_seeds in (({}, 2), (older, 2), (other_setup, 0), (other_data, 0)):
        (tmp_path / "tableB1-my-text-micro.json").write_text(json.dumps(stored | changed))
        table = reporting.collect(find_table("1", "enwik8"), setup, tmp_path / "text-micro", tmp_path)
        assert [row["name"] for row in table["rows"] if row["runs"]] == ["6@1"][:n_seeds]
        assert len(table["rows"][0]["runs"]) == n_seeds


def test_a_damaged_record_raises_a_one_line_error(home):
    result = home / "runs/ablations/books-tiny/1@1/seed0/result.json"
    whole = result.read_text()
    result.write_text(whole[:20])
    found = run_forked("ablate", *COMMON, "--report", cwd=home)
    result.write_text(whole)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "seed0/result.json: not JSON" in found.stderr


def test_a_custom_shortening_becomes_a_row_of_table_8(home):
    lines = ablate(home, "--table=8", "--dry_run").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:8]] == [
        *("| average", "| attention_average", "| attention_linear", "| linear", "| gated", "| attention_average")
    ]
    assert ablate(home, "--table=8", "--rows=gated", "--dry_run").count("to train") == 1
    assert ablate(home, "--table=8", "--rows=gated", "--seeds=3", "--first_seed=1", "--dry_run").count("to train") == 2


def test_a_row_s_directory_is_a_run(home):
    plain = home / "runs/ablations/books-tiny/1@1"
    _, tokenizer, config = hg.load(plain / "seed1")
    assert config.hierarchy == "1@1" and config.d_model == 16 and isinstance(tokenizer, hg.ByteTokenizer)
    result = run_forked("evaluate", "--load_model_path=" + str(plain / "seed1"), "--data_path=books", cwd=home)
    assert result.returncode == 0, result.stderr


def test_reports_come_from_the_stored_record_alone(home, tmp_path):
    ablate(home, "--report", "--comment=Said once.")
    path = home / "results" / "tableown-books-tiny"
    text, record = path.with_suffix(".md").read_text(), json.loads(path.with_suffix(".json").read_text())
    assert "Said once." in text and "| **plain** |" in text and "±" in text
    assert [len(row["runs"]) for row in record["rows"]] == [2, 1, 1]
    assert set(record["rows"][2]["runs"][0]["figures"]) == {"bpc at k=2", "bpc at k=3"}
    assert record["rows"][1]["runs"][0]["groups"] == {"length": pytest.approx(4.4, abs=0.5), "suppressed": 0}
    assert all(row["cost"]["step_seconds"] > 0 and row["cost"]["memory_bytes"] > 0 for row in record["rows"])
    assert set(record["anchors"]) == {"xz -9", "bzip2 -9"}
    shutil.move(home / "runs", tmp_path / "runs")
    path.with_suffix(".md").unlink()
    picture = path.with_suffix(".png")
    picture.unlink()
    ablate(home, "--report")
    shutil.move(tmp_path / "runs", home / "runs")
    assert path.with_suffix(".md").read_text() == text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--table=9"], ["table='9'", "choose one of", "A1"]),
        (["--table=1", "--dataset=cifar10"], ["table 1", "no column for dataset='cifar10'", "enwik8"]),
        (["--table=5", "--dataset=mnist"], ["dataset='mnist'", "cifar10"]),
        (["--table=5", "--scale=huge"], ["scale='huge'", "tiny"]),
        (["--table=5", "--data_path=nothing"], ["nothing: no such file"]),
        (["--table=5", "--data_path=short"], ["split='enwik8'", "100,000,000", "5"]),
        (["--table=5", "--dataset=cifar10", "--data_path=nothing"], ["nothing: no such directory", "data_batch"]),
        (["--table=5", "--report", "--data_path=short"], ["table5-short-tiny.json: there are no results yet"]),
        (["--table=5", "--rows=n=5"], ["rows='n=5'", "n=4"]),
        (["--table=5,6", "--report", "--comment=a"], ["--comment", "5,6"]),
        (["--table=5", "--comment=a"], ["--comment is for --report, not for training"]),
        (["--table=5", "--report", "--dry_run"], ["--report and --dry_run exclude each other"]),
        (["--table=5", "--characters=9"], ["--characters is for --curves, not for --table"]),
        (["--table=5", "--curves"], ["not --table and --curves"]),
        (["--curves", "--time"], ["--time is for --table, not for --curves"]),
        (["--lengths", "--first_seed=1"], ["--first_seed is for --table, not for --lengths"]),
        (["--costs", "--recipe=modern"], ["--recipe is for ", "not for --costs"]),
        (["--table=M1", "--recipe=modern"], ["--recipe=modern: the rows of tables M1 and M2", "leave it out"]),
        ([], ["--table=1,5", "not none"]),
    ],
)
def test_invalid_ablation_options_raise_one_line_errors(tmp_path, flags, words):
    (tmp_path / "short").write_text("short")
    result = run_forked("ablate", *flags, cwd=tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert all(word in line for word in words), line
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_figure_names_are_metrics_of_their_table():
    for table, row in itertools.chain.from_iterable(((t, row) for row in t.rows) for t in TABLES.values()):
        known = {"memory_gb", "steps_per_second", "parameters_millions"}
        assert all(name in known or name.split(" at ")[0] == table.metric for name in row.paper)
