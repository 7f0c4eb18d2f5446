"""No prediction sees its future, and the shift that ensures it is no larger than needed (contract 1)."""

import numpy as np
import pytest
from conftest import HIERARCHIES, METHODS, NESTED, make_model, small_config
from flax import nnx

from hourglass_jax.causality import CausalityError, check_causality, influence


def grid_model(hierarchy, shortening, upsampling, positions, **options):
    return make_model(
        small_config(hierarchy=hierarchy, shortening=shortening, upsampling=upsampling, positions=positions, **options)
    )


def tokens(length):
    return np.random.default_rng(1).integers(0, 11, length)


@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
def test_predictions_depend_on_every_past_token_and_no_future_token(shortening, upsampling, positions):
    model = grid_model(NESTED, shortening, upsampling, positions)
    length = 2 * model.config.parsed_hierarchy.total_factor + 2  # no multiple of any factor
    strength = influence(model, tokens(length))
    assert not np.triu(strength, k=1).any()
    assert (strength[np.tril_indices(length)] > 0).all()
    check_causality(model, length)


@pytest.mark.slow
@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
@pytest.mark.parametrize("hierarchy", [*HIERARCHIES, "2@1 1@3 0@1", "1@1 2@4 1@1"])
@pytest.mark.parametrize("length", [5, 16, 19])
def test_predictions_depend_on_no_future_token_on_the_whole_grid(length, hierarchy, shortening, upsampling, positions):
    model = grid_model(hierarchy, shortening, upsampling, positions)
    assert not np.triu(influence(model, tokens(length)), k=1).any()


@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
def test_a_shift_of_k_minus_2_fails_the_causality_check(shortening, upsampling, positions):
    model = grid_model("0@1 1@3 0@1", shortening, upsampling, positions)
    model.hourglass.boundaries.shift = model.hourglass.boundaries.k - 2
    with pytest.raises(CausalityError, match="depends on the later token"):
        check_causality(model)


@pytest.mark.core
@pytest.mark.parametrize("level", [0, 1])
def test_a_leak_at_any_level_fails_the_causality_check(level):
    model = make_model(small_config(hierarchy="0@1 1@3 1@9 0@3 0@1"))
    leaky = model.hourglass.inner if level else model.hourglass
    leaky.boundaries.shift -= 1
    with pytest.raises(CausalityError):
        check_causality(model)


@pytest.mark.core
@pytest.mark.parametrize("shift, feels_its_start", [("paper", True), ("original", False)])
def test_position_gk_depends_on_token_gk_through_the_deep_path(shift, feels_its_start):
    config = small_config(hierarchy="0@1 1@4 0@1", norm="final", shift=shift, upsampling="repeat")
    hourglass = make_model(config).hourglass
    x = np.random.default_rng(2).normal(size=(1, 13, 16)).astype(np.float32)

    without_residual = nnx.jit(lambda hourglass, x: hourglass(x)[0] - x[0])  # across the bottleneck
    unchanged = without_residual(hourglass, x)
    for start in (0, 4, 8, 12):
        changed = x.copy()
        changed[0, start] += 1
        moved = np.flatnonzero(np.abs(without_residual(hourglass, changed) - unchanged).max(-1) > 1e-5)
        assert moved[0] == start if feels_its_start else start not in moved
