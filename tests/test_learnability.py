"""The L#L task of the paper's appendix A.1: with k = 3, one vanilla layer is needed and enough (contract 5)."""

import jax
import numpy as np
import pytest
from conftest import make_model
from flax import nnx

from hourglass_jax import HourglassConfig, OptimizerConfig
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.trainer import TrainState, make_train_step

LETTERS, SEPARATOR, START = 26, 26, 27
BATCH, CHUNKS, STEPS = 32, 8, 250


def batch_at(step):
    """START, then chunks of a random letter, the separator and the letter again: groups match chunks."""
    letters = np.random.default_rng((7, step)).integers(0, LETTERS, (BATCH, CHUNKS, 1))
    chunks = np.concatenate([letters, np.full_like(letters, SEPARATOR), letters], axis=2).reshape(BATCH, -1)
    return np.concatenate([np.full((BATCH, 1), START), chunks], axis=1).astype(np.int32)


def trained_accuracy(hierarchy):
    config = HourglassConfig(
        vocab_size=28, hierarchy=hierarchy, d_model=64, n_heads=2, d_ff=128, upsampling="linear", shortening="linear"
    )
    graph, params = nnx.split(make_model(config, scale=1.0))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=20), STEPS)
    state = TrainState(jax.numpy.zeros((), int), params, optimizer.init(params))
    step = make_train_step(graph, optimizer, seed=0)
    for i in range(STEPS):
        state, _ = step(state, batch_at(i), np.ones((BATCH, 3 * CHUNKS), np.float32))
    tokens = batch_at(STEPS)
    predictions = nnx.merge(graph, state.params)(tokens[:, :-1]).argmax(-1)
    return float((predictions == tokens[:, 1:]).mean())


@pytest.mark.parametrize("hierarchy", ["1@1 2@3 0@1", pytest.param("0@1 2@3 1@1", marks=pytest.mark.slow)])
def test_one_vanilla_layer_reaches_two_thirds(hierarchy):
    assert trained_accuracy(hierarchy) > 0.65


def test_no_vanilla_layer_cannot():
    assert trained_accuracy("0@1 2@3 0@1") < 0.45
