"""What a user hands in by mistake gets one line that says what is wrong, everywhere the same mistake can be made."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, light_config, make_model, small_config
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.checks import check_tokens
from hourglass_jax.run_config import MAX_SEED

KEY = jax.random.key(0)
CHARACTERS, BYTES = hg.CharTokenizer("abc"), hg.ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model(light_config(d_model=8))  # 11 tokens


@pytest.fixture(scope="module")
def learned():
    return make_model(light_config(d_model=8, positions="learned", max_length=8))


def generated(model, prompts=([1],), **options):
    return hg.generate(model, prompts, **({"max_tokens": 2, "key": KEY} | options))


def step(model, tokens, rows=2, filled=0):
    cache = hg.init_cache(model, rows, 4)
    for _ in range(filled):
        _, cache = model.step(jnp.ones(rows, int), cache)
    return model.step(tokens, cache)


def prefill(model, tokens, start=(0, 0), rows=2):
    return model.prefill(tokens, np.asarray(start, np.int32), hg.init_cache(model, rows, 4))


TAKE_TOKENS = {  # of each function: how it is called, and the number of its axes
    "model": (lambda model, tokens: nnx.jit(lambda model: model(tokens))(model), 2),  # as one program
    "score": (lambda model, tokens: nnx.jit(lambda model: hg.score(model, tokens))(model), 2),
    "step": (lambda model, tokens: nnx.jit(lambda model: step(model, tokens)[0])(model), 1),
    "evaluate": (lambda model, tokens: hg.evaluate(model, tokens, block_size=4), 1),
    "evaluate_sliding": (lambda model, tokens: hg.evaluate_sliding(model, tokens, window=4, step=2), 1),
    "influence": (lambda model, tokens: hg.causality.influence(model, tokens), 1),
    "generate": (lambda model, tokens: generated(model, [tokens]), 1),
}
BAD_TOKENS = {  # beside [1, 2]
    "beyond": ([1, 11], "outside 0 .. 10"),
    "negative": ([1, -1], "outside 0 .. 10"),
    "fractions": ([1.0, 2.5], "is float.*integers"),
    "text": ("an old", "is text; give integers"),
    "none": ([], "is empty"),
    "truths": ([True, False], "is bool.*integers"),
}


@pytest.mark.parametrize("name", TAKE_TOKENS)
@pytest.mark.parametrize("mistake", BAD_TOKENS)
def test_invalid_tokens_raise_one_line_errors(model, name, mistake):
    call, n_axes = TAKE_TOKENS[name]
    tokens, message = BAD_TOKENS[mistake]
    for array in (tokens,) if mistake == "text" else (tokens, np.array(tokens)):
        with pytest.raises(hg.UsageError, match=message) as error:
            call(model, [array] if n_axes == 2 else array)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TAKE_TOKENS)
def test_wrong_ranks_raise_errors_and_plain_lists_are_accepted(model, name):
    call, n_axes = TAKE_TOKENS[name]
    tokens = [1, 2]
    call(model, [tokens] if n_axes == 2 else tokens)
    with pytest.raises(hg.UsageError, match=r"give integers \[") as error:
        call(model, tokens if n_axes == 2 else [tokens])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("boundaries", ["whitespace", "entropy"])
def test_boundary_models_accept_lists_and_numpy_arrays(boundaries):
    resampling = {"shortening": "average", "upsampling": "repeat"}
    config = small_config(hierarchy="0@1 1@2 0@1", boundaries=boundaries, boundary_tokens=(2,), **resampling)
    model, array = make_model(config), jnp.array([[1, 2, 3]])

    @nnx.jit
    def run(model):
        logits, loss, _ = model.forward_with_aux(array.tolist(), KEY, np.ones((1, 3), np.float32))
        return model(array.tolist()), model(array), logits, loss

    of_list, of_array, logits, loss = run(model)
    np.testing.assert_array_equal(of_list, of_array)
    assert logits.shape == (1, 3, 11) and jnp.isfinite(loss)


def test_traced_tokens_are_checked_for_shape_and_dtype_only(model):
    graph, params = nnx.split(model)
    score = jax.jit(lambda params, tokens: hg.score(nnx.merge(graph, params), tokens))
    assert np.isfinite(score(params, np.ones((1, 4), int))).all()
    score(params, np.full((1, 4), 11))  # what comes of it is another matter
    with pytest.raises(hg.UsageError, match=r"\[B, L \+ 1\]"):  # the shape is known
        score(params, np.ones(4, int))


def test_mapped_bytes_are_not_scanned():
    class Untouched(np.ndarray):
        def __array_function__(self, *_):
            raise AssertionError("was read")

        def min(self, *_, **__):
            raise AssertionError("was read")

    text = np.zeros(10, np.uint8).view(Untouched)
    assert len(check_tokens("the text", text, 256, "N")) == 10
    with pytest.raises(AssertionError, match="was read"):
        text.min()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: generated(model, "abc"), "prompts is str"),
        (lambda model: generated(model, b"abc"), "prompts is bytes"),
        (lambda model: generated(model, [1, 2, 3]), r"prompt 0 is int64 \[\]; give integers \[n\]"),
        (lambda model: generated(model, ["abc"]), "prompt 0 is text"),
        (lambda model: generated(model, [[[1], [2, 3]]]), "prompt 0 has rows of different lengths"),
        (lambda model: generated(model, [[2**40]]), "prompt 0 has tokens outside"),
        (lambda model: generated(model, None), "prompts is NoneType"),
        (lambda model: generated(model, key=0), "key is int, not a random key"),
        (lambda model: generated(model, key=jax.random.split(KEY, 2)), "not a random key"),
        (lambda model: generated(model, key=jnp.zeros(3, jnp.uint32)), r"key is uint32 \[3\], not a random key"),
        (lambda model: model([[1, 2]], 0), "key is int, not a random key"),
        (lambda model: generated(model, stop_token=11), "stop_token has tokens outside"),
        (lambda model: generated(model, stop_token=[1, -1]), "stop_token has tokens outside"),
        (lambda model: generated(model, stop_token="."), "stop_token is text"),
        (lambda model: generated(model, banned_tokens=[11]), "banned_tokens has tokens outside"),
        (lambda model: generated(model, banned_tokens=range(11)), "banned_tokens contains all 11 tokens"),
        (lambda model: generated(model, temperature=float("nan")), "temperature=nan"),
        (lambda model: hg.score(model, [[1], [2]]), "at least 2"),
        (lambda model: hg.score(model, [[1, 2], [3]]), "rows of different lengths"),
        (lambda model: hg.evaluate(model, [1, 2, 3], block_size=0), "block_size=0"),
        (lambda model: hg.evaluate(model, [1, 2, 3], block_size=2, batch_size=0), "batch_size=0"),
        (lambda model: hg.check_causality(model, 0), "length=0"),
        (lambda model: hg.init_cache(model, 0, 4), "batch=0"),
        (lambda model: hg.init_cache(model, 1, 4.0), "max_length=4.0"),
        (lambda model: step(model, [1, 2, 3]), "3 tokens for a cache of 2 rows"),
        (lambda model: step(model, [1, 2], filled=4), "the cache holds 4 tokens and is full"),
        (lambda model: prefill(model, [[1, 2, 3]] * 2), "3 tokens: all must begin and end at multiples of 2"),
        (lambda model: prefill(model, [[1, 2, 3, 4]] * 2, (0, 1)), "all must begin and end at multiples of 2"),
        (lambda model: prefill(model, [[1, 2]]), "1 prompts for a cache of 2 rows"),
        (lambda model: prefill(model, [[1, 11]] * 2), "tokens has tokens outside"),
        (lambda model: prefill(model, [1, 2]), r"tokens is int64 .*give integers \[B, L\]"),
        (lambda model: prefill(model, [[1] * 6] * 2), "the cache holds 4 tokens, not 6"),
        (lambda model: model.init_cache(1, 5), "max_length=5 .* multiples of 2"),
        (lambda model: hg.at_shorten_factor(model, 2.0), "shorten_factor=2.0"),
        (lambda model: hg.at_shorten_factor(model, "2"), "shorten_factor='2'"),
        (
            lambda _: small_config(boundaries="tokens", boundary_tokens=" ."),
            "boundary_tokens=' .' is not a list",
        ),
        (lambda _: small_config(boundaries="tokens", boundary_tokens=3), "boundary_tokens=3 is not a list of tokens"),
        (lambda _: small_config(boundaries="tokens", boundary_tokens=(1.5,)), "boundary_tokens=1.5"),
        (lambda _: small_config(boundaries=None), "boundaries='None' is unknown"),
        (lambda _: small_config(dropout="0.1"), "dropout='0.1' is out of range; it must be at least 0 and below 1"),
        (lambda _: small_config(dropout=1), "dropout=1 "),
        (lambda _: hg.OptimizerConfig(beta2=1.0), "beta2=1.0 is out of range; it must be at least 0 and below 1"),
        (lambda _: hg.TrainConfig(shorten_factors=2), r"shorten_factors=2 is not a tuple; give factors"),
        (lambda model: generated(model, [[1]], max_tokens=2**31), "max_tokens=2147483648 is out of range"),
        (lambda _: hg.DataConfig(train_fraction=1.0), "train_fraction=1.0 .* more than 0 and below 1"),
        (lambda _: BYTES.decode([np.arange(3), np.arange(4)]), "rows of different lengths; give integers"),
        (lambda _: hg.ImageTokenizer((1, 1, 3)).decode([1.9, 2.9, 3.0]), r"tokens is float64 \[3\]"),
        (lambda _: hg.CharTokenizer(b"abc"), "single characters"),
        (lambda _: hg.CharTokenizer.from_text("a\ud800"), "surrogate"),
        (lambda _: hg.CharTokenizer.from_text(b"abc"), "text is bytes; give a str"),
        (lambda _: CHARACTERS.encode(b"abc"), "text is bytes; give a str"),
        (lambda _: CHARACTERS.encode(["a"]), "text is list; give a str"),
        (lambda _: CHARACTERS.decode([6]), "from 0 to 5"),
        (lambda _: CHARACTERS.decode([-1]), "from 0 to 5"),
        (lambda _: BYTES.encode(7), "text is int; give a str"),
        (lambda _: BYTES.encode("a\ud800"), "character 1 .*'.ud800'.*surrogate"),
        (lambda _: BYTES.decode([258]), "from 0 to 257"),
        (lambda _: hg.ByteTokenizer(257), "vocab_size=257"),
        (lambda _: hg.ImageTokenizer((1, 1, 3)).encode([[[0, 1, 2]]]), "images is int64"),
        (lambda _: hg.TrainConfig(seed=MAX_SEED + 1), "seed="),
    ],
)
def test_invalid_arguments_raise_one_line_errors(model, call, message):
    with pytest.raises(hg.UsageError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_learned_positions_limit_cache_and_causality_check_length(learned):
    hg.init_cache(learned, 1, 8)
    for call in (lambda: hg.init_cache(learned, 1, 9), lambda: hg.check_causality(learned, 9)):
        with pytest.raises(hg.UsageError, match="at most 8"):
            call()


def test_valid_arguments_are_accepted(model):
    assert [len(row) for row in generated(model, np.ones((2, 3), int), key=jax.random.PRNGKey(0))] == [2, 2]
    assert [len(row) for row in generated(model, (np.uint8([1]), jnp.array([2])), banned_tokens={0, 1})] == [2, 2]
    for stop in (np.int64(3), np.array(3), jnp.array(3)):
        assert len(generated(model, [[1]], stop_token=stop, banned_tokens=jnp.array(0))) == 1
    assert generated(model, []) == []


def test_different_seeds_give_different_keys():
    keys = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (0, 1, MAX_SEED - 1, MAX_SEED)]
    assert len(set(map(tuple, keys))) == 4
    if not jax.config.jax_enable_x64:  # why there is a largest
        assert jax.random.key(MAX_SEED + 1) == jax.random.key(0)


def test_configs_store_paths_as_text_and_numpy_numbers_as_python_numbers():
    for config in (
        hg.HourglassConfig(vocab_size=np.int64(9), dtype=np.dtype("float32"), boundary_tokens=np.arange(2)),
        hg.OptimizerConfig(learning_rate=np.float32(0.5), warmup_steps=np.int32(1)),
        hg.TrainConfig(seed=np.int64(3), shorten_factors=[np.int64(2)]),
        hg.DataConfig(path=Path("a.txt"), block_size=np.int64(8), train_fraction=np.float64(0.5)),
        hg.RuntimeConfig(accumulate=np.int64(2)),
    ):
        again = json.loads(json.dumps(dataclasses.asdict(config)))
        assert type(config)(**again) == config
    assert config.accumulate == 2 and hg.TrainConfig(seed=np.int64(3)) == hg.TrainConfig(seed=3)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_vocabularies_accept_text_and_path_objects(tmp_path, kind):
    path = kind(tmp_path / "vocab.json")
    CHARACTERS.save(path)
    assert hg.CharTokenizer.load(path).characters == CHARACTERS.characters


@pytest.mark.core
@pytest.mark.parametrize("positions", ["relative", "learned"])
def test_float64_requires_x64_and_parameters_stay_float32(positions):
    config = light_config(d_model=8, positions=positions, dtype="float64")
    with jax.enable_x64(True):
        drawn = nnx.eval_shape(lambda: hg.HourglassLM(config, rngs=nnx.Rngs(0)))
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(drawn))} == {jnp.dtype("float32")}
        model = make_model(config)
        assert forward(model, np.ones((1, 4), int)).dtype == jnp.float64
        hg.check_causality(model)
    with jax.enable_x64(False):
        for call in (lambda: model([[1]]), lambda: generated(model), lambda: hg.evaluate(model, [1, 2], block_size=1)):
            with pytest.raises(hg.UsageError, match="JAX_ENABLE_X64=1"):
                call()
