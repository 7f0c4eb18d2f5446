"""A run directory is one object: what it is, who trains in it, and how it goes on."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import light_config, make_model
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.training import trainer
from hourglass_jax.training.checkpoints import CHECKPOINTS
from hourglass_jax.training.identity import differences, identity
from hourglass_jax.training.run import RunBusy
from hourglass_jax.training.trainer import fit

TOKENS = np.tile(np.arange(3, 11), 300).astype(np.int32)
CONFIG = light_config()
TOKENIZER = hg.CharTokenizer("abcdefgh")
SETTINGS = {"data": {"path": "here/text.txt", "block_size": 16}, "pretrained": "runs/a", "text_fingerprint": 7}


def train(run, *, config=CONFIG, tokens=TOKENS, optimizer=None, validation=None, runtime=None, hooks=(), **options):
    model = make_model(config, scale=1.0)
    result = fit(
        model,
        random_windows(tokens, 16, 8, seed=0),
        consecutive_windows(TOKENS[:200], 16, 4) if validation is None else validation,
        run,
        optimizer_config=hg.OptimizerConfig(**{"learning_rate": 1e-2, "warmup_steps": 5} | (optimizer or {})),
        train_config=hg.TrainConfig(**{"steps": 20, "eval_interval": 10} | options),
        runtime_config=hg.RuntimeConfig(log="none", **(runtime or {})),
        hooks=hooks,
    )
    return nnx.state(model, nnx.Param), result


def content(directory):
    return {path.relative_to(directory): path.is_file() and path.read_bytes() for path in directory.rglob("*")}


def losses(directory):
    return [(r["step"], r[name]) for r in hg.Run(directory).curves() for name in r if name.endswith("_loss")]


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run's directory, parameters and evaluation."""
    jax.config.update("jax_disable_most_optimizations", True)
    directory = tmp_path_factory.mktemp("whole")
    hg.Run(directory).start(CONFIG, TOKENIZER)
    return directory, *train(directory, runtime={"checkpoint_interval": 5, "keep_checkpoints": 0})


FOREIGN = {
    "a model of another library": json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}),
    "a list": "[1, 2]",
    "a record without a tokenizer": json.dumps({"format_version": 1, "model": {}}),
    "no JSON": "architectures:",
    "none": None,
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("config", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_run_is_never_touched(tmp_path, config, overwrite):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "checkpoints").mkdir()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = content(tmp_path)
    with pytest.raises(hg.UsageError, match="exists and is not a run of this library"):
        hg.Run(tmp_path).start(CONFIG, TOKENIZER, overwrite=overwrite)
    assert content(tmp_path) == before


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(hg.UsageError, match="is a file"):
        hg.Run(tmp_path / "file").start(CONFIG, TOKENIZER, overwrite=True)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path, caplog):
    hg.Run(tmp_path).start(CONFIG, TOKENIZER, {"seed": 0})
    for name in ("checkpoints/5", "tensorboard", "profile", "thesis", "samples.png"):
        (tmp_path / name).mkdir(parents=True)  # the last is a directory with the name of a file that is ours
    for name in ("metrics.jsonl", "loss.png", "result.json", "vocab.json.0123abcd.tmp", "notes.txt", "thesis/1.tex"):
        (tmp_path / name).write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        warnings = []
        patch.setattr("hourglass_jax.training.run.logging.warning", lambda text, *args: warnings.append(text % args))
        hg.Run(tmp_path).start(CONFIG, TOKENIZER, {"seed": 1}, overwrite=True)
    kept = {"config.json", "vocab.json", "lock", "notes.txt", "thesis", "samples.png"}
    assert {path.name for path in tmp_path.iterdir()} == kept and (tmp_path / "thesis/1.tex").exists()
    assert hg.Run(tmp_path).read().settings["seed"] == 1
    assert warnings == [f"{tmp_path}: kept files that are not part of a run: notes.txt, samples.png, thesis"]


HOLD = """
import sys, time
from hourglass_jax import Run
Run(sys.argv[1]).claim()
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.launchers
def test_one_process_trains_in_a_directory_and_its_lock_ends_with_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as other:
        assert other.stdout.readline() == "held\n"
        who = rf"another process trains here \({socket.gethostname()}, process {other.pid}\)"
        for use in (lambda: hg.Run(tmp_path).start(CONFIG), lambda: train(tmp_path)):
            with pytest.raises(RunBusy, match=who):
                use()
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        other.kill()
    hg.Run(tmp_path).start(CONFIG, TOKENIZER)


def test_an_error_does_not_lock_its_own_process_out(tmp_path):
    run = hg.Run(tmp_path)  # stays alive, as in a notebook's traceback
    run.start(CONFIG, TOKENIZER, {"seed": 0})
    with pytest.raises(hg.UsageError, match="seed: 0 -> 1"):
        run.start(CONFIG, TOKENIZER, {"seed": 1})
    hg.Run(f"{tmp_path}/").start(CONFIG, TOKENIZER, {"seed": 0})


@pytest.mark.launchers
def test_a_directory_that_was_removed_is_claimed_anew(tmp_path):
    """As by a notebook's cell that is run again: its lock went with it, and another process may hold the new one."""
    out = tmp_path / "run"
    hg.Run(out).start(CONFIG, TOKENIZER)
    shutil.rmtree(out)
    hg.Run(out).start(CONFIG, TOKENIZER, overwrite=True)
    shutil.rmtree(out)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, encoding="utf-8") as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunBusy):
            hg.Run(out).start(CONFIG, TOKENIZER)
        other.kill()


def test_a_run_stays_where_it_was_made_wherever_the_process_goes(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    run = hg.Run("run")
    run.start(CONFIG, TOKENIZER)
    assert run.checkpoints().sound_step() is None  # to look at it makes nothing of it
    monkeypatch.chdir("sub")
    train(run, steps=10)
    assert not any((tmp_path / "sub").iterdir()) and str(run) == "run"
    assert hg.load(tmp_path / "run")[1].characters == TOKENIZER.characters


def test_two_threads_do_not_train_in_one_directory(tmp_path):
    run, inside, leave = hg.Run(tmp_path), threading.Event(), threading.Event()

    def hold():
        with hg.Run(tmp_path).training():
            inside.set()
            leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert inside.wait(60)
        with pytest.raises(RunBusy, match="another thread"), run.training():
            pass
        leave.set()
        held.result()
    with run.training():
        pass


@pytest.mark.parametrize(
    "reason, full", [("unsupported type int4", False), ("OS Error: No space left on device [EAGAIN]", True)]
)
def test_a_save_that_fails_gives_its_own_reason(tmp_path, monkeypatch, reason, full):
    def failing(*_, **__):
        raise ValueError(reason)

    monkeypatch.setattr(ocp.CheckpointManager, "save", failing)
    with pytest.raises(hg.UsageError, match=r"could not be written .*earlier checkpoints are intact") as raised:
        train(tmp_path, steps=1)
    assert reason in str(raised.value) and ("free disk space" in str(raised.value)) == full


def changed(**changes):
    return SETTINGS | changes


@pytest.mark.parametrize(
    "settings, message",
    [
        (changed(data={"path": "/elsewhere/text.txt", "block_size": 16}, pretrained="/runs/a/"), None),
        (changed(data={"path": "here/text.txt", "block_size": 16, "tokenizer": "char"}), None),  # the default
        (
            changed(data={"path": "here/text.txt", "block_size": 16, "tokenizer": "byte"}),
            "data.tokenizer: char -> byte",
        ),
        (changed(data={"path": "here/text.txt", "block_size": 32}), "data.block_size: 16 -> 32"),
        (changed(text_fingerprint=8), "text_fingerprint: 7 -> 8"),
    ],
)
def test_a_run_is_its_settings_wherever_its_files_lie(tmp_path, settings, message):
    run = hg.Run(tmp_path / "run")
    run.start(CONFIG, TOKENIZER, SETTINGS)
    run.release()
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = hg.Run(f"{tmp_path}/moved/")
    if message:
        with pytest.raises(hg.UsageError, match=message):
            moved.start(CONFIG, TOKENIZER, settings)
        return
    moved.start(CONFIG, TOKENIZER, settings)
    assert moved.read().settings["data"]["path"] == settings["data"]["path"]


def test_identity_reaches_the_settings_of_what_a_run_was_pretrained_on():
    settings = {"pretrained_settings": SETTINGS}
    other = {"pretrained_settings": SETTINGS | {"pretrained": "x", "data": SETTINGS["data"] | {"path": "y"}}}
    assert not differences(identity(settings), identity(other))
    other["pretrained_settings"]["data"]["block_size"] = 3
    assert differences(identity(settings), identity(other)) == {"pretrained_settings.data.block_size": (16, 3)}


def test_a_run_goes_on_by_other_means(tmp_path):
    hg.Run(tmp_path).start(CONFIG, TOKENIZER)
    hg.Run(tmp_path).start(dataclasses.replace(CONFIG, attention="plain", remat="full"))
    assert hg.Run(tmp_path).read().config.attention == "plain"
    with pytest.raises(hg.UsageError, match=r"model.dropout: 0.0 -> 0.1"):
        hg.Run(tmp_path).start(dataclasses.replace(CONFIG, dropout=0.1))


def test_another_vocabulary_is_another_run(tmp_path):
    hg.Run(tmp_path).start(CONFIG, TOKENIZER)
    with pytest.raises(hg.UsageError, match="vocabulary"):
        hg.Run(tmp_path).start(CONFIG, hg.CharTokenizer("hgfedcba"))


def test_the_home_directory_is_found(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(whole[0].parent))
    model, tokenizer, _ = hg.load(f"~/{whole[0].name}/")
    assert tokenizer.characters == TOKENIZER.characters
    assert_same(nnx.state(model, nnx.Param), whole[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": {"learning_rate": 1e-3}}, r"optimizer.learning_rate: 0.01 -> 0.001"),
        ({"config": light_config(d_ff=48)}, "model.d_ff: 32 -> 48"),
        ({"tokens": TOKENS[::-1]}, "first_batch_fingerprint"),
        ({"steps": 10}, "train.steps: 20 -> 10"),
        ({"validation": []}, "validation has no batch"),
    ],
)
def test_fit_takes_no_run_for_another(whole, options, message):
    before = content(whole[0])
    with pytest.raises(hg.UsageError, match=message):
        train(str(whole[0]), **options)
    assert content(whole[0]) == before


def test_fit_of_a_finished_run_gives_what_it_came_to(whole):
    params, result = train(str(whole[0]))
    assert result == whole[2]
    assert_same(params, whole[1])


def test_an_evaluation_that_fails_loses_no_step(whole, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError("no memory for the logits")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_batches", out_of_memory)
        with pytest.raises(MemoryError):
            train(tmp_path)
    store = hg.Run(tmp_path).checkpoints()
    assert store.sound_step() == 10 and not store.evaluated(10)
    store.close()
    params, result = train(tmp_path)
    assert losses(tmp_path) == losses(whole[0]) and result == whole[2]
    assert_same(params, whole[1])


def test_evaluations_see_the_whole_validation_text(tmp_path, monkeypatch):
    seen = []
    evaluate = trainer.evaluate_batches
    monkeypatch.setattr(trainer, "evaluate_batches", lambda model, batches: evaluate(model, seen.append(0) or batches))
    asked = []

    class Watched(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    validation = Watched(consecutive_windows(np.resize(TOKENS, 641), 16, 4))
    train(tmp_path, validation=validation, steps=1, eval_batches=2)
    assert len(validation) == 10 and asked[:2] == [2, 7] and len(seen) == 2


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    train(tmp_path, steps=10, eval_interval=5)
    train(tmp_path, steps=20, eval_interval=5)
    [line] = hg.Run(tmp_path).read().history
    assert line["after_step"] == 10 and line["steps"] == [10, 20]
    assert line["schedule"] == "5 warmup steps to 0.01, then cosine to 0 at step 20"
    records = {record["step"]: record for record in hg.Run(tmp_path).curves() if "train_loss" in record}
    assert sorted(records) == [10, 20] and hg.Run(tmp_path).read().settings["train"]["steps"] == 20


@pytest.mark.slow
def test_a_run_that_ends_within_its_profile_writes_that_and_goes_on_with_it(tmp_path):
    for steps in (4, 8):
        train(tmp_path, steps=steps, eval_interval=4, runtime={"profile_steps": "3:6"})
        assert list((tmp_path / "profile").rglob("*.xplane.pb"))
        shutil.rmtree(tmp_path / "profile")


def test_chosen_checkpoints_are_kept_and_loaded(whole, tmp_path):
    directory, params, _ = whole
    steps = [5, 10, 15, 20]
    assert sorted(int(path.name) for path in (directory / CHECKPOINTS).iterdir()) == steps
    models = [nnx.state(hg.load(directory, step=step)[0], nnx.Param) for step in steps]
    assert_same(models[-1], params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, models[:2]), strict=True))
    with pytest.raises(hg.UsageError, match="no checkpoint of step 7; available steps: 5, 10, 15, 20"):
        hg.load(directory, step=7)
    train(tmp_path, runtime={"checkpoint_interval": 5})
    assert sorted(int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir()) in ([15, 20], [10, 15, 20])
    with pytest.raises(hg.UsageError, match="keep_checkpoints=1"):
        hg.RuntimeConfig(keep_checkpoints=1)


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    options = {"optimizer": {"learning_rate": 1e-30}, "steps": 100, "eval_interval": 2, "patience": 3}
    train(tmp_path, **options)
    assert [step for step, _ in losses(tmp_path)] == [2, 4, 6, 8]  # one, and three that are no better
    train(tmp_path, **options)
    assert [step for step, _ in losses(tmp_path)] == [2, 4, 6, 8]


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(trainer.logging, "warning", lambda text, *args: warnings.append(text % args))
    train(tmp_path / "short", steps=1, optimizer={"warmup_steps": 20})
    assert warnings == ["warmup_steps=20 is not less than steps=1: the learning rate never reaches its peak"]


def test_a_model_without_a_training_s_state_is_not_gone_on_with(tmp_path):
    run = hg.Run(tmp_path)
    run.start(CONFIG, TOKENIZER)
    store = run.checkpoints()
    store.save(0, nnx.state(make_model(CONFIG), nnx.Param))
    store.close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(hg.UsageError, match=r"without optimizer state, .*; start a new run with --init_from="):
        train(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
