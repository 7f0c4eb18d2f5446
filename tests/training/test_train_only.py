"""Training of a part of the model: the rest stays as it is, and is no burden to the optimizer."""

import jax
import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.interop.parameters import named_parameters
from hourglass_jax.training.optimizer import make_optimizer, trained_parameters
from hourglass_jax.training.step import first_state
from hourglass_jax.training.trainer import fit

TOKENS = np.tile(np.arange(3, 11), 100).astype(np.int32)
CONFIG = small_config(hierarchy="1@1 1@2 1@1")
CHOSEN = "hourglass.post, head"
# A constant rate: the first steps of a run are those of a shorter one.
OPTIMIZER = {"learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1}


def train(directory, train_only, steps):
    model = make_model(CONFIG, scale=1.0)
    fit(
        model,
        random_windows(TOKENS, 16, 4, seed=0),
        consecutive_windows(TOKENS[:100], 16, 4),
        directory,
        optimizer_config=hg.OptimizerConfig(**OPTIMIZER, train_only=train_only),
        train_config=hg.TrainConfig(steps=steps, eval_interval=2),
    )
    return named_parameters(model)


def chosen(name):
    return name.startswith(("hourglass.post.", "head."))


@pytest.mark.slow
def test_only_the_chosen_parameters_are_trained(tmp_path):
    """Adam takes each number by itself: the first step of the chosen is that of a training of everything."""
    before = named_parameters(make_model(CONFIG, scale=1.0))
    part, whole = (train(tmp_path / (name or "all"), name, steps=1) for name in (CHOSEN, ""))
    for name, start in before.items():
        assert (part[name] != start).any() == chosen(name), name
        assert (whole[name] != start).any(), name  # the control: nothing stays by itself
        if chosen(name):
            np.testing.assert_allclose(part[name], whole[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ema, n_arrays", [(0.0, 2), (0.9, 3)])
def test_the_optimizer_stores_moments_and_averages_only_for_chosen_parameters(ema, n_arrays):
    params = nnx.state(make_model(CONFIG))
    config = hg.OptimizerConfig(train_only=CHOSEN, ema=ema)
    optimizer = make_optimizer(config, 1)
    state = jax.eval_shape(lambda: first_state(params, optimizer, trained_parameters(params, config)))
    n_chosen = sum(leaf.size for name, leaf in named_parameters(make_model(CONFIG)).items() if chosen(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == n_arrays * n_chosen


def test_partial_training_resumes_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", CHOSEN, steps=4)
    train(tmp_path / "halves", CHOSEN, steps=2)
    halves = train(tmp_path / "halves", CHOSEN, steps=4)
    assert all(whole[name].tobytes() == halves[name].tobytes() for name in whole)
    with pytest.raises(hg.UsageError, match=r"optimizer.train_only: hourglass.post, head -> head"):
        train(tmp_path / "halves", "head", steps=4)


@pytest.mark.parametrize("train_only", ["hourglass.last", "post", "head,,embedding", "hea"])
def test_an_unknown_parameter_name_raises_an_error_that_lists_the_names(tmp_path, train_only):
    with pytest.raises(hg.UsageError, match=r"embedding, head, hourglass.inner.pre, .*hourglass.post.norm") as error:
        train(tmp_path / "run", train_only, steps=1)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_learned_positions_can_be_trained_alone():
    params = nnx.state(make_model(small_config(hierarchy="1@1", positions="learned")))
    assert trained_parameters(params, hg.OptimizerConfig(train_only="positions"))(("positions",), None)
    with pytest.raises(hg.UsageError, match=r"choose from embedding, head, hourglass\..*, positions, or"):
        trained_parameters(params, hg.OptimizerConfig(train_only="position"))
