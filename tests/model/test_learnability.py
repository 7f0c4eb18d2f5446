"""What can be learned: the L#L task of the paper's appendix A.1, where with k = 3 one vanilla layer is needed and
enough (contract 5), and words of random length, where a group has to end where the word does."""

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


def trained(config, batches, optimizer_config, n_steps):
    """A model after `n_steps` of batches int [B, L + 1]."""
    graph, params = nnx.split(make_model(config, scale=1.0))
    optimizer = make_optimizer(optimizer_config, n_steps)
    state = TrainState(jax.numpy.zeros((), int), params, optimizer.init(params))
    step = make_train_step(graph, optimizer, seed=0)
    for i in range(n_steps):
        tokens = batches(i)
        state, _ = step(state, tokens, np.ones((len(tokens), tokens.shape[1] - 1), np.float32))
    return nnx.merge(graph, state.params)


def trained_accuracy(hierarchy):
    config = HourglassConfig(
        vocab_size=28, hierarchy=hierarchy, d_model=64, n_heads=2, d_ff=128, upsampling="linear", shortening="linear"
    )
    model = trained(config, batch_at, OptimizerConfig(learning_rate=3e-3, warmup_steps=20), STEPS)
    tokens = batch_at(STEPS)
    return float((model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("hierarchy", ["1@1 2@3 0@1", "0@1 2@3 1@1"])
def test_one_vanilla_layer_reaches_two_thirds_accuracy(hierarchy):
    assert trained_accuracy(hierarchy) > 0.65


@pytest.mark.slow
def test_without_a_vanilla_layer_accuracy_stays_below_two_thirds():
    assert trained_accuracy("0@1 2@3 0@1") < 0.45


SPACE, AGAIN, NEW = 26, 27, 28


def words_at(step):
    """A letter, up to two spaces and AGAIN; the same letter, up to two spaces and NEW; and so on with other letters."""
    rng, rows = np.random.default_rng((13, step)), []
    for _ in range(BATCH):
        row = [NEW]
        while len(row) <= 32:
            letter = rng.integers(LETTERS)
            for end in (AGAIN, NEW):
                row += [letter, *[SPACE] * rng.integers(3), end]
        rows.append(row[:33])
    return np.array(rows, np.int32)


def recalled(boundaries, listed):
    """How often the letter after AGAIN is right, without a layer on the tokens."""
    methods = {"shortening": "average", "upsampling": "repeat", "boundary_slack": 2.0}
    sizes = {"vocab_size": 29, "d_model": 64, "n_heads": 2, "d_ff": 128}
    config = HourglassConfig(hierarchy="0@1 1@4 0@1", boundaries=boundaries, boundary_tokens=listed, **methods, **sizes)
    model = trained(config, words_at, OptimizerConfig(learning_rate=3e-3, warmup_steps=20), 200)
    tokens = words_at(200)
    right = np.asarray(model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:])
    return right[tokens[:, :-1] == AGAIN].mean()


@pytest.mark.slow
def test_groups_that_end_with_a_word_recall_it_and_those_of_a_fixed_length_do_not():
    assert recalled("tokens", (AGAIN, NEW)) > 0.95
    assert recalled("fixed", ()) < 0.8
