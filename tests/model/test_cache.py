"""Logits from the cache equal the full forward's at every position (contract 2), and levels run when they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EVERY_HIERARCHY, METHODS, NESTED, forward, make_model, run_cached, small_config
from flax import nnx

from hourglass_jax.nn.transformer import Block
from hourglass_jax.prompts import AlignedPrompts


def largest_difference(model, length=None):
    """Between cached and full logits, over rows with prompts of 0 to 2K + 1 tokens, relative to the largest logit."""
    factor = model.config.parsed_hierarchy.total_factor
    lengths = range(1, 2 * factor + 2)  # after none, the loop takes the first token as it takes a prompt of one
    length = 3 * factor + 1 if length is None else length
    tokens = np.random.default_rng(0).integers(0, 11, (len(lengths), length))
    aligned = AlignedPrompts.align([row[:n] for row, n in zip(tokens, lengths, strict=True)], factor, 100 * factor)
    full = np.asarray(forward(model, tokens))
    passed, stepped = (np.asarray(x) for x in run_cached(model, aligned.prefix, aligned.start, tokens))
    differences = []
    for row, start in enumerate(aligned.start):
        n_read = aligned.prefix.shape[1] - start
        cached = np.concatenate([passed[row, start:], stepped[row, : length - n_read]])
        differences.append(np.abs(cached - full[row]).max())
    return max(differences) / np.abs(full).max()


@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
def test_cached_logits_of_every_method_equal_full_forward(shortening, upsampling, positions):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions, "dtype": "float64"}
    with jax.enable_x64(True):
        assert largest_difference(make_model(small_config(hierarchy=NESTED, **options))) < 1e-12


@pytest.mark.parametrize("positions", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_cached_logits_with_d_head_and_biases_equal_full_forward(positions):
    options = {"positions": positions, "d_head": 6, "qkv_bias": True, "dtype": "float64"}
    with jax.enable_x64(True):
        assert largest_difference(make_model(small_config(hierarchy=NESTED, **options))) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
@pytest.mark.parametrize("hierarchy", EVERY_HIERARCHY)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-12)])
def test_cached_logits_equal_full_forward_on_the_whole_grid(
    dtype, tolerance, hierarchy, shortening, upsampling, positions
):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions, "dtype": dtype}
    with jax.enable_x64(dtype == "float64"):
        assert largest_difference(make_model(small_config(hierarchy=hierarchy, **options))) < tolerance


@pytest.mark.parametrize("hierarchy", EVERY_HIERARCHY)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"norm": "final", "shift": "original", "positions": "rotary"}, marks=pytest.mark.slow),
    ],
)
def test_cached_logits_of_every_hierarchy_equal_full_forward(hierarchy, options):
    assert largest_difference(make_model(small_config(hierarchy=hierarchy, **options))) < 1e-5


def test_a_cache_that_ignores_padding_gives_other_logits(forgotten_padding):
    model = make_model(small_config())
    tokens = np.arange(10)[None].repeat(2, 0)
    aligned = AlignedPrompts.align([tokens[0, :8], tokens[1, :2]], 3, 99)
    passed, _ = run_cached(model, aligned.prefix, aligned.start, tokens)
    assert np.abs(passed[1, 3:6] - forward(model, tokens)[1, :3]).max() > 1e-3


@pytest.mark.parametrize("hierarchy", EVERY_HIERARCHY)
def test_a_layer_at_factor_f_runs_once_every_f_tokens(hierarchy, monkeypatch):
    runs = []
    original = Block.step

    def counted(block, x, memory=None, *, cache, clock):
        if memory is None and block.memory_norm is None:
            tokens_per_position = block.attention.tokens_per_position
            jax.debug.callback(lambda time: runs.append((tokens_per_position, int(time))), clock.time)
        return original(block, x, memory, cache=cache, clock=clock)

    monkeypatch.setattr(Block, "step", counted)
    model = make_model(small_config(hierarchy=hierarchy))
    run_cached(model, *(jnp.zeros(shape, int) for shape in ((1, 0), (1,), (1, 19))))
    jax.effects_barrier()
    for level in model.config.parsed_hierarchy.levels:
        times = sorted(time for factor, time in runs if factor == level.factor)
        n_layers = level.pre_layers + level.post_layers
        assert times == sorted([*range(0, 19, level.factor)] * n_layers)


@pytest.mark.parametrize("positions", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_a_bounded_context_drops_whole_groups_and_leaves_logits_unchanged(positions):
    config = small_config(hierarchy="0@1 1@2 1@1", positions=positions, upsampling="attention", dtype="float64")
    tokens = jax.random.randint(jax.random.key(0), (2, 90), 0, 11)

    @nnx.jit(static_argnames=("max_length", "every"))
    def run(model, tokens, *, max_length, every):
        cache = model.init_cache(2, max_length, context=16)

        def step(cache, token):
            unseen = jnp.where(cache.clock.time % every == 0, jnp.maximum(cache.clock.time - 16, 0) // 2 * 2, 0)
            logits, cache = model.step(token, cache.drop(unseen))
            return cache, (logits, cache.clock.start - cache.clock.origin)

        return jax.lax.scan(step, cache, tokens.T)[1]

    with jax.enable_x64(True):
        model = make_model(config)
        logits, forgotten = run(model, tokens, max_length=90, every=99)
        for every, max_length in ((1, 18), (7, 24)):
            bounded, bounded_forgotten = run(model, tokens, max_length=max_length, every=every)
            np.testing.assert_allclose(bounded, logits, atol=1e-12)
            np.testing.assert_array_equal(bounded_forgotten, forgotten)
        seen = np.arange(90)[:, None] + 1 - np.asarray(forgotten)
        assert seen.max() == 16 and seen[16:].min() == 13 and not (np.asarray(forgotten) % 4).any()
        # Four attentions in a row: what was forgotten early can no longer act.
        moved = run(model, tokens.at[:, 0].add(1) % 11, max_length=90, every=99)[0]
        assert np.abs(moved - logits)[:16].max() > 1e-3 and np.abs(moved - logits)[70:].max() == 0
