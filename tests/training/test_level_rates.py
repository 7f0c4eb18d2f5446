"""Learning rates by level of the hierarchy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.training.optimizer import level_of, make_optimizer
from hourglass_jax.training.trainer import fit

CONFIG = small_config(hierarchy="0@1 1@2 1@6 0@2 1@1")
RATES = (0.5, 2.0, 4.0)  # powers of two: products are exact


@pytest.fixture(scope="module", params=["adamw", "muon"])
def updates(request):
    """A function: the second update of each parameter by name with the given rates."""
    params = nnx.state(make_model(CONFIG))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    config = hg.OptimizerConfig(request.param, warmup_steps=2, weight_decay=0.1, clip_norm=1.0)

    def with_rates(rates):
        optimizer = make_optimizer(dataclasses.replace(config, level_rates=rates), 10)
        state = optimizer.init(params)
        _, state = optimizer.update(gradients, state, params)
        changes, state = optimizer.update(gradients, state, params)
        return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(changes)}, state

    return with_rates


def test_the_updates_of_a_level_scale_exactly_by_its_rate(updates):
    changes, (scaled, _) = updates(())[0], updates(RATES)
    for name, change in changes.items():
        np.testing.assert_array_equal(scaled[name], RATES[name.count("inner.")] * change, err_msg=name)
        assert (change != 0).any(), name


def test_rates_of_one_change_no_bit_and_no_rates_add_no_state(updates):
    (changes, state), (same, with_rates) = updates(()), updates((1.0, 1.0, 1.0))
    for name, change in changes.items():
        np.testing.assert_array_equal(same[name], change, err_msg=name)
    assert jax.tree.leaves(state) and jax.tree.structure(state) != jax.tree.structure(with_rates)


def test_embedding_and_head_belong_to_the_first_level_and_resampling_to_the_outer_one():
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(make_model(CONFIG)))]
    levels = {".".join(map(str, path)): level_of(path) for path in paths}
    assert {level for name, level in levels.items() if name.startswith(("embedding", "head", "hourglass.post"))} == {0}
    assert {level for name, level in levels.items() if "shorten" in name or "upsample" in name} == {0, 1}
    assert set(levels.values()) == {0, 1, 2}
    assert level_of(("hourglass", "inner", "shorten", "inner", "kernel")) == 1  # of a user's method


def test_another_number_of_rates_than_levels_raises_before_anything_is_written(tmp_path):
    message = r"^level_rates=\(1.0, 0.5\) has 2 factors, .* 3 levels; give one for each level, outermost first$"
    with pytest.raises(hg.UsageError, match=message):
        fit(
            make_model(CONFIG),
            random_windows(np.arange(100) % 11, 16, 4, seed=0),
            consecutive_windows(np.arange(100) % 11, 16, 4),
            tmp_path / "run",
            optimizer_config=hg.OptimizerConfig(level_rates=(1.0, 0.5)),
            train_config=hg.TrainConfig(steps=2),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rates", [(1.0, 0.0), (-1.0, 1.0), (1.0, "high"), 0.5])
def test_a_rate_that_is_not_a_positive_number_raises_a_one_line_error(rates):
    with pytest.raises(hg.UsageError, match=r"^level_rates=.*(more than 0|is not a tuple; give factors, .*)$"):
        hg.OptimizerConfig(level_rates=rates)
