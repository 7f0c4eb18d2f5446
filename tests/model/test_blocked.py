"""Blocked attention: its backward pass is the derivative of its forward pass, whatever the blocks."""

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from hourglass_jax.nn import cpu
from hourglass_jax.nn.attention import blocked
from hourglass_jax.nn.attention.blocked import blocked_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.plain import plain_attention

GROUPS, BATCH, HEADS, SIZE = 5, 4, 2, 3
SLOTS = [(1, 1), (1, 3), (3, 1)]  # self-attention, shortening, upsampling


def make_inputs(query_slots, key_slots, relative):
    rng = np.random.default_rng(0)
    q, q_position = rng.normal(size=(2, BATCH, HEADS, GROUPS * query_slots, SIZE))
    k, v = rng.normal(size=(2, BATCH, HEADS, GROUPS * key_slots, SIZE))
    r = rng.normal(size=(query_slots, HEADS, GROUPS * key_slots, SIZE))
    return Inputs(q, k, v, *((q_position, r) if relative else ()))


def naive(inputs, pattern, first):
    """One query at a time, in NumPy."""
    out = np.zeros(inputs.q.shape)
    query_slots, key_slots, _, window, _ = pattern
    for b, h, i in np.ndindex(out.shape[:3]):
        group, slot = divmod(i, query_slots)
        scores = {}
        for j in range(inputs.k.shape[2]):
            m, s = divmod(j, key_slots)
            if min(first[b], group) <= m <= group and group - m < (window or GROUPS):
                scores[j] = inputs.q[b, h, i] @ inputs.k[b, h, j]
                if inputs.r is not None:
                    lag = (GROUPS - 1 - (group - m)) * key_slots + s
                    scores[j] += inputs.q_position[b, h, i] @ inputs.r[slot, h, lag]
        weights = np.exp(list(scores.values()))
        out[b, h, i] = weights @ inputs.v[b, h, list(scores)] / weights.sum()
    return out


@pytest.fixture(
    params=[(64, 8), (3, 2), *(pytest.param(blocks, marks=pytest.mark.slow) for blocks in [(1, 99), (2, 1)])],
    ids=lambda p: f"rows{p[0]}-segments{p[1]}",
)
def blocks(request, monkeypatch):
    """Blocks of so many query rows, so many segments; 3 and 2 rows leave an incomplete block."""
    monkeypatch.setattr(blocked, "QUERY_ROWS", request.param[0])
    monkeypatch.setattr(blocked, "SEGMENTS", request.param[1])
    monkeypatch.setattr(cpu, "HEADS_IN_CACHE", request.param[0] * HEADS)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("relative", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("query_slots, key_slots, window", [*((*s, 0) for s in SLOTS), (1, 1, 1), (1, 1, 2), (1, 3, 2)])
def test_blocked_attention_equals_the_formula(blocks, query_slots, key_slots, relative, window):
    inputs = make_inputs(query_slots, key_slots, relative)
    pattern, first = Pattern(query_slots, key_slots, 0.0, window), np.array([0, 2, 3, 4])
    for padding in (first, None):
        expected = naive(inputs, pattern, np.zeros(4, int) if padding is None else padding)
        for attention in (blocked_attention, plain_attention):
            np.testing.assert_allclose(attention(pattern, inputs, padding), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "relative, dropout",
    [(True, 0.3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(False, 0.0), (False, 0.3), (True, 0.0)])],
)
@pytest.mark.parametrize("query_slots, key_slots, window", [*((*s, 0) for s in SLOTS), (1, 1, 2)])
def test_blocked_gradients_equal_finite_differences(blocks, query_slots, key_slots, relative, dropout, window):
    inputs = make_inputs(query_slots, key_slots, relative)
    pattern = Pattern(query_slots, key_slots, dropout, window)
    key = jax.random.key(0) if dropout else None
    run = jax.jit(lambda inputs: blocked_attention(pattern, inputs, np.array([0, 2, 0, 1]), key))
    check_grads(run, (inputs,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_blocked_attention_for_accelerators_equals_the_formula(monkeypatch):
    monkeypatch.setattr(blocked, "platform", lambda: "gpu")
    monkeypatch.setattr(blocked, "QUERY_ROWS", 1)
    inputs, pattern = make_inputs(3, 1, relative=True), Pattern(3, 1)
    np.testing.assert_allclose(blocked_attention(pattern, inputs), plain_attention(pattern, inputs), atol=1e-5)


def test_blocks_skip_keys_outside_the_window(monkeypatch):
    monkeypatch.setattr(blocked, "QUERY_ROWS", 4)
    [segment] = blocked.segments(Pattern(1, 1, 0.0, window=6), 50)
    assert (segment.block, segment.n_key_groups) == (4, 9)
    assert all(segment.reach is None for segment in blocked.segments(Pattern(1, 1, 0.0, window=40), 50))


@pytest.mark.parametrize("window", [0, 16])
def test_gradient_memory_grows_linearly_with_length(window, monkeypatch):
    monkeypatch.setattr(blocked, "QUERY_ROWS", 16)
    pattern = Pattern(1, 1, 0.0, window)

    def bytes_per_row(length):
        x = jax.ShapeDtypeStruct((1, 2, length, 8), np.float32)
        loss = jax.jit(jax.grad(lambda q: (blocked_attention(pattern, Inputs(q, q, q)) ** 2).sum()))
        return loss.lower(x).compile().memory_analysis().temp_size_in_bytes / length

    short, long = bytes_per_row(512), bytes_per_row(4096)
    assert long < 1.5 * short  # plain attention would take eight times as much
