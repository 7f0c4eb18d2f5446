"""The language model as a whole: shapes, options, dropout, cost of compiling, checks of its configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EVERY_HIERARCHY, forward, make_model, small_config
from flax import nnx

import hourglass_jax as hg
from experiments.ablations.rows import row_config
from experiments.ablations.scales import find_setup
from experiments.ablations.tables import TABLE_1
from hourglass_jax.costs import count_parameters
from hourglass_jax.nn import layers
from hourglass_jax.nn.layers import random_bits

PAPER = find_setup("enwik8", "paper")


@pytest.mark.parametrize("initialization, width", [("normal", 0.02), ("xavier", (2 / (64 + 192)) ** 0.5)])
def test_initial_weights_have_the_documented_standard_deviation(initialization, width):
    config = small_config(hierarchy="1@1", d_model=64, d_ff=192, vocab_size=99, initialization=initialization)
    model = nnx.jit(lambda: hg.HourglassLM(config, rngs=nnx.Rngs(0)))()
    kernel = np.asarray(model.hourglass.pre.layers.feed_forward.up.kernel[...])
    assert kernel.std() == pytest.approx(width, rel=0.05) and abs(kernel.mean()) < 0.05 * width
    largest = np.abs(kernel).max() / width
    assert largest > 3.5 if initialization == "normal" else 1.7 < largest <= 3**0.5 + 1e-6
    assert np.asarray(model.embedding.embedding[...]).std() == pytest.approx(1, rel=0.05)


def test_rematerialization_changes_no_gradient():
    def gradients(remat):
        config = small_config(hierarchy="2@1", remat=remat, max_unrolled_layers=0)
        graph, params = nnx.split(make_model(config))
        tokens = jnp.arange(26).reshape(2, 13) % 11
        return jax.jit(jax.grad(lambda params: nnx.merge(graph, params)(tokens).var()))(params)

    none, *others = (jax.tree.leaves(gradients(remat)) for remat in ("none", "dots", "full"))
    assert all(np.abs(leaf).max() > 0 for leaf in none)
    for other in others:
        for one, two in zip(none, other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("hierarchy", EVERY_HIERARCHY)
@pytest.mark.parametrize("length", [1, 7, pytest.param(16, marks=pytest.mark.slow)])
def test_any_length_gives_finite_float32_logits(hierarchy, length):
    logits = forward(make_model(small_config(hierarchy=hierarchy)), jnp.ones((2, length), int))
    assert logits.shape == (2, length, 11) and logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


def test_rows_of_a_batch_are_independent():
    model = make_model(small_config())
    tokens = jax.random.randint(jax.random.key(0), (3, 10), 0, 11)
    alone = jnp.concatenate([forward(model, row[None]) for row in tokens])
    np.testing.assert_allclose(forward(model, tokens), alone, atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_bfloat16_computes_in_bfloat16_and_stays_close(positions):
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, 11)
    exact, half = (make_model(small_config(positions=positions, dtype=d)) for d in ("float32", "bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(half)))
    hidden = jax.eval_shape(half.hourglass, jax.ShapeDtypeStruct((1, 6, 16), jnp.bfloat16))
    assert hidden.dtype == jnp.bfloat16
    difference = jnp.abs(forward(exact, tokens) - forward(half, tokens)).max()
    assert 0 < difference < 0.1 * jnp.abs(forward(exact, tokens)).max()
    logits = forward(half, tokens)
    assert (logits != logits.astype(jnp.bfloat16).astype(logits.dtype)).mean() > 0.9  # rounded ones would tie


def test_dropout_needs_a_key_and_train_mode_and_differs_by_key_layer_and_step():
    model = make_model(small_config(hierarchy="2@1", dropout=0.5))
    tokens = jnp.arange(10)[None]
    a, b = jax.random.split(jax.random.key(0))
    without = forward(model, tokens)
    with_a, with_b = forward(model, tokens, a), forward(model, tokens, b)
    assert (without == forward(model, tokens)).all()
    assert (with_a == forward(model, tokens, a)).all()
    assert (with_a != without).any() and (with_a != with_b).any()
    model.eval()
    assert (forward(model, tokens, a) == without).all()


@pytest.mark.parametrize("max_unrolled_layers", [0, 2])
def test_two_layers_draw_different_masks(max_unrolled_layers, monkeypatch):
    seeds = []

    def record(key, shape, skipped=0):
        jax.debug.callback(lambda data: seeds.append(tuple(data.tolist())), jax.random.key_data(key))
        return random_bits(key, shape, skipped)

    monkeypatch.setattr(layers, "random_bits", record)
    config = small_config(hierarchy="2@1", dropout=0.5, max_unrolled_layers=max_unrolled_layers)
    make_model(config)(jnp.arange(5)[None], jax.random.key(0))
    jax.effects_barrier()
    assert len(seeds) == 1 + 2 * 3  # the embedding's, and three a layer
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_bits_are_uniform_and_uncorrelated(rate):
    bits = random_bits(jax.random.key(3), (1000, 1000))
    keep = np.asarray(bits >= jnp.uint32(rate * 2**32), np.float64)
    assert abs(keep.mean() - (1 - rate)) < 0.003
    for shifted in (keep[1:] * keep[:-1], keep[:, 1:] * keep[:, :-1]):
        assert abs(shifted.mean() - (1 - rate) ** 2) < 0.003


@pytest.mark.parametrize("row", [row for row in TABLE_1.rows if row.paper], ids=lambda row: row.name)
def test_parameter_counts_of_table_1(row):
    assert count_parameters(row_config(row, PAPER)) / 1e6 == pytest.approx(row.paper["parameters_millions"], rel=0.03)


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    def program_size(n_layers):
        config = small_config(hierarchy=f"2@1 {n_layers}@4 2@1")
        graph, params = nnx.split(nnx.eval_shape(lambda: hg.HourglassLM(config, rngs=nnx.Rngs(0))))
        loss = jax.jit(jax.grad(lambda params, tokens: nnx.merge(graph, params)(tokens).sum()))
        return len(loss.lower(params, jax.ShapeDtypeStruct((2, 32), jnp.int32)).as_text().splitlines())

    assert program_size(24) <= 1.5 * program_size(4)
    assert program_size(24) == program_size(12)


@pytest.mark.core
def test_original_project_architecture():
    config = hg.HourglassConfig.original_project(
        vocab_size=42, factors=[2, 1, 1, 2, 3, 4], n_embedding=64, block_size=32
    )
    assert config.hierarchy == "2@1 1@2 3@8 1@2 2@1"  # each factor multiplies the ones before
    assert (config.d_model, config.d_ff, config.max_length) == (64, 256, 32)
    model = make_model(config)
    with pytest.raises(hg.UsageError, match="max_length=32"):
        model(jnp.zeros((1, 33), int))
    hg.check_causality(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hierarchy": "2@1 8@3"}, "must return to factor 1"),
        ({"hierarchy": "2@1 4@2 2@3 4@2 2@1"}, "factor 2 does not divide the next factor 3"),
        ({"hierarchy": "2@1 4@4 8@2 4@4 2@1"}, "must grow towards the middle"),
        ({"hierarchy": "0@1 0@3 0@1"}, "at least one layer"),
        ({"hierarchy": "2@1 x 2@1"}, "cannot read 'x'"),
        ({"hierarchy": ""}, "first stage must be at factor 1"),
        ({"shortening": "max"}, "choose one of average, linear"),
        ({"upsampling": "nearest"}, "choose one of repeat, linear"),
        ({"positions": "alibi"}, "choose one of relative, rotary, learned"),
        ({"n_heads": 3}, "n_heads=3 does not divide d_model=16"),
        ({"n_heads": 0}, "n_heads=0 is out of range"),
        ({"d_model": 16.0}, "d_model=16.0 is out of range; it must be a whole number of at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range"),
        ({"positions": "rotary", "n_heads": 16}, "even head size"),
        ({"shift": "none"}, "choose one of paper, original"),
        ({"dtype": "int8"}, "choose one of float32"),
    ],
)
def test_invalid_configs_raise_errors_that_name_the_option(options, message):
    with pytest.raises(hg.UsageError, match=message) as error:
        small_config(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hierarchy", [*EVERY_HIERARCHY, "2@1 8@3 2@1"])
def test_parsed_hierarchies_print_as_the_input_string(hierarchy):
    parsed = hg.Hierarchy.parse(hierarchy)
    assert str(parsed) == hierarchy
    for length in range(1, 20):
        assert parsed.lengths(length) == tuple(-(-length // level.factor) for level in parsed.levels)


def test_factors_of_the_original_project():
    assert str(hg.Hierarchy.from_factors([3, 1, 8, 4])) == "3@1 8@4 3@1"
    assert str(hg.Hierarchy.from_factors([2, 1, 1, 2, 4, 4])) == "2@1 1@2 4@4 1@2 2@1"
    with pytest.raises(hg.UsageError, match="pairs"):
        hg.Hierarchy.from_factors([3, 1, 8])
