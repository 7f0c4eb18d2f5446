"""The kernels with stored relative logits, interpreted: values and gradients of plain attention, in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from test_kernel import make_inputs, value_and_gradients
from test_oracle import largest_error

from hourglass_jax.nn.attention import stored
from hourglass_jax.nn.attention.pattern import Pattern
from hourglass_jax.nn.attention.plain import plain_attention
from hourglass_jax.nn.attention.stored import stored_attention
from hourglass_jax.nn.attention.tiles import Tile

CASES = [  # groups: two blocks and a bit, a whole number of them, one group
    (Pattern(1, 1), 37, True, False),
    (Pattern(1, 1, 0.3, 5), 48, True, True),
    (Pattern(1, 3, 0.2), 21, True, True),
    (Pattern(3, 1), 21, True, False),
    (Pattern(1, 1), 1, True, False),
    (Pattern(1, 2, 0.1), 18, False, True),
]


@pytest.mark.parametrize("pattern, groups, relative, padded", CASES)
def test_stored_values_and_gradients_equal_the_formula(pattern, groups, relative, padded, monkeypatch):
    monkeypatch.setattr(stored, "MIN_BLOCKS", 1)  # so that these few blocks are in chunks
    first = jnp.array([0, 4]) if padded else None
    with jax.enable_x64(True):
        inputs = make_inputs(pattern, groups, relative)
        ours, plain = (value_and_gradients(f, pattern, inputs, first) for f in (stored_attention, plain_attention))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_wrong_place_differs_from_the_formula(monkeypatch):
    place = Tile.place
    monkeypatch.setattr(Tile, "place", lambda tile, *args: (place(tile, *args)[0], place(tile, *args)[1] - 1))
    pattern = Pattern(1, 1)
    inputs = make_inputs(pattern, 20, relative=True)
    assert np.abs(stored_attention(pattern, inputs) - plain_attention(pattern, inputs)).max() > 0.1


def test_a_model_with_stored_logits_equals_the_oracle():
    options = {"attention": "stored", "positions": "relative", "window": 5, "dtype": "float64"}
    assert largest_error(small_config(hierarchy="1@1 1@3 1@1", **options)) < 1e-10
