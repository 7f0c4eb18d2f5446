"""Options of the modern recipe, each alone and all together: oracle, causality, decoding, costs, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import (
    MODERN,
    event_config,
    forward,
    learned_config,
    make_model,
    slow_unless,
    small_config,
    tokens_of,
)
from flax import nnx
from test_boundaries import largest_difference as largest_event_difference
from test_cache import largest_difference
from test_oracle import TOKENS, largest_error

import hourglass_jax as hg
from hourglass_jax import HourglassConfig, HourglassLM, UsageError
from hourglass_jax.causality import CausalityError, check_causality, influence
from hourglass_jax.costs import Seen, call_flops, count_parameters, forward_flops, level_lengths, position_flops
from hourglass_jax.nn import ngrams
from hourglass_jax.nn.transformer import Block

EACH = pytest.mark.parametrize("options", MODERN.values(), ids=MODERN)
# Options that act on one position at a time are quick only together.
ACROSS = ("input_residual", "ngrams", "widths", "windows", "together")
EACH_ACROSS = pytest.mark.parametrize(
    "options", [pytest.param(MODERN[name], id=name, marks=slow_unless(name in ACROSS)) for name in MODERN]
)
TOGETHER = MODERN["together"]
PINNED = {
    2: [1517327922, 1455621316, 834770857, 443848254],
    4: [1374066572, 2859760074, 1691402067, 3882875695],
}
THREE_LEVELS = {"hierarchy": "1@1 1@2 1@6 0@2 1@1", "d_model": (16, 24, 8), "n_heads": (2, 3, 1), "d_ff": (32, 48, 8)}


@EACH
@pytest.mark.parametrize("positions", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_each_option_equals_the_numpy_oracle(options, positions):
    assert largest_error(small_config(dtype="float64", positions=positions, **options)) < 1e-10


@pytest.mark.parametrize("resampling", [("average", "repeat"), ("linear", "linear"), ("select", "attention")])
def test_all_options_equal_the_oracle_with_other_resampling_and_three_widths(resampling):
    methods = {"shortening": resampling[0], "upsampling": resampling[1], "norm": "final", "positions": "learned"}
    options = TOGETHER | THREE_LEVELS | methods | {"window": (5, 0, 1)}
    assert largest_error(small_config(dtype="float64", **options)) < 1e-10


@EACH_ACROSS
def test_cached_logits_equal_full_forward(options):
    with jax.enable_x64(True):
        assert largest_difference(make_model(small_config(dtype="float64", **options))) < 1e-9


@pytest.mark.core
@pytest.mark.parametrize("positions", ["relative", "rotary", "learned"])
def test_cached_logits_of_all_options_equal_full_forward_in_float32(positions):
    options = TOGETHER | THREE_LEVELS | {"window": (4, 3, 2)}
    assert largest_difference(make_model(small_config(positions=positions, **options))) < 1e-4


@pytest.mark.parametrize(
    "make_config, boundaries", [(event_config, "whitespace"), (learned_config, "router"), (learned_config, "gumbel")]
)
def test_cached_logits_of_variable_groups_equal_full_forward(make_config, boundaries):
    attends = {"shortening": "attention_average", "upsampling": "attention_repeat"}
    assert largest_event_difference(make_model(make_config(boundaries=boundaries, **TOGETHER, **attends))) < 1e-4


@EACH_ACROSS
def test_predictions_depend_on_every_visible_token_and_no_future_token(options):
    model = make_model(small_config(**options))
    strength = influence(model, tokens_of(13, seed=1))
    assert not np.triu(strength, k=1).any()
    assert (strength.diagonal() > 0).all()
    check_causality(model)


@pytest.mark.parametrize("boundaries", ["fixed", "whitespace"])
def test_an_ngram_that_looks_one_token_ahead_fails_the_causality_check(boundaries, monkeypatch):
    config = event_config(boundaries=boundaries, ngram_sizes=(2, 3), ngram_buckets=64)
    new_model = HourglassLM(config, rngs=nnx.Rngs(0))  # its tables are zero
    check_causality(new_model)
    hashes = ngrams.hashes
    monkeypatch.setattr(ngrams, "hashes", lambda tokens, size: jnp.roll(hashes(tokens, size), -1, axis=1))
    jax.clear_caches()
    with pytest.raises(CausalityError, match="n-grams"):
        check_causality(new_model)


def test_a_leak_behind_zero_initialized_layers_fails_the_causality_check():
    model = HourglassLM(small_config(residual_init="zero"), rngs=nnx.Rngs(0))
    model.hourglass.boundaries.shift -= 1
    with pytest.raises(CausalityError, match="later token"):
        check_causality(model)


def test_a_leak_behind_zero_input_scales_fails_the_causality_check(monkeypatch):
    mix = Block.mix_input
    monkeypatch.setattr(Block, "mix_input", lambda block, x, x0: mix(block, x, jnp.roll(x0, -1, axis=1)))
    with pytest.raises(CausalityError, match="later token"):
        check_causality(HourglassLM(small_config(hierarchy="2@1", d_ff=7, input_residual=True), rngs=nnx.Rngs(0)))


def test_a_wrong_hash_and_a_wrong_width_differ_from_the_oracle(monkeypatch):
    monkeypatch.setattr(oracle, "mixed_bits", lambda symbol, state: symbol * 31 + state)
    assert largest_error(small_config(dtype="float64", **MODERN["ngrams"])) > 1e-3
    monkeypatch.setattr(HourglassConfig, "at_level", lambda config, i: dataclasses.replace(config, d_model=16))
    with pytest.raises((ValueError, TypeError, AttributeError)):
        largest_error(small_config(dtype="float64", **MODERN["widths"]))


def test_hashes_of_ngrams_never_change():
    """Trained tables depend on them."""
    text = np.frombuffer(b"An hourglass", np.uint8)[None]
    assert ngrams.hashes(text, 2)[0, :4].tolist() == PINNED[2]
    assert ngrams.hashes(text, 4)[0, -4:].tolist() == PINNED[4]
    extended = np.concatenate([text, text], axis=1)
    np.testing.assert_array_equal(ngrams.hashes(extended, 4)[:, :12], ngrams.hashes(text, 4))


def test_new_ngram_tables_and_input_scales_change_no_logit():
    plain, extended = (
        HourglassLM(small_config(**options), rngs=nnx.Rngs(0))
        for options in ({}, MODERN["ngrams"] | MODERN["input_residual"])
    )
    np.testing.assert_array_equal(forward(plain, TOKENS[None]), forward(extended, TOKENS[None]))


def test_a_new_model_with_zero_residual_layers_is_its_embedding_and_head():
    """Without resampling and the norms of stacks every layer is the identity."""
    config = small_config(hierarchy="3@1", norm="final", residual_init="zero")
    model = HourglassLM(config, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(forward(model, TOKENS[None]), model.logits(model.embed(TOKENS[None])), rtol=1e-5)


def test_logits_stay_below_the_cap_and_attention_scores_are_bounded_by_qk_norm():
    model = make_model(small_config(**MODERN["softcap"]), scale=50.0)
    assert 1.4 < np.abs(forward(model, TOKENS[None])).max() <= 1.5
    normed = make_model(small_config(hierarchy="1@1", **MODERN["qk_norm"]))
    q = nnx.jit(lambda model, x: model.hourglass.pre.blocks()[0].attention.queries(x))
    x = 100 * jax.random.normal(jax.random.key(0), (3, 16))
    largest = np.abs(normed.hourglass.pre.blocks()[0].attention.query_norm.scale[...]).max()
    assert np.linalg.norm(q(normed, x), axis=-1).max() <= 1.001 * largest * np.sqrt(8)


@pytest.mark.parametrize("attention", ["plain", "blocked", "fused", "kernel"])
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_all_options_agree_between_attention_implementations(attention, positions):
    options = TOGETHER | {"positions": positions}
    model = make_model(small_config(attention="blocked", **options))
    other = model.reconfigured(dataclasses.replace(model.config, attention=attention))
    np.testing.assert_allclose(forward(other, TOKENS[None]), forward(model, TOKENS[None]), atol=2e-5)


@pytest.mark.parametrize("options", [{"token_attention": "lsh", "positions": "rotary"}, {"causal": False}], ids=str)
def test_all_options_run_with_lsh_and_bidirectional_models(options):
    model = make_model(small_config(**(TOGETHER | {"window": 0} | options)))
    tokens = tokens_of((2, 13))
    changed = forward(model, np.where(np.arange(13) == 5, (tokens + 1) % 11, tokens)) != forward(model, tokens)
    assert changed[:, 5:].any() and (model.config.causal or changed[:, :5].any())


def test_scanned_and_unrolled_stacks_agree_with_all_options():
    config = small_config(hierarchy="3@1 3@3 1@1", **TOGETHER)
    model = make_model(config)
    scanned = model.reconfigured(dataclasses.replace(config, max_unrolled_layers=0))
    np.testing.assert_allclose(forward(model, TOKENS[None]), forward(scanned, TOKENS[None]), atol=2e-5)


def test_rows_in_a_batch_equal_rows_alone_beyond_the_context():
    model = make_model(small_config(**TOGETHER))
    prompts = [[1, 2, 3], [4], np.arange(100) % 11]  # the last one is longer than the context
    options = {"max_tokens": 80, "key": jax.random.key(0), "max_context": 30}
    together = hg.generate(model, prompts, **options)
    for prompt, row in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(row, hg.generate(model, [prompt], **options)[0])


@pytest.mark.parametrize("options", [TOGETHER | {"window": 0}, THREE_LEVELS], ids=["together", "three"])
@pytest.mark.parametrize("methods", [("attention_linear", "attention_linear"), ("average", "repeat")])
def test_costs_equal_the_products_of_the_program_at_every_width(options, methods):
    """The plain implementation computes all pairs of positions; the costs are those of pairs that are visible."""
    config = small_config(shortening=methods[0], upsampling=methods[1], attention="plain", **options)
    model = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    lengths = level_lengths(config, 12)
    of_all_pairs = position_flops(config, lambda level, _: Seen(lengths[level.factor], 1, lengths[level.factor]))
    counted = call_flops(model, lambda model, tokens: model(tokens), tokens)
    # a hidden layer of swiglu has round(2/3 d_ff) units
    assert counted == pytest.approx(sum(lengths[f] * flops for f, flops in of_all_pairs.items()), rel=0.005)


def test_swiglu_has_as_many_parameters_as_gelu_and_ngrams_count_with_the_embedding():
    gelu, swiglu = (count_parameters(small_config(d_model=96, d_ff=384, activation=a)) for a in ("gelu", "swiglu"))
    assert swiglu == pytest.approx(gelu, rel=0.01)
    plain, tables = (small_config(**options) for options in ({}, {"ngram_sizes": (2, 4), "ngram_buckets": 100}))
    assert count_parameters(tables) - count_parameters(plain) == 2 * 100 * 16
    assert sum(forward_flops(tables, 64).values()) == sum(forward_flops(plain, 64).values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": (16, 24, 32)}, r"d_model=\(16, 24, 32\) has 3 numbers, but hierarchy='1@1 1@3 1@1' has 2 levels"),
        ({"d_model": (16, 25)}, "n_heads=2 does not divide d_model=25"),
        ({"window": (4, -1)}, "window=-1 is out of range"),
        ({"d_ff": (32, 0)}, "d_ff=0 is out of range"),
        ({"d_model": (16, 2), "positions": "rotary"}, "even head size, not 1"),
        ({"ngram_sizes": (1, 2)}, "ngram_sizes=1 is out of range"),
        ({"ngram_sizes": (2, 2)}, r"ngram_sizes=\(2, 2\) repeats a size"),
        ({"ngram_sizes": 3}, "ngram_sizes=3 is not a tuple"),
        ({"ngram_sizes": (2,), "ngram_buckets": 0}, "ngram_buckets=0 is out of range"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0 is out of range"),
        ({"activation": "swish"}, "activation='swish' is unknown"),
        ({"qk_norm": 1}, "qk_norm=1 is not a bool"),
        ({"window": (0, 4), "causal": False}, "causal=False does not support window"),
    ],
    ids=str,
)
def test_invalid_options_raise_one_line(options, message):
    with pytest.raises(UsageError, match=message) as error:
        small_config(**options)
    assert "\n" not in str(error.value)
