"""Relative attention with the logits as a bias: values and gradients of plain attention, in parts and whole."""

import jax
import numpy as np
import pytest
from conftest import small_config
from test_kernel import make_inputs, value_and_gradients
from test_oracle import largest_error

from hourglass_jax.nn.attention import biased
from hourglass_jax.nn.attention.biased import biased_attention
from hourglass_jax.nn.attention.pattern import Pattern
from hourglass_jax.nn.attention.plain import plain_attention


@pytest.mark.parametrize("limit", [2**30, 5000, 1])
@pytest.mark.parametrize(
    "pattern, padded", [(Pattern(1, 1), False), (Pattern(1, 3, 0.0, 5), True), (Pattern(3, 1), True)]
)
def test_biased_values_and_gradients_equal_the_formula(pattern, padded, limit, monkeypatch):
    monkeypatch.setattr(biased, "LIMIT", limit)  # one part, one row, one head of a row
    first = np.array([0, 4]) if padded else None
    inputs = jax.tree.map(lambda x: x.astype(np.float32), make_inputs(pattern, 21, relative=True))
    ours, plain = (value_and_gradients(f, pattern, inputs, first) for f in (biased_attention, plain_attention))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_model_with_biased_attention_equals_the_oracle():
    assert largest_error(small_config(hierarchy="1@1 1@3 1@1", attention="biased", positions="relative")) < 1e-5
