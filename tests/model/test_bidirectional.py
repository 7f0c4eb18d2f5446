"""Models that see both sides: what they see, padding, masked tokens, training, and what they refuse."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import HIERARCHIES, METHODS, NESTED, make_model, small_config
from flax import nnx
from launching import run_forked
from test_blocked import SLOTS
from test_costs import METHODS as COUNTED

import hourglass_jax as hg
from hourglass_jax import HourglassLM, costs
from hourglass_jax.data.pipeline import consecutive_windows, shuffled_windows
from hourglass_jax.evaluation import evaluate_batches
from hourglass_jax.nn import cpu
from hourglass_jax.nn.attention import blocked
from hourglass_jax.nn.attention.blocked import blocked_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.plain import plain_attention
from hourglass_jax.objective import SHARE, corrupt, task_of
from hourglass_jax.training.trainer import fit
from hourglass_jax.transfer import extend_vocabulary

GROUPS, BATCH, HEADS, SIZE = 5, 4, 2, 3
masked_forward = nnx.jit(lambda model, tokens, mask: model(tokens, mask=mask))


def slowly(cases, quick):
    """All cases, marked as slow but for the quick ones."""
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in cases]


def make_inputs(query_slots, key_slots, relative):
    """Also which keys count: in the last row none."""
    rng = np.random.default_rng(0)
    q, q_position = rng.normal(size=(2, BATCH, HEADS, GROUPS * query_slots, SIZE))
    k, v = rng.normal(size=(2, BATCH, HEADS, GROUPS * key_slots, SIZE))
    r = rng.normal(size=(query_slots, HEADS, (2 * GROUPS - 1) * key_slots, SIZE))
    mask = rng.random((BATCH, GROUPS * key_slots)) < 0.6
    mask[0], mask[-1] = True, False
    return Inputs(q, k, v, *((q_position, r) if relative else ())), mask


def naive(inputs, pattern, mask):
    """One query at a time; row e of r is for a lag of GROUPS - 1 - e groups."""
    out = np.zeros(inputs.q.shape)
    for b, h, i in np.ndindex(out.shape[:3]):
        group, slot = divmod(i, pattern.query_slots)
        scores = {}
        for j in np.flatnonzero(mask[b]):
            m, s = divmod(j, pattern.key_slots)
            scores[j] = inputs.q[b, h, i] @ inputs.k[b, h, j]
            if inputs.r is not None:
                row = (GROUPS - 1 - (group - m)) * pattern.key_slots + s
                scores[j] += inputs.q_position[b, h, i] @ inputs.r[slot, h, row]
        weights = np.exp(list(scores.values()))
        out[b, h, i] = weights @ inputs.v[b, h, list(scores)] / weights.sum()
    return out


BLOCKS = [(64, 8), (1, 99), (3, 2), (2, 1)]  # query rows, and segments, of which there is one here


@pytest.mark.parametrize(
    "query_slots, key_slots, relative, rows, n_segments",
    slowly(
        [(*slots, relative, *block) for slots in SLOTS for relative in (False, True) for block in BLOCKS],
        [(*slots, True, 3, 2) for slots in SLOTS],
    ),
)
def test_bidirectional_attention_and_gradients_equal_the_formula(
    query_slots, key_slots, relative, rows, n_segments, monkeypatch
):
    monkeypatch.setattr(blocked, "QUERY_ROWS", rows)
    monkeypatch.setattr(blocked, "SEGMENTS", n_segments)
    monkeypatch.setattr(cpu, "HEADS_IN_CACHE", rows * HEADS)
    inputs, mask = make_inputs(query_slots, key_slots, relative)
    pattern = Pattern(query_slots, key_slots, causal=False)
    expected = naive(inputs, pattern, mask | ~mask.any(1, keepdims=True))

    def of(attention):
        def loss(inputs):
            out = attention(pattern, inputs, mask)
            return (out**2 * np.arange(SIZE)).sum(), out

        with jax.enable_x64(True):
            return jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)

    ((_, out), gradient), ((_, plain), plain_gradient) = of(blocked_attention), of(plain_attention)
    for found in (out, plain):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, plain_gradient)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.abs(expected - naive(inputs, pattern, np.ones_like(mask))).max() > 1e-3  # the formula has a mask


ONE = ("attention_linear", "attention_repeat", "relative")  # has all there is
OTHERS = [tuple(case.values) for case in METHODS]


@pytest.mark.core
@pytest.mark.parametrize(
    "hierarchy, shortening, upsampling, positions",
    slowly([(h, *ONE) for h in HIERARCHIES] + [(NESTED, *case) for case in OTHERS], [(HIERARCHIES[2], *ONE)]),
)
def test_a_padded_bidirectional_model_equals_the_oracle(hierarchy, shortening, upsampling, positions):
    """That of the text without padding; of what the padding holds nothing is seen, and how much there is."""
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions, "dtype": "float64"}
    length, rng = 13, np.random.default_rng(0)
    tokens = rng.integers(0, 11, (4, 24))
    tokens[1:3, :length] = tokens[0, :length]
    mask = np.arange(24) < np.array([length, length, 23, 0])[:, None]
    with jax.enable_x64(True):
        model = make_model(small_config(hierarchy=hierarchy, causal=False, **options))
        logits = np.asarray(masked_forward(model, tokens, mask))
        expected = oracle.logits(model, tokens[0, :length])
    assert np.isfinite(logits).all()  # of a row of nothing but padding, too
    np.testing.assert_array_equal(logits[0, :length], logits[1, :length])
    np.testing.assert_allclose(logits[0, :length], expected, atol=1e-10 * np.abs(expected).max())
    assert np.abs(logits[2, :length] - expected).max() > 1e-3  # where it is no padding, it is seen


@pytest.mark.parametrize(
    "attention, positions",
    slowly(itertools.product(("blocked", "plain"), ("relative", "rotary")), [("plain", "rotary")]),
)
def test_left_padding_by_whole_groups_changes_no_logits(attention, positions):
    """By a multiple of the total factor, where positions are distances; n-grams exclude the padding."""
    options = {"hierarchy": NESTED, "positions": positions, "attention": attention, "ngram_sizes": (2, 3)}
    model = make_model(small_config(causal=False, **options))
    tokens = np.random.default_rng(0).integers(0, 11, (1, 20))
    expected = model(tokens[:, 6:])[0]
    found = masked_forward(model, tokens, np.arange(20)[None] >= 6)[0, 6:]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "hierarchy, shortening, upsampling, positions",
    slowly([(h, *case) for h in ("1@1 1@3 1@1", NESTED) for case in OTHERS], [("1@1 1@3 1@1", *OTHERS[0])]),
)
def test_bidirectional_predictions_depend_on_both_sides(hierarchy, shortening, upsampling, positions):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions}
    for causal in (False, True):
        model = make_model(small_config(hierarchy=hierarchy, causal=causal, **options))
        strength = hg.causality.influence(model, np.arange(10) % 11)
        assert (strength[np.tril_indices(10)] > 0).all()
        assert (strength[np.triu_indices(10, k=1)] > 0).all() == (not causal)


def test_corruption_masks_15_percent_of_each_row():
    """15 % of each row, of which 80 % are masked, 10 % another token and 10 % themselves."""
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 10, (200, 300)), np.arange(300) < rng.integers(0, 301, (200, 1))
    mask[0], mask[1] = False, True
    hide = jax.jit(corrupt, static_argnums=2)
    inputs, chosen = map(np.asarray, hide(tokens, jax.random.key(0), 10, mask))
    n = mask.sum(1)
    n_of_row = chosen.sum(1)
    assert (np.abs(n_of_row - SHARE * n) < 0.501)[n > 3].all() and (n_of_row == np.minimum(n, 1))[n <= 3].all()
    assert not (chosen & ~mask).any() and (inputs == tokens)[~chosen].all() and inputs.max() == 10
    n_chosen = chosen.sum()
    for share, count in (
        (0.8, (inputs == 10).sum()),
        (0.1 * 0.9, ((inputs != tokens) & (inputs != 10)).sum()),  # a random one of ten may be the token itself
        (SHARE, chosen[1:, :150].sum() / mask[:, :150].sum() * n_chosen),
    ):
        assert abs(count / n_chosen - share) < 5 * np.sqrt(share * (1 - share) / n_chosen)
    others = inputs[(inputs != tokens) & (inputs != 10)]
    assert np.bincount(others, minlength=10).min() > 0.5 * len(others) / 10
    again, _ = hide(tokens[100:], jax.random.key(0), 10, mask[100:])  # of its row alone
    np.testing.assert_array_equal(again, inputs[100:])
    again, _ = hide(np.where(mask, tokens, 7), jax.random.key(0), 10, mask)  # and not of padding
    np.testing.assert_array_equal(np.where(mask, again, 0), np.where(mask, inputs, 0))
    assert (np.asarray(hide(tokens, jax.random.key(1), 10, mask)[1]) != chosen).any()


def test_tokens_without_weight_are_padding():
    config = small_config(vocab_size=12, causal=False)
    tokens, weights = np.arange(22).reshape(2, 11) % 11, jnp.ones((2, 10)).at[0, 4:].set(0)
    task = task_of(config, tokens, weights)
    np.testing.assert_array_equal(task.targets, tokens[:, 1:])
    np.testing.assert_array_equal(task.mask, weights > 0)
    np.testing.assert_array_equal(task.weights.sum(1), [1, 2])
    assert set(np.asarray(task.inputs)[np.asarray(task.inputs) != tokens[:, 1:]]) <= {11, *range(11)}
    causal = task_of(dataclasses.replace(config, causal=True), tokens, weights)
    np.testing.assert_array_equal(causal.inputs, tokens[:, :-1])
    assert causal.mask is None and (causal.weights == weights).all()


PAIRS = np.repeat(np.random.default_rng(0).integers(0, 8, 1000), 2)[1:]  # looking back, half cannot be told


def train(directory, steps):
    config = small_config(
        vocab_size=9,
        hierarchy="1@1 0@2 1@1",
        shortening="average",
        upsampling="repeat",
        positions="learned",
        causal=False,
    )
    model = make_model(config, scale=1.0)
    result = fit(
        model,
        shuffled_windows(PAIRS[:1600], 16, 16, seed=0),
        consecutive_windows(PAIRS[1600:], 16, 8),
        directory,
        optimizer_config=hg.OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0),
        train_config=hg.TrainConfig(steps=steps, eval_interval=STEPS // 2),
        runtime_config=hg.RuntimeConfig(log="none"),
    )
    return model, result


STEPS = 200


@pytest.mark.slow
def test_bidirectional_training_learns_and_resumes_bit_for_bit(tmp_path):
    model, result = train(tmp_path / "whole", STEPS)
    assert result.loss < 0.8 * np.log(8) / 2  # what a causal model could reach at best
    for n_steps in (STEPS // 2, STEPS):
        resumed, again = train(tmp_path / "parts", n_steps)
    assert again == result
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(resumed))
    curves = [
        [
            (r["step"], r[name])
            for r in hg.Run(tmp_path / run).curves()
            for name in ("train_loss", "valid_loss")
            if name in r
        ]
        for run in ("whole", "parts")
    ]
    assert curves[0] == curves[1]
    other = evaluate_batches(model, consecutive_windows(PAIRS[1600:], 16, 3))  # the same tokens are masked
    assert other.n_characters == result.n_characters and other.loss == pytest.approx(result.loss, rel=1e-5)


def test_causal_only_operations_reject_bidirectional_models():
    config = small_config(causal=False)
    model, causal = make_model(config), make_model(small_config())
    tokens, key = jnp.arange(10)[None], jax.random.key(0)
    cache = causal.init_cache(1, 12)
    for call, message in (
        (lambda: small_config(causal="no"), "causal='no'"),
        (lambda: small_config(causal=False, vocab_size=1), "vocab_size=1"),
        (lambda: small_config(causal=False, window=4), "window=4"),
        (lambda: small_config(causal=False, shift="original"), "shift='original'"),
        (lambda: small_config(causal=False, attention="fused"), "attention='fused'"),
        (lambda: small_config(causal=False, attention="kernel"), "attention='kernel'"),
        (lambda: small_config(causal=False, token_attention="lsh", positions="rotary"), "token_attention='lsh'"),
        (
            lambda: small_config(causal=False, boundaries="router", shortening="average", upsampling="repeat"),
            "boundaries='router'",
        ),
        (lambda: model.init_cache(1, 12), "does not support decoding"),
        (lambda: hg.init_cache(model, 1, 12), "does not support decoding"),
        (lambda: model.prefill(tokens, jnp.zeros(1, int), cache), "does not support decoding"),
        (lambda: model.step(tokens[:, 0], cache), "does not support decoding"),
        (lambda: hg.generate(model, [[1]], max_tokens=1, key=key), "does not support decoding"),
        (lambda: costs.cache_bytes(config, 12), "does not support decoding"),
        (lambda: costs.decoding_flops(config, 12), "does not support decoding"),
        (lambda: hg.score(model, tokens), "including the token to predict"),
        (lambda: hg.evaluate(model, tokens[0], block_size=4), "including the token to predict"),
        (lambda: hg.evaluate_sliding(model, tokens[0], window=4, step=2), "including the token to predict"),
        (lambda: hg.check_causality(model), "choose causal=True"),
        (lambda: extend_vocabulary(model, hg.CharTokenizer("abcdefg"), "xyz"), "mask token, the last one"),
        (lambda: causal(tokens, mask=jnp.ones((1, 10), bool)), "a causal model"),
        (lambda: model(tokens, mask=jnp.ones((1, 9), bool)), r"bool \[1, 10\]"),
        (lambda: model(tokens, mask=np.ones((1, 10))), "mask is float64"),
    ):
        with pytest.raises((hg.UsageError, hg.CausalityError), match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("shortening, upsampling, positions", slowly(COUNTED, COUNTED[:1]))
def test_costs_and_summary_count_bidirectional_attention(shortening, upsampling, positions):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions, "max_length": 512}
    config = small_config(hierarchy="1@1 1@2 1@6 1@2 1@1", d_model=256, d_ff=1024, causal=False, **options)
    model = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    counted = sum(costs.forward_flops(config, 512).values())
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    assert counted == pytest.approx(costs.call_flops(model, lambda model, tokens: model(tokens), tokens), rel=0.05)
    causal = sum(costs.forward_flops(dataclasses.replace(config, causal=True), 512).values())
    assert counted > 1.1 * causal
    text = hg.summary(config)
    assert "both ways" in text and "blocked" in text


@pytest.mark.launchers
@pytest.mark.slow
def test_launchers_train_and_evaluate_bidirectional_models(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 40)
    flags = ["--hierarchy=1@1 1@2 1@1", "--d_model=16", "--n_heads=2", "--d_ff=16", "--block_size=24", "--batch_size=4"]
    flags += ["--steps=2", "--data_path=text.txt", "--model.causal=false", "--data.tokenizer=byte"]

    def launch(script, *flags, code=0):
        result = run_forked(script, *flags, cwd=tmp_path)
        assert result.returncode == code, result.stderr
        return result

    trained = launch("pretrain", *flags).stdout
    assert "causal: no, bidirectional" in trained and "is filled in:" in trained and "vocabulary 259" in trained
    [reported] = [line for line in trained.splitlines() if line.startswith("validation: ")]
    assert "masked bits/byte" in reported
    evaluated = launch("evaluate", "--load_model_path=runs/pretrain").stdout
    bits = json.loads(evaluated.splitlines()[-1])["masked_bits"]
    assert f"masked bits/byte {bits:.4f}" in reported and f"masked bits/byte {bits:.4f}" in evaluated
    for words, script, *options in (("both sides", "generate"), ("bidirectional", "evaluate", "--per_token=a.tsv")):
        refused = launch(script, "--load_model_path=runs/pretrain", *options, code=2)
        assert words in refused.stderr and refused.stderr.count("\n") == 1 and not refused.stdout
