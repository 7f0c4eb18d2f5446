"""The model agrees with the naive float64 NumPy version of every method (contract 4)."""

import jax
import numpy as np
import oracle
import pytest
from conftest import HIERARCHIES, METHODS, NESTED, forward, make_model, small_config

from hourglass_jax.nn.attention import blocked

TOKENS = np.random.default_rng(0).integers(0, 11, 13)


def largest_error(config):
    with jax.enable_x64(True):
        model = make_model(config)
        ours = np.asarray(forward(model, TOKENS[None])[0])
        return np.abs(ours - oracle.logits(model, TOKENS)).max() / np.abs(ours).max()


@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
def test_every_method_equals_its_numpy_oracle(shortening, upsampling, positions):
    config = small_config(
        hierarchy=NESTED,
        shortening=shortening,
        upsampling=upsampling,
        positions=positions,
        dtype="float64",
    )
    assert largest_error(config) < 1e-10


# One that has all there is is quick.
ONE_AND_OTHERS = [pytest.param(h, marks=[pytest.mark.slow] * (h != HIERARCHIES[2])) for h in HIERARCHIES]


@pytest.mark.parametrize("hierarchy", ONE_AND_OTHERS)
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"activation": "gelu_exact", "d_head": 5, "qkv_bias": True},
        {"norm": "final"},
        {"shift": "original"},
    ],
    ids=str,
)
def test_every_hierarchy_and_option_equals_the_numpy_oracle(hierarchy, options):
    assert largest_error(small_config(hierarchy=hierarchy, dtype="float64", **options)) < 1e-10


@pytest.mark.parametrize("hierarchy", ONE_AND_OTHERS)
@pytest.mark.parametrize("positions", [pytest.param("rotary", marks=pytest.mark.slow), "learned"])
def test_the_fused_kernel_equals_the_oracle_within_float32(hierarchy, positions):
    assert largest_error(small_config(hierarchy=hierarchy, positions=positions, attention="fused")) < 1e-5


def test_float32_is_close_to_the_oracle():
    model = make_model(small_config())
    ours = np.asarray(forward(model, TOKENS[None])[0])
    np.testing.assert_allclose(ours, oracle.logits(model, TOKENS), atol=1e-4)


def test_a_wrong_distance_unit_differs_from_the_oracle():
    config = small_config(hierarchy="0@1 2@3 0@1", dtype="float64")
    with jax.enable_x64(True):
        model = make_model(config)
        model.hourglass.inner.pre.layers.attention.tokens_per_position = 1  # in groups, not in tokens
        ours = np.asarray(forward(model, TOKENS[None])[0])
        assert np.abs(ours - oracle.logits(model, TOKENS)).max() > 1e-4


QUICK_BLOCKS = ("relative", (1, 99)), ("relative", (3, 1)), ("rotary", (2, 2))
BLOCKS = [
    pytest.param(positions, *sizes, marks=[pytest.mark.slow] * ((positions, sizes) not in QUICK_BLOCKS))
    for positions in ("relative", "rotary")
    for sizes in ((1, 99), (5, 99), (1, 3), (2, 2), (3, 1))
]


@pytest.mark.parametrize("positions, rows, segments", BLOCKS)
def test_attention_is_independent_of_query_block_size(positions, rows, segments, monkeypatch):
    monkeypatch.setattr(blocked, "QUERY_ROWS", rows)
    monkeypatch.setattr(blocked, "SEGMENTS", segments)
    jax.clear_caches()
    assert largest_error(small_config(positions=positions, dtype="float64")) < 1e-10
    jax.clear_caches()


def test_scanned_and_unrolled_stacks_agree():
    results = []
    for unrolled in (0, 3):
        with jax.enable_x64(True):
            config = small_config(hierarchy="3@1", dtype="float64", max_unrolled_layers=unrolled)
            results.append(np.asarray(forward(make_model(config), TOKENS[None])))
    np.testing.assert_allclose(*results, rtol=1e-12)
