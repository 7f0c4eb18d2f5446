"""Blocked attention: its backward pass is the derivative of its forward pass, whatever the blocks."""

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from hourglass_jax.nn.attention import blocked
from hourglass_jax.nn.attention.blocked import blocked_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern

pytestmark = pytest.mark.usefixtures("quick_compile")

GROUPS, BATCH, HEADS, SIZE = 5, 4, 2, 3
SLOTS = [(1, 1), (1, 3), (3, 1)]  # self-attention, shortening, upsampling


def make_inputs(query_slots, key_slots, relative):
    rng = np.random.default_rng(0)
    q, q_position = rng.normal(size=(2, BATCH, HEADS, GROUPS * query_slots, SIZE))
    k, v = rng.normal(size=(2, BATCH, HEADS, GROUPS * key_slots, SIZE))
    r = rng.normal(size=(query_slots, HEADS, GROUPS * key_slots, SIZE))
    return Inputs(q, k, v, *((q_position, r) if relative else ()))


def naive(inputs, query_slots, key_slots, first):
    """One query at a time, in NumPy."""
    out = np.zeros(inputs.q.shape)
    for b, h, i in np.ndindex(out.shape[:3]):
        group, slot = divmod(i, query_slots)
        scores = {}
        for j in range(inputs.k.shape[2]):
            m, s = divmod(j, key_slots)
            if m <= group and m >= min(first[b], group):
                scores[j] = inputs.q[b, h, i] @ inputs.k[b, h, j]
                if inputs.r is not None:
                    lag = (GROUPS - 1 - (group - m)) * key_slots + s
                    scores[j] += inputs.q_position[b, h, i] @ inputs.r[slot, h, lag]
        weights = np.exp(list(scores.values()))
        out[b, h, i] = weights @ inputs.v[b, h, list(scores)] / weights.sum()
    return out


@pytest.fixture(params=[(64, 8), (1, 99), (3, 2), (2, 1)], ids=lambda p: f"rows{p[0]}-segments{p[1]}")
def blocks(request, monkeypatch):
    """Blocks of so many query rows, so many segments; the last two leave an incomplete block."""
    monkeypatch.setattr(blocked, "QUERY_ROWS", request.param[0])
    monkeypatch.setattr(blocked, "SEGMENTS", request.param[1])
    monkeypatch.setattr(blocked, "HEADS_IN_CACHE", request.param[0] * HEADS)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("query_slots, key_slots", SLOTS)
def test_it_equals_its_formula(blocks, query_slots, key_slots, relative):
    inputs = make_inputs(query_slots, key_slots, relative)
    first = np.array([0, 2, 3, 4])
    out = blocked_attention(Pattern(query_slots, key_slots, 0.0), inputs, first)
    np.testing.assert_allclose(out, naive(inputs, query_slots, key_slots, first), rtol=1e-9, atol=1e-12)
    out = blocked_attention(Pattern(query_slots, key_slots, 0.0), inputs)
    np.testing.assert_allclose(out, naive(inputs, query_slots, key_slots, np.zeros(4, int)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("query_slots, key_slots", SLOTS)
def test_its_gradients_are_those_of_finite_differences(blocks, query_slots, key_slots, relative, dropout):
    inputs = make_inputs(query_slots, key_slots, relative)
    pattern = Pattern(query_slots, key_slots, dropout)
    key = jax.random.key(0) if dropout else None
    run = jax.jit(lambda inputs: blocked_attention(pattern, inputs, np.array([0, 2, 0, 1]), key))
    check_grads(run, (inputs,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_memory_of_the_gradient_grows_with_length_alone(monkeypatch):
    monkeypatch.setattr(blocked, "QUERY_ROWS", 16)

    def bytes_per_row(length):
        x = jax.ShapeDtypeStruct((1, 2, length, 8), np.float32)
        loss = jax.jit(jax.grad(lambda q: (blocked_attention(Pattern(1, 1, 0.0), Inputs(q, q, q)) ** 2).sum()))
        return loss.lower(x).compile().memory_analysis().temp_size_in_bytes / length

    short, long = bytes_per_row(512), bytes_per_row(4096)
    assert long < 1.5 * short  # plain attention would take eight times as much
