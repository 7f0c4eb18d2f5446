"""Sampling: greedy follows the logits, rows are independent, stops and bans hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, light_config, make_model, small_config

import hourglass_jax as hg
from hourglass_jax import generation
from hourglass_jax.generation import Sampler
from hourglass_jax.prompts import row_keys

KEY = jax.random.key(0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2]]


@pytest.fixture(scope="module")
def model():
    """A small one: the laws are of decoding; `test_cache` has every hierarchy and method."""
    return make_model(light_config(hierarchy="0@1 1@3 1@1"))


@pytest.mark.core
def test_greedy_tokens_are_the_argmax_of_full_forward(model):
    for prompt, new in zip(PROMPTS, hg.generate(model, PROMPTS, max_tokens=9, key=KEY, temperature=0.0), strict=True):
        text = list(prompt)
        for token in new:
            padded = np.zeros((1, 16), int)  # padding comes later
            padded[0, : len(text)] = text
            assert token == np.asarray(forward(model, padded))[0, len(text) - 1].argmax()
            text.append(int(token))
        assert len(new) == 9


@pytest.mark.core
def test_rows_in_a_batch_equal_rows_alone_and_equal_prompts_draw_different_samples(model):
    together = hg.generate(model, [*PROMPTS, PROMPTS[0]], max_tokens=12, key=KEY)
    for prompt, row in zip(PROMPTS, together, strict=False):
        np.testing.assert_array_equal(row, hg.generate(model, [prompt], max_tokens=12, key=KEY)[0])
    assert (together[0] != together[3]).any()
    assert (hg.generate(model, PROMPTS, max_tokens=12, key=jax.random.key(1))[0] != together[0]).any()


def test_different_prompts_use_different_random_keys():
    prompts = [[1, 2, 3], [3], [1, 2, 3], [2, 1]]
    keys = jax.random.key_data(row_keys(KEY, prompts)).tolist()
    assert len({tuple(key) for key in keys}) == len(prompts)
    assert keys[:2] == jax.random.key_data(row_keys(KEY, prompts[:2])).tolist()


def test_splitting_rows_over_cores_changes_no_token(model, monkeypatch):
    prompts = [*PROMPTS * 3, PROMPTS[0]]
    results = []
    for n_cores in (1, 2):
        monkeypatch.setattr(generation.os, "cpu_count", lambda n_cores=n_cores: n_cores)
        results.append(hg.generate(model, prompts, max_tokens=12, key=KEY))
    for whole, split in zip(*results, strict=True):
        np.testing.assert_array_equal(whole, split)


def test_each_row_stops_at_its_own_stop_token(model):
    free = hg.generate(model, PROMPTS, max_tokens=20, key=KEY)
    stop = int(free[0][5])
    stopped = hg.generate(model, PROMPTS, max_tokens=20, key=KEY, stop_token=stop)
    for whole, cut in zip(free, stopped, strict=True):
        ends = np.flatnonzero(whole == stop)
        np.testing.assert_array_equal(cut, whole[: ends[0]] if len(ends) else whole)


def test_each_of_several_stop_tokens_ends_a_row(model):
    free = hg.generate(model, PROMPTS, max_tokens=20, key=KEY)
    stops = {int(free[0][5]), int(free[1][3])}
    for given in (list(stops), np.array(list(stops)), stops):
        stopped = hg.generate(model, PROMPTS, max_tokens=20, key=KEY, stop_token=given)
        for whole, cut in zip(free, stopped, strict=True):
            ends = np.flatnonzero(np.isin(whole, list(stops)))
            np.testing.assert_array_equal(cut, whole[: ends[0]] if len(ends) else whole)


def test_streamed_parts_concatenate_to_the_result(model):
    parts = [[] for _ in PROMPTS]
    out = hg.generate(
        model,
        PROMPTS,
        max_tokens=21,
        key=KEY,
        stop_token=3,
        stream=lambda new: [p.extend(n) for p, n in zip(parts, new, strict=True)],
    )
    assert [list(row) for row in out] == parts


@pytest.mark.parametrize(
    "positions", ["relative", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rotary", "learned"))]
)
def test_cache_growth_leaves_generated_tokens_unchanged(positions, monkeypatch):
    model = make_model(small_config(hierarchy="0@1 1@3 1@1", positions=positions, max_length=200))
    options = {"max_tokens": 150, "key": KEY, "stream": lambda new: None}
    whole = hg.generate(model, PROMPTS, **options)
    monkeypatch.setattr(generation, "MIN_CACHE", 48)
    for row, grown in zip(whole, hg.generate(model, PROMPTS, **options), strict=True):
        np.testing.assert_array_equal(row, grown)


@pytest.mark.core
@pytest.mark.parametrize("positions", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_rows_in_a_batch_equal_rows_alone_beyond_the_context(positions):
    model = make_model(small_config(hierarchy="0@1 1@3 1@1", positions=positions))
    prompts = [*PROMPTS, np.arange(100) % 11]  # the last one is longer than the context
    options = {"max_tokens": 300, "key": KEY, "max_context": 30}
    together = hg.generate(model, prompts, **options, stream=lambda new: None)
    for prompt, row in zip(prompts, together, strict=True):
        assert len(row) == 300
        np.testing.assert_array_equal(row, hg.generate(model, [prompt], **options)[0])
    assert (hg.generate(model, PROMPTS[:1], max_tokens=300, key=KEY)[0] != together[0]).any()


@pytest.mark.parametrize("n", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_long_generation_recompiles_nothing_and_keeps_memory_constant(n, model):
    programs = (generation._extend, generation._drop, generation._grow, generation._prefill)
    sizes, arrays = [], []

    def observe(new):
        sizes.append([program._cache_size() for program in programs])
        arrays.append(sum(array.nbytes for array in jax.live_arrays()))

    [text] = hg.generate(model, PROMPTS[:1], max_tokens=n, key=KEY, max_context=120, stream=observe)
    assert len(text) == n and len(sizes) == -(-(n + 2) // generation.STREAM_BLOCK)
    settled = 200 // generation.STREAM_BLOCK  # the cache has its final size, and has been emptied once
    assert sizes[settled] == sizes[-1] and arrays[settled] == arrays[-1]


@pytest.mark.slow
def test_all_prompt_lengths_share_a_few_compiled_programs():
    model = make_model(small_config())
    jax.clear_caches()
    before = generation._prefill._cache_size(), generation._extend._cache_size()
    for n in range(1, 40):
        hg.generate(model, [np.arange(n) % 11], max_tokens=3, key=KEY)
    assert generation._prefill._cache_size() - before[0] == 8  # to read 0, 3, 6, 9, 12, 18, 24 and 36 tokens
    assert generation._extend._cache_size() - before[1] == 1


@pytest.mark.parametrize("temperature", [5.0, np.inf, 1e300])
def test_banned_tokens_are_never_sampled(model, temperature):
    out = hg.generate(model, PROMPTS * 4, max_tokens=20, key=KEY, temperature=temperature, banned_tokens=(0, 1, 2))
    assert set(np.concatenate(out)) == set(range(3, 11))  # all others do


def test_infinite_temperature_samples_allowed_tokens_uniformly():
    logits = jnp.array([3.0, -jnp.inf, 1.0, 2.0])
    np.testing.assert_allclose(jax.nn.softmax(Sampler(np.inf).filter(logits)), np.array([1, 0, 1, 1]) / 3, rtol=1e-6)
    np.testing.assert_array_equal(jax.nn.softmax(Sampler(np.inf, top_k=2).filter(logits)), [0.5, 0, 0, 0.5])


def test_top_k_and_top_p_equal_a_naive_version():
    logits = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    cuts = [(None, None), (1, None), (5, None), (99, None), (None, 0.3), (None, 0.9), (6, 0.7), (None, 1e-50)]
    for top_k, top_p in cuts:
        ours = np.asarray(Sampler(0.7, top_k, top_p).filter(jnp.asarray(logits)))
        for row, kept in zip(logits / 0.7, np.isfinite(ours), strict=True):
            order = np.argsort(-row)[: top_k or len(row)]
            p = np.exp(row[order]) / np.exp(row[order]).sum()
            count = len(order) if top_p is None else max(int((np.cumsum(p) - p < top_p).sum()), 1)
            assert set(np.flatnonzero(kept)) == set(order[:count])


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [11]], {}, "prompt 1 has tokens outside 0 .. 10"),
        ([[-1]], {}, "outside"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0"),
        ([[1]], {"temperature": -0.1}, "temperature=-0.1"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"max_context": 0}, "max_context=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_invalid_requests_raise_errors_that_name_the_option(model, prompts, options, message):
    with pytest.raises(hg.UsageError, match=message):
        hg.generate(model, prompts, **({"max_tokens": 3, "key": KEY} | options))


def test_exceeding_learned_positions_raises_an_error():
    model = make_model(small_config(positions="learned", max_length=16))
    assert len(hg.generate(model, [[1, 2]], max_tokens=14, key=KEY)[0]) == 14
    with pytest.raises(hg.UsageError, match="max_length=16"):
        hg.generate(model, [[1, 2]], max_tokens=15, key=KEY)
