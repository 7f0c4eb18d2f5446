"""Real processes, really stopped: kill -9 at any moment, SIGTERM, SIGINT; and what a run tells about itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launching import ENVIRONMENT, EXPERIMENTS, run

from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.metrics import read_curves

FLAGS = ["--hierarchy=1@1 1@2 1@1", "--d_model=32", "--n_heads=2", "--d_ff=64", "--block_size=32", "--batch_size=4"]
FLAGS += ["--steps=200", "--train.eval_interval=100", "--optimizer.warmup_steps=5", "--data_path=text.txt", "--out=run"]
FLAGS += ["--sample_interval=80", "--profile_steps=3:4"]

# test_reliability.py has signals at every moment, in one process.
pytestmark = [pytest.mark.slow, pytest.mark.launchers]


def test_a_run_killed_three_times_ends_bit_for_bit_like_an_uninterrupted_run(tmp_path):
    result = run("benchmarks/soak", "--kills=3", "--steps=80", "--report=soak", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["same"] == dict.fromkeys(("step", "params", "opt_state", "curves"), True) and record["identical"]
    assert len(record["kills"]) == 3 and sum(kill["saves_begun"] > 0 for kill in record["kills"]) >= 2
    assert result.stdout.startswith(f"3 kills, {record['during_saves']} of them during a save: identical")
    assert "| a checkpoint being written |" in (tmp_path / "soak.md").read_text()


def stop(home, number):
    """The run, sent the signal once it has logged a step of its own; the finished process."""
    command, out = [sys.executable, EXPERIMENTS / "pretrain.py", *FLAGS], home / "run"
    logged = len(read_curves(out))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=home, env=os.environ | ENVIRONMENT, **pipes) as process:
        while process.poll() is None and len(read_curves(out)) <= logged:
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What became of a run: of each signal the process and the newest whole step after it, then the last process."""
    home, outcomes = tmp_path_factory.mktemp("stopped"), {}
    (home / "text.txt").write_text("the → quick brown 狐 jumps over a → lazy dog. " * 300)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = stop(home, number)
        outcomes[number.name] = process, CheckpointStore(home / "run").sound_step()
    narrow = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}  # a terminal that cannot show the samples
    return home / "run", outcomes, run("pretrain", *FLAGS, cwd=home, **narrow)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_run_and_prints_where(stopped, name):
    process, step = stopped[1][name]
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    words = rf"stopped by {name} after step (\d+), which is saved in run; the same command resumes"
    [said] = re.findall(words, process.stdout)
    assert step == int(said) >= 10


@pytest.mark.parametrize("seconds", [1, 3, 5, 8])
def test_a_second_signal_ends_it_at_once_whatever_xla_is_at(tmp_path, seconds):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 300)
    command = [sys.executable, EXPERIMENTS / "pretrain.py", *FLAGS, "--hierarchy=2@1 12@3 2@1", "--steps=100000"]
    environment = os.environ | ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, encoding="utf-8") as process:
        while not (tmp_path / "run/config.json").exists():
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.endswith("pretrain.py: error: interrupted\n"), stderr


def test_after_signals_the_same_command_ends_the_run(stopped):
    _, outcomes, last = stopped
    assert last.returncode == 0 and "validation: " in last.stdout, last.stderr
    assert 10 <= outcomes["SIGTERM"][1] < outcomes["SIGINT"][1] < 200


def test_a_run_tells_its_speed_norms_memory_samples_and_profile(stopped):
    out = stopped[0]
    records = [record for record in read_curves(out) if "train_loss" in record]
    assert [record["step"] for record in records] == list(range(10, 201, 10))
    for record in records:
        for name in ("characters_per_second", "step_seconds", "gradient_norm", "parameter_norm"):
            assert record[name] > 0
        assert 0 < record["flop_utilisation"] < 1.5
        assert 0 <= record["learning_rate"] <= 2e-3
        assert 1e7 < record["peak_memory_bytes"] < 1e11
    samples = {record["step"]: record["sample"] for record in read_curves(out) if "sample" in record}
    assert samples.keys() == {80, 160} and all(len(sample) == 200 for sample in samples.values())
    assert list((out / "profile").rglob("*.xplane.pb"))
