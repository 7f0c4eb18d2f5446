"""Runs and weights made by earlier code load and resume with the recorded figures.

`fixtures/run-format-1.tar.xz` is a run of version 0.1.0, stopped after step 5 of 10:

    pretrain.py --data_path=text.txt --hierarchy="1@1 1@2 1@1" --d_model=8 --n_heads=2 --d_ff=16 --block_size=24
        --batch_size=4 --steps=10 --optimizer.weight_decay=0.1 --optimizer.clip_norm=1.0 --learning_rate=0.01
        --optimizer.warmup_steps=2 --train.eval_interval=5 --seed=3

where text.txt is the package's haiku.txt. The figures are those of an AMD EPYC processor.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from launching import FIXTURES, run_forked

import hourglass_jax as hg

FIXTURE = FIXTURES / "run-format-1.tar.xz"
HAIKU = Path(hg.__file__).parent / "data" / "haiku.txt"
OPTIONS = """--recipe=paper --data_path=text.txt --out=run --hierarchy=1@1_1@2_1@1 --d_model=8 --n_heads=2 --d_ff=16
    --block_size=24 --batch_size=4 --steps=10 --optimizer.weight_decay=0.1 --optimizer.clip_norm=1.0
    --learning_rate=0.01 --optimizer.warmup_steps=2 --train.eval_interval=5 --seed=3"""
VALID_LOSS = {5: 3.356517637681114, 10: 3.260176827590441}
TEXT = "It was a dark night, and the rain fell in torrents."
LOG_PROBABILITIES = {  # of every tenth token of TEXT, from its second one
    "books": [-3.00176, -1.93695, -0.78528, -1.29246, -0.91258],
    "haiku": [-3.83218, -1.15135, -1.31550, -0.40331, -2.09824],
}


@pytest.fixture
def earlier_run(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    shutil.copy(HAIKU, tmp_path / "text.txt")
    return tmp_path


@pytest.mark.launchers
def test_an_earlier_run_resumes_with_the_recorded_loss(earlier_run):
    result = run_forked("pretrain", *(flag.replace("_1@", " 1@") for flag in OPTIONS.split()), cwd=earlier_run)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (earlier_run / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["valid_loss"] for record in records if "valid_loss" in record}
    assert losses == pytest.approx(VALID_LOSS, abs=1e-4)


def test_an_earlier_checkpoint_evaluates_to_the_recorded_loss(earlier_run):
    model, tokenizer, _ = hg.load(earlier_run / "run")
    tokens = tokenizer.encode(HAIKU.read_text())
    valid = tokens[int(0.9 * len(tokens)) :]
    # The recorded loss is that of 20 batches, this one of all.
    assert hg.evaluate(model, valid, block_size=24).loss == pytest.approx(VALID_LOSS[5], abs=0.05)


@pytest.mark.parametrize("name", LOG_PROBABILITIES)
def test_shipped_weights_give_the_recorded_log_probabilities(name):
    model, tokenizer, _ = hg.load_pretrained(name)
    tokens = tokenizer.encode(TEXT if name == "books" else TEXT.lower())
    scores = np.ravel(nnx.jit(hg.score)(model, np.asarray(tokens)[None]))
    np.testing.assert_allclose(scores[::10], LOG_PROBABILITIES[name], atol=2e-4)
