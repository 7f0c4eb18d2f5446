"""Shorten-factor dropout (section 4.1): one set of parameters at several factors."""

from collections import Counter

import jax
import numpy as np
import pytest
from conftest import RESAMPLINGS, forward, make_model, small_config
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.training.metrics import read_curves
from hourglass_jax.training.trainer import fit
from hourglass_jax.transfer import drawn_factor

FREE = {
    "average",
    "select",
    "attention_average",
    "repeat",
    "attention",
    "attention_repeat",
    "smooth",
}  # of parameters of the factor's size


@pytest.mark.parametrize("shortening, upsampling", RESAMPLINGS)
def test_every_method_without_parameters_of_its_own_takes_another_factor_and_no_other_does(shortening, upsampling):
    options = {"shortening": shortening, "upsampling": upsampling}
    model = nnx.eval_shape(lambda: hg.HourglassLM(small_config(**options), rngs=nnx.Rngs(0)))
    if {shortening, upsampling} <= FREE:
        assert hg.at_shorten_factor(model, 2).config == small_config(hierarchy="1@1 1@2 1@1", **options)
    else:
        with pytest.raises(hg.UsageError, match=f"shortening='{shortening}'.*upsampling='{upsampling}'.*depend"):
            hg.at_shorten_factor(model, 2)


def test_the_model_at_another_factor_is_that_of_its_hierarchy():
    options = {"shortening": "attention_average", "upsampling": "attention_repeat"}
    at_3, at_2 = (make_model(small_config(hierarchy=f"1@1 1@{k} 1@1", **options)) for k in (3, 2))
    tokens = np.arange(22).reshape(2, 11) % 11
    moved = hg.at_shorten_factor(at_3, 2)
    np.testing.assert_array_equal(forward(moved, tokens), forward(at_2, tokens))
    assert np.abs(forward(moved, tokens) - forward(at_3, tokens)).max() > 1e-2
    hg.check_causality(moved)


@pytest.mark.parametrize("hierarchy", ["2@1", "1@1 1@2 1@6 1@2 1@1"])
def test_only_one_shortening_has_another_factor(hierarchy):
    model = nnx.eval_shape(lambda: hg.HourglassLM(small_config(hierarchy=hierarchy), rngs=nnx.Rngs(0)))
    with pytest.raises(hg.UsageError, match="exactly one shortening"):
        hg.at_shorten_factor(model, 2)


def test_factors_are_drawn_evenly_by_seed_and_step():
    drawn = [drawn_factor((2, 3, 4), seed=1, step=step) for step in range(3000)]
    assert drawn == [drawn_factor((2, 3, 4), seed=1, step=step) for step in range(3000)]
    assert drawn != [drawn_factor((2, 3, 4), seed=2, step=step) for step in range(3000)]
    assert all(abs(count - 1000) < 120 for count in Counter(drawn).values())


@pytest.mark.slow
def test_training_draws_factors_compiles_each_once_and_evaluates_at_each(tmp_path, caplog):
    text = np.random.default_rng(0).integers(0, 11, 400).astype(np.int32)
    config = small_config(hierarchy="0@1 1@3 1@1", shortening="average", upsampling="repeat")
    validation = consecutive_windows(text, 12, 4)[:3]
    model = make_model(config)
    with jax.log_compiles():
        result = fit(
            model,
            random_windows(text, 12, 4, 0),
            validation,
            tmp_path,
            optimizer_config=hg.OptimizerConfig(warmup_steps=1),
            train_config=hg.TrainConfig(steps=20, eval_interval=10, shorten_factors=(2, 3)),
        )
    messages = [record.getMessage() for record in caplog.records]
    assert sum("Finished XLA compilation of jit(train_step)" in message for message in messages) == 2
    at_each = [hg.evaluation.evaluate_batches(hg.at_shorten_factor(model, k), validation).loss for k in (2, 3)]
    assert result.loss == pytest.approx(np.mean(at_each), rel=1e-6)
    last = read_curves(tmp_path)[-1]
    assert last["valid_bpc_at_2"] != last["valid_bpc_at_3"]
    assert last["valid_bpc"] == pytest.approx(np.mean([last["valid_bpc_at_2"], last["valid_bpc_at_3"]]))


def test_a_method_that_depends_on_the_factor_is_refused_before_training(tmp_path):
    model = make_model(small_config(shortening="linear"))
    text = np.zeros(100, np.int32)
    with pytest.raises(hg.UsageError, match="shorten factor"):
        fit(
            model,
            random_windows(text, 12, 4, 0),
            consecutive_windows(text, 12, 4),
            tmp_path,
            optimizer_config=hg.OptimizerConfig(),
            train_config=hg.TrainConfig(shorten_factors=(2, 3)),
        )
    assert not list(tmp_path.iterdir())
