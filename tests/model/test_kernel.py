"""The flash kernels, interpreted: values and gradients of plain attention, also with dropout, which draws the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model, small_config
from jax.extend.core import jaxprs_in_params
from test_cache import largest_difference
from test_oracle import largest_error

import hourglass_jax as hg
from hourglass_jax.nn.attention import choice, fused, kernel
from hourglass_jax.nn.attention.kernel import kernel_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.plain import plain_attention
from hourglass_jax.nn.attention.tiles import Plan, Tile


def make_inputs(pattern, groups, relative, batch=2, heads=2, size=6):
    rng, lags = np.random.default_rng(0), min(groups, pattern.window or groups)
    q, q_position = rng.normal(size=(2, batch, heads, groups * pattern.query_slots, size))
    k, v = rng.normal(size=(2, batch, heads, groups * pattern.key_slots, size))
    r = rng.normal(size=(pattern.query_slots, heads, lags * pattern.key_slots, size))
    return Inputs(*map(jnp.asarray, (q, k, v, *((q_position, r) if relative else ()))))


def value_and_gradients(attention, pattern, inputs, first=None):
    key = jax.random.key(3) if pattern.dropout else None

    @jax.jit
    def run(inputs):
        out, pullback = jax.vjp(lambda inputs: attention(pattern, inputs, first, key), inputs)
        return out, pullback(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))[0]

    return jax.tree.leaves(run(inputs))


CASES = [  # groups: two blocks and a bit, a whole number of them, one group, less than a block
    ("memory", Pattern(1, 1), 37, True, False),
    ("rotation", Pattern(1, 1, 0.3, 5), 37, True, True),
    ("memory", Pattern(1, 1, 0.0, 17), 48, True, True),
    pytest.param("memory", Pattern(1, 1, 0.2), 37, False, True, marks=pytest.mark.slow),
    ("rotation", Pattern(1, 3), 21, True, True),
    pytest.param("memory", Pattern(1, 2, 0.1), 18, False, False, marks=pytest.mark.slow),
    ("memory", Pattern(3, 1, 0.2), 21, True, True),
    ("memory", Pattern(1, 1), 1, True, False),
    pytest.param("rotation", Pattern(3, 1), 5, True, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("alignment, pattern, groups, relative, padded", CASES)
def test_kernel_values_and_gradients_equal_the_formula(alignment, pattern, groups, relative, padded, monkeypatch):
    make_plan = kernel.make_plan
    monkeypatch.setattr(kernel, "make_plan", lambda *a: make_plan(*a)._replace(by_memory=alignment == "memory"))
    first = jnp.array([0, 4]) if padded else None
    with jax.enable_x64(True):
        inputs = make_inputs(pattern, groups, relative)
        ours, plain = (value_and_gradients(f, pattern, inputs, first) for f in (kernel_attention, plain_attention))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_wrong_alignment_differs_from_the_formula(monkeypatch):
    original = Tile.by_key
    monkeypatch.setattr(Tile, "by_key", lambda tile, *by_lag: jnp.roll(original(tile, *by_lag), 1, axis=1))
    pattern = Pattern(1, 1)
    inputs = make_inputs(pattern, 20, relative=True)
    assert np.abs(kernel_attention(pattern, inputs) - plain_attention(pattern, inputs)).max() > 0.1


def test_bfloat16_stays_close():
    pattern = Pattern(1, 1)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), make_inputs(pattern, 37, relative=True))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    ours, plain = (
        value_and_gradients(kernel_attention, pattern, half),
        value_and_gradients(plain_attention, pattern, exact),
    )
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == jnp.bfloat16 and np.abs(a.astype(jnp.float32) - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize("positions, window", [("relative", 0), ("relative", 5), ("rotary", 3)])
def test_a_model_with_the_kernel_equals_the_oracle(positions, window):
    options = {"attention": "kernel", "positions": positions, "window": window, "dtype": "float64"}
    assert largest_error(small_config(hierarchy="1@1 1@3 1@1", **options)) < 1e-10


@pytest.mark.slow
def test_a_model_with_the_kernel_is_causal_and_cached_logits_equal_full_forward():
    model = make_model(small_config(hierarchy="1@1 1@2 0@1", attention="kernel", window=3))
    hg.check_causality(model)
    assert largest_difference(model) < 1e-5


@pytest.mark.parametrize("window", [1, 4, 99])
def test_fused_attention_supports_windows(window):
    options = {"attention": "fused", "positions": "rotary", "window": window}
    assert largest_error(small_config(hierarchy="1@1 1@3 1@1", **options)) < 1e-5


@pytest.mark.parametrize("slots, window", [((1, 1), 0), ((1, 1), 40), ((3, 1), 0), ((1, 2), 0)])
def test_splash_attention_equals_the_formula(slots, window, monkeypatch):
    monkeypatch.setattr(fused, "platform", lambda: "tpu")
    splash = fused.splash
    monkeypatch.setattr(fused, "splash", lambda *a, **options: splash(*a, **options, interpret=True))
    pattern = Pattern(*slots, 0.0, window)
    inputs = make_inputs(pattern, 75, relative=False, size=8)
    ours, plain = (value_and_gradients(f, pattern, inputs) for f in (fused.fused_attention, plain_attention))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "platform, dtype, size, more, name",
    [
        ("cpu", "bfloat16", 64, (), "blocked"),
        ("gpu", "float32", 64, (), "blocked"),
        ("gpu", "bfloat16", 64, (), "fused"),
        ("gpu", "bfloat16", 60, (), "kernel"),
        ("gpu", "bfloat16", 64, ("relative positions",), "kernel"),
        ("gpu", "bfloat16", 64, ("dropout",), "kernel"),
        ("gpu", "bfloat16", 256, ("dropout",), "blocked"),
        ("tpu", "float32", 64, (), "fused"),
        ("tpu", "bfloat16", 64, ("padding",), "kernel"),
    ],
)
def test_auto_selects_an_implementation_by_platform(platform, dtype, size, more, name, monkeypatch):
    monkeypatch.setattr(choice, "platform", lambda: platform)
    messages = []
    monkeypatch.setattr(choice, "log_once", messages.append)
    chosen, _ = choice.choose("auto", dtype, size, more)
    assert chosen == name and len(messages) == 1 and messages[0].startswith(f"attention: {name} ({platform}, {dtype}")


def test_summary_names_the_attention_implementation():
    assert "attention: auto = blocked, cpu, float32, head_dim 8, relative positions, window 4" in hg.summary(
        small_config(attention="auto", window=4)
    )


@pytest.mark.parametrize(
    "groups, block, key_slots, window", [(40, 16, 1, 0), (40, 16, 1, 9), (64, 16, 2, 0), (33, 8, 1, 33)]
)
def test_the_cost_estimate_counts_the_tiles_that_the_mask_leaves(groups, block, key_slots, window):
    n_blocks = -(-groups // block)
    plan = Plan(Pattern(1, key_slots, window=window), "gpu", 2, groups, (64,), block, n_blocks, by_memory=True)
    queries, keys = np.arange(n_blocks * block)[:, None], np.arange(n_blocks * block)
    visible = (keys <= queries) & (not window or queries - keys < window)
    assert plan.n_tiles == visible.reshape(n_blocks, block, -1, block).any((1, 3)).sum()


@pytest.mark.parametrize("relative", [False, True])
def test_the_cost_estimate_of_each_kernel_is_the_flops_of_its_matrix_products(relative):
    """In a single block every loop runs once, so these are the products in the kernel's body."""
    x, r = jnp.zeros((1, 1, 16, 32)), jnp.zeros((1, 1, 16, 32))
    inputs = Inputs(x, x, x, *((x, r) if relative else ()))
    traced = jax.make_jaxpr(jax.grad(lambda inputs: kernel_attention(Pattern(1, 1), inputs).sum()))(inputs)
    kernels = [each for each in equations(traced.jaxpr) if each.primitive.name == "pallas_call"]
    assert len(kernels) == (4 if relative else 3)
    for each in kernels:
        dots = [dot for dot in equations(each.params["jaxpr"]) if dot.primitive.name == "dot_general"]
        sizes = [dot.invars[0].aval.size * dot.outvars[0].aval.shape[-1] for dot in dots]
        assert each.params["cost_estimate"].flops == 2 * sum(sizes), each.params["name"]


def equations(jaxpr):
    """Yield the equations of a jaxpr and of all that it contains."""
    for each in jaxpr.eqns:
        yield each
        for inner in jaxprs_in_params(each.params):
            yield from equations(inner)
