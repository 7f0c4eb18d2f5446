"""What costs.py counts by hand agrees with XLA's own count of the compiled program."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import EVERY_HIERARCHY, make_model, small_config
from flax import nnx
from launching import ROOT

from experiments.ablations.costs import costs_table
from experiments.ablations.rows import row_config
from experiments.ablations.scales import find_setup
from experiments.ablations.tables import TABLE_1
from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.costs import (
    activation_bytes,
    cache_bytes,
    decoding_flops,
    forward_flops,
    state_bytes,
    training_flops,
)

PAPER = find_setup("enwik8", "paper")
METHODS = [
    ("attention_average", "attention_linear", "relative"),
    ("linear", "linear", "rotary"),
    ("average", "repeat", "learned"),
    ("attention_linear", "attention", "learned"),
]
LENGTH = 512  # XLA counts the body of a loop once: at this length there is none over blocks of queries


def abstract(config):
    return nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("hierarchy", [pytest.param("6@1", marks=pytest.mark.slow), "1@1 1@2 2@4 1@2 1@1"])
@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
def test_decoding_flops_of_all_levels_equal_the_compiled_program(hierarchy, shortening, upsampling, positions):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions}
    config = small_config(hierarchy=hierarchy, vocab_size=256, d_model=256, n_heads=8, d_ff=1024, **options)
    graph, params = abstract(config)
    cache = jax.eval_shape(lambda params: nnx.merge(graph, params).init_cache(1, 512), params)
    step = jax.jit(lambda params, token, cache: nnx.merge(graph, params).step(token, cache))
    program = step.lower(params, jax.ShapeDtypeStruct((1,), jnp.int32), cache).compile()
    # XLA counts a branch as if it were taken: here, as at the first token of a group, which runs every level.
    assert sum(decoding_flops(config, 512).values()) == pytest.approx(program.cost_analysis()["flops"], rel=0.03)


def total_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def xla_forward_flops(config):
    """XLA's count for one sequence of LENGTH tokens, with unrolled layers, for the same reason."""
    graph, params = abstract(replace(config, max_unrolled_layers=100))
    forward = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    return forward.lower(params, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)).cost_analysis()["flops"]


PAPER_ROWS = [row for row in TABLE_1.rows if row.paper]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * (i % 6 > 0), id=row.name) for i, row in enumerate(PAPER_ROWS)],
)
def test_forward_flops_of_table_1_equal_the_compiled_program(row):
    assert sum(forward_flops(row_config(row, PAPER), LENGTH).values()) == pytest.approx(
        xla_forward_flops(row_config(row, PAPER)), rel=0.1
    )


@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
@pytest.mark.parametrize("d_head", [0, pytest.param(32, marks=pytest.mark.slow)])
def test_forward_flops_of_all_methods_equal_the_compiled_program(d_head, shortening, upsampling, positions):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions, "max_length": LENGTH}
    config = small_config(hierarchy="1@1 1@2 1@6 1@2 1@1", d_model=256, d_head=d_head, d_ff=1024, **options)
    assert sum(forward_flops(config, LENGTH).values()) == pytest.approx(xla_forward_flops(config), rel=0.1)


def test_training_takes_three_forward_passes_and_attention_alone_is_quadratic():
    config = row_config(TABLE_1.rows[0], PAPER)
    once, twice, thrice = (sum(forward_flops(config, n * 1024).values()) for n in (1, 2, 3))
    assert training_flops(config, 1024) == 3 * once
    n_layers, products = 6, 3
    assert thrice - 2 * twice + once == pytest.approx(2 * products * n_layers * config.d_model * 1024**2)


def test_forward_flops_with_boundaries_equal_the_compiled_program():
    options = {"shortening": "average", "upsampling": "repeat", "positions": "learned", "max_length": LENGTH}
    sizes = {"vocab_size": 256, "d_model": 256, "d_ff": 1024}
    config = small_config(hierarchy="1@1 4@6 1@1", boundaries="whitespace", **sizes, **options)
    assert sum(forward_flops(config, LENGTH).values()) == pytest.approx(xla_forward_flops(config), rel=0.1)
    expected = sum(forward_flops(replace(config, boundaries="fixed"), LENGTH).values())
    assert expected < 0.9 * xla_forward_flops(config)  # counting the groups that are expected would not do


@pytest.mark.parametrize("hierarchy", EVERY_HIERARCHY)
@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
def test_cache_bytes_equal_the_size_of_the_cache(hierarchy, shortening, upsampling, positions):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions}
    config = small_config(hierarchy=hierarchy, **options)
    assert cache_bytes(config, 48, 3) == total_bytes(nnx.eval_shape(lambda: make_model(config).init_cache(3, 48)))


@pytest.mark.parametrize("cost", [forward_flops, training_flops, activation_bytes])
def test_costs_of_empty_sequences_raise_one_line_errors(cost):
    with pytest.raises(UsageError, match="length=0"):
        cost(small_config(), 0)


def test_state_bytes_equal_parameters_and_adamw_moments():
    config = row_config(TABLE_1.rows[7], PAPER)
    _, params = abstract(config)
    moments, *_ = jax.eval_shape(optax.adamw(1e-3).init, params)
    assert state_bytes(config) == total_bytes((params, moments.mu, moments.nu))


def gradient_bytes(config, length, batch):
    """Temporary memory of the compiled gradient."""
    graph, params = abstract(config)
    gradient = jax.jit(jax.grad(lambda params, tokens: nnx.merge(graph, params)(tokens).var()))
    program = gradient.lower(params, jax.ShapeDtypeStruct((batch, length), jnp.int32)).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "smaller, larger",
    [
        ("2@1", "4@1"),
        pytest.param("2@1", "1@1 1@2 1@1", marks=pytest.mark.slow),
        pytest.param("8@1", "16@1", marks=pytest.mark.slow),
        pytest.param("1@1 0@2 1@1", "1@1 2@2 1@1", marks=pytest.mark.slow),
    ],
)
def test_activation_bytes_bound_the_growth_of_gradient_memory(smaller, larger):
    # Growth, because the backward pass has buffers of its own. One head and one block of queries, because XLA:CPU
    # copies the keys of every further segment, and holds several blocks' scores at a time. Many rows, because
    # copies of weights are temporaries too.
    sizes = {"vocab_size": 256, "d_model": 128, "n_heads": 1, "d_ff": 512, "positions": "rotary"}
    small, large = (small_config(hierarchy=hierarchy, **sizes) for hierarchy in (smaller, larger))
    expected, growth = (count(large, 64, 256) - count(small, 64, 256) for count in (activation_bytes, gradient_bytes))
    assert 0.95 * expected < growth < 2 * expected


def test_activations_grow_with_tokens_and_a_deep_stack_by_one_vector_a_layer():
    config = small_config(hierarchy="2@1 8@4 2@1", positions="rotary", max_length=4096)
    size = activation_bytes(config, 256, 4)
    assert activation_bytes(config, 256, 8) == activation_bytes(config, 512, 4) == 2 * size
    deeper = replace(config, hierarchy="2@1 9@4 2@1")
    assert activation_bytes(deeper, 256, 4) - size == 4 * 256 // 4 * config.d_model * 4
    assert activation_bytes(replace(config, max_unrolled_layers=8), 256, 4) > size


@pytest.mark.launchers
def test_the_committed_costs_are_those_of_table_1():
    table = costs_table()
    assert (ROOT / "experiments" / "results" / "costs.md").read_text() == f"{table}\n"
    ratios = [float(line.split(" | ")[3]) for line in table.splitlines()[2:]]
    assert len(ratios) == 15 and max(abs(ratio - 1) for ratio in ratios) < 0.03
