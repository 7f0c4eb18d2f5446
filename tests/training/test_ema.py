"""The moving average of the parameters: its recursion, who uses it, and that training does not."""

import json

import numpy as np
import pytest
from conftest import light_config, make_model

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.interop.parameters import named_parameters
from hourglass_jax.training.trainer import fit

TOKENS = np.tile(np.arange(3, 11), 100).astype(np.int32)
CONFIG = light_config()
VALIDATION = TOKENS[:130]
STEPS, EMA = 6, 0.3  # below the decay of the first steps, above it afterwards
FROZEN = "embedding"


def train(directory, ema, steps=STEPS, **options):
    """Train all modules but FROZEN with Muon, on two parts of each batch; keep a checkpoint of each step."""
    model = make_model(CONFIG, scale=1.0)
    hg.Run(directory).start(CONFIG)
    fit(
        model,
        random_windows(TOKENS, 16, 4, seed=0),
        consecutive_windows(VALIDATION, 16, 4),
        directory,
        optimizer_config=hg.OptimizerConfig(
            "muon", 3e-2, schedule="constant", warmup_steps=0, ema=ema, train_only="hourglass,head"
        ),
        train_config=hg.TrainConfig(steps=steps, eval_interval=1),
        runtime_config=hg.RuntimeConfig(keep_checkpoints=0, accumulate=2, sample_interval=1, log="none"),
        **options,
    )
    return model


def loaded(directory, step=None):
    return named_parameters(hg.load(directory, step)[0])


def curve(directory, name):
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[name] for record in records if name in record}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two equal runs, with and without an average, and the parameters that the first one drew samples from."""
    home, sampled = tmp_path_factory.mktemp("ema"), []

    def sample(model):
        sampled.append(named_parameters(model))
        return ""

    train(home / "averaged", EMA, sample=sample)
    train(home / "raw", 0.0)
    return home / "averaged", home / "raw", sampled


def recursion(raw):
    """The averages after each step, by NumPy, from the parameters that a run without an average saved."""
    average = named_parameters(make_model(CONFIG, scale=1.0))
    for step in range(STEPS):
        decay, new = min(EMA, (1 + step) / (10 + step)), loaded(raw, step + 1)
        average = {name: decay * old + (1 - decay) * new[name] for name, old in average.items()}
        yield average


def assert_equal(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **tolerance)


def test_checkpoints_and_samples_have_the_averages_of_the_recursion(runs):
    averaged, raw, sampled = runs
    for step, average in enumerate(recursion(raw), 1):
        assert_equal(loaded(averaged, step), average, rtol=1e-5, atol=1e-6)
        assert_equal(sampled[step - 1], average, rtol=1e-5, atol=1e-6)
        with pytest.raises(AssertionError):  # the control: without an average, a checkpoint has the raw parameters
            assert_equal(loaded(raw, step), average, rtol=1e-3, atol=1e-3)


def test_evaluation_uses_the_average(runs):
    averaged, raw, _ = runs
    for run in (averaged, raw):
        for step, loss in curve(run, "valid_loss").items():
            model = hg.load(run, step)[0]
            found = hg.evaluate(model, VALIDATION, block_size=16, batch_size=4).loss
            assert found == pytest.approx(loss, rel=1e-5), step
    assert curve(averaged, "valid_loss") != curve(raw, "valid_loss")


def test_the_best_step_is_that_of_the_averages_lowest_loss(runs):
    averaged, *_ = runs
    losses = curve(averaged, "valid_loss")
    assert_equal(loaded(averaged), loaded(averaged, min(losses, key=losses.get)), rtol=0)


def test_training_does_not_depend_on_the_average(runs):
    averaged, raw, _ = runs
    assert curve(averaged, "train_loss") == curve(raw, "train_loss")
    assert curve(averaged, "parameter_norm") == curve(raw, "parameter_norm")


def test_frozen_parameters_stay_as_they_are(runs):
    start = named_parameters(make_model(CONFIG, scale=1.0))
    for name, value in loaded(runs[0], STEPS).items():
        assert (value == start[name]).all() == name.startswith(FROZEN), name


def test_a_run_with_an_average_resumes_bit_for_bit(runs, tmp_path):
    class Kill(hg.Hook):
        def before_step(self, step):
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, EMA, hooks=[Kill()])
    model = train(tmp_path, EMA)
    assert_equal(named_parameters(model), loaded(runs[0]), rtol=0)
    assert curve(tmp_path, "valid_loss") == curve(runs[0], "valid_loss")
    assert_equal(loaded(tmp_path, STEPS), loaded(runs[0], STEPS), rtol=0)


@pytest.mark.parametrize("ema", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_raises_a_one_line_error(ema):
    with pytest.raises(hg.UsageError, match=r"^ema=.* is out of range; it must be at least 0 and below 1$"):
        hg.OptimizerConfig(ema=ema)
