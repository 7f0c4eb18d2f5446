"""Local attention: on the tokens each position sees exactly the window, in one pass and from a ring of so many rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, make_model, small_config
from test_cache import largest_difference
from test_oracle import largest_error

import hourglass_jax as hg
from hourglass_jax.causality import influence
from hourglass_jax.costs import Seen, cache_bytes, decoding_flops, forward_flops
from hourglass_jax.nn.attention import Attention, blocked

WINDOWS = [1, 2, 5, 99]  # alone, no multiple of the factor 3, longer than the text
CASES = [
    *((1, "relative"), (2, "rotary"), (5, "learned")),
    *(pytest.param(window, "relative", marks=pytest.mark.slow) for window in (2, 5, 99)),
]
HIERARCHY = "0@1 1@3 1@1"


@pytest.fixture
def small_blocks(monkeypatch):
    """Two queries a block, so that a short text has bands."""
    monkeypatch.setattr(blocked, "QUERY_ROWS", 2)


@pytest.mark.parametrize("window, positions", CASES)
def test_windowed_attention_equals_the_oracle(small_blocks, window, positions):
    options = {"window": window, "positions": positions, "dtype": "float64"}
    assert largest_error(small_config(hierarchy=HIERARCHY, **options)) < 1e-10


def test_a_window_one_too_wide_changes_the_logits(small_blocks):
    model = make_model(small_config(hierarchy="1@1", window=3))
    tokens = np.random.default_rng(0).integers(0, 11, 13)
    narrow = forward(model, tokens[None])
    model.hourglass.pre.layers.attention.window = 4
    assert np.abs(forward(model, tokens[None]) - narrow)[0, 3:].max() > 1e-3


@pytest.mark.parametrize("window", WINDOWS)
def test_a_token_layer_depends_on_exactly_its_window(small_blocks, window):
    strength = influence(make_model(small_config(hierarchy="1@1", window=window)), np.arange(12) % 11)
    distance = np.arange(12)[:, None] - np.arange(12)
    np.testing.assert_array_equal(strength > 0, (distance >= 0) & (distance < window))


def test_deeper_layers_reach_tokens_before_the_window(small_blocks):
    """All of it, from a window of a group on: tokens of its own group after the first have no other way to it."""
    for window, in_group in ((1, False), (3, True)):
        strength = influence(make_model(small_config(hierarchy=HIERARCHY, window=window)), np.arange(9))
        t, s = np.indices((9, 9))
        expected = (s <= t // 3 * 3) | (s == t) | in_group
        np.testing.assert_array_equal(strength > 0, expected & (s <= t))


@pytest.mark.parametrize("window, positions", CASES)
def test_ring_cache_logits_equal_full_forward(small_blocks, window, positions):
    with jax.enable_x64(True):
        options = {"window": window, "positions": positions, "dtype": "float64"}
        assert largest_difference(make_model(small_config(hierarchy=HIERARCHY, **options))) < 1e-12


def test_a_ring_that_is_too_small_gives_other_logits(monkeypatch):
    original = Attention.init_cache

    def cut_short(attention, batch, max_length):
        return original(attention, batch, 4 if attention.window else max_length)

    monkeypatch.setattr(Attention, "init_cache", cut_short)
    assert largest_difference(make_model(small_config(hierarchy=HIERARCHY, window=5, d_ff=20))) > 1e-3


@pytest.mark.parametrize("positions", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_rows_in_a_batch_equal_rows_alone_beyond_the_context(positions):
    model = make_model(small_config(hierarchy=HIERARCHY, window=7, positions=positions))
    prompts = [[1, 2, 3], [4], np.arange(100) % 11]  # the last one is longer than the context
    options = {"max_tokens": 120, "key": jax.random.key(0), "max_context": 30}
    together = hg.generate(model, prompts, **options)
    for prompt, row in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(row, hg.generate(model, [prompt], **options)[0])


def test_a_context_of_at_least_the_window_changes_no_token():
    """Layers on tokens alone forget nothing that they still see: a context of at least the window changes nothing."""
    model = make_model(small_config(hierarchy="1@1", window=5))
    options = {"max_tokens": 60, "key": jax.random.key(0), "temperature": 0.0}
    [free] = hg.generate(model, [[1, 2, 3]], **options)
    np.testing.assert_array_equal(free, hg.generate(model, [[1, 2, 3]], **options, max_context=20)[0])


def test_costs_count_the_attention_band():
    for length, window in [(7, 0), (7, 1), (7, 3), (7, 7), (7, 9)]:
        seen = [min(t + 1, window or length) for t in range(length)]
        assert Seen.causally(length, window) == (pytest.approx(np.mean(seen)), max(seen) / length, length)
    local, full = (small_config(hierarchy="2@1", window=window) for window in (8, 0))
    assert cache_bytes(local, 4096) == cache_bytes(local, 64) == cache_bytes(full, 8)
    assert decoding_flops(local, 4096) == decoding_flops(local, 8) == decoding_flops(full, 8)
    assert sum(forward_flops(local, 8).values()) == sum(forward_flops(full, 8).values())
    longer = [sum(forward_flops(local, length).values()) for length in (512, 1024, 2048)]
    assert longer[2] - longer[1] == pytest.approx(2 * (longer[1] - longer[0]), rel=1e-3)


def test_a_negative_window_raises_an_error():
    with pytest.raises(hg.UsageError, match="window=-1 is out of range"):
        small_config(window=-1)
    assert jnp.isfinite(forward(make_model(small_config(window=3)), jnp.ones((1, 1), int))).all()
