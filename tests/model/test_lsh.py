"""LSH attention, against its formula one position at a time; and that it is not strictly causal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx
from jax.test_util import check_grads
from launching import run_forked
from layouts import planes, write_binary

import hourglass_jax as hg
from experiments.common.sources import ImageSource, TextSource
from hourglass_jax.costs import decoding_flops, forward_flops
from hourglass_jax.nn.attention.lsh import EVALUATION_SEED, LSHAttention, lsh_attention
from hourglass_jax.nn.positions import rotate
from hourglass_jax.training.signals import Signals

LSH = {"token_attention": "lsh", "positions": "rotary", "lsh_chunk": 4}
attend = jax.jit(lsh_attention, static_argnums=3)


def draw(length, n_rounds, n_pairs, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(2, length, 2, 6)),
        rng.normal(size=(2, length, 2, 6)),
        rng.normal(size=(6, n_rounds, n_pairs)),
    )


def naive(qk, v, rotations, chunk):
    """[L, K] of one head: sorted in Python, a query and a key at a time."""
    length, size = qk.shape
    padded, n_rounds = -(-length // chunk) * chunk, rotations.shape[1]
    line = []  # times in the order of all rounds; those of padding are None
    for r in range(n_rounds):
        projected = qk @ rotations[:, r]
        buckets = np.concatenate([projected, -projected], axis=1).argmax(1)
        line += sorted(range(length), key=lambda t, b=buckets: (b[t], t)) + [None] * (padded - length)
    n_chunks, outs = len(line) // chunk, [[] for _ in range(length)]
    for place, t in enumerate(line):
        if t is None:
            continue
        near = [c * chunk + i for c in (place // chunk, (place // chunk - 1) % n_chunks) for i in range(chunk)]
        terms = []
        for j in (line[n] for n in near):
            if j is not None and j <= t:
                k = qk[j] / np.sqrt((qk[j] ** 2).mean() + 1e-6)
                terms.append((qk[t] @ k / np.sqrt(size) if j < t else -1e5, v[j]))
        scores = np.array([s for s, _ in terms])
        total = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        outs[t].append((total, sum(np.exp(s - total) * x for s, x in terms)))
    result = np.zeros_like(v)
    for t, rounds in enumerate(outs):
        totals = np.array([total for total, _ in rounds])
        shares = np.exp(totals - totals.max())
        result[t] = sum(share * out for share, (_, out) in zip(shares / shares.sum(), rounds, strict=True))
    return result


@pytest.mark.core
@pytest.mark.parametrize("length, n_rounds, n_pairs, chunk", [(13, 2, 3, 4), (5, 1, 1, 8)])
def test_lsh_attention_equals_the_formula(length, n_rounds, n_pairs, chunk):
    qk, v, rotations = draw(length, n_rounds, n_pairs)
    with jax.enable_x64(True):
        out = np.asarray(attend(*map(jnp.asarray, (qk, v, rotations)), chunk))
    for b, h in np.ndindex(2, 2):
        np.testing.assert_allclose(out[b, :, h], naive(qk[b, :, h], v[b, :, h], rotations, chunk), atol=1e-9)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_an_lsh_layer_equals_the_formula_on_its_projections(positions):
    options = {"lsh_chunk": 4, "lsh_hashes": 3, "positions": positions, "dtype": "float64"}
    x = np.random.default_rng(1).normal(size=(2, 13, 16))
    with jax.enable_x64(True):
        config = small_config(hierarchy="1@1", token_attention="lsh", **options)
        layer = LSHAttention(config.at_level(0), rngs=nnx.Rngs(0))
        kernels = (np.asarray(part.kernel[...], np.float64) for part in (layer.query, layer.value))
        qk, v = (np.einsum("bld,dk->blk", x, kernel).reshape(2, 13, 2, 8) for kernel in kernels)
        if positions == "rotary":
            qk = np.asarray(rotate(jnp.asarray(qk), jnp.arange(13)))
        rotations = np.asarray(jax.random.normal(jax.random.key(EVALUATION_SEED), (8, 3, 13 // 4), jnp.float32))
        heads = np.stack([[naive(qk[b, :, h], v[b, :, h], rotations, 4) for h in range(2)] for b in range(2)])
        joined = heads.transpose(0, 2, 1, 3).reshape(2, 13, 16)
        expected = joined @ np.asarray(layer.out.kernel[...]) + np.asarray(layer.out.bias[...])
        out = jax.jit(lambda x: layer(x[:, :, None], None)[:, :, 0])(jnp.asarray(x))
    np.testing.assert_allclose(out, expected, atol=1e-9)


def test_lsh_gradients_equal_finite_differences():
    qk, v, rotations = draw(9, 2, 2)
    with jax.enable_x64(True):
        check_grads(lambda qk, v: attend(qk, v, jnp.asarray(rotations), 4), map(jnp.asarray, (qk, v)), 1, ["rev"])


def test_lsh_is_not_strictly_causal_though_gradients_are():
    """The control: in one chunk, where nothing can be crowded out, they do not."""
    qk, v, rotations = (x.astype(np.float32) for x in draw(32, 1, 4))
    changed = qk.copy()
    changed[:, -1] = -changed[:, -1] + 1
    for chunk, moves in ((4, True), (32, False)):
        a, b = (np.asarray(attend(q, v, rotations, chunk)) for q in (qk, changed))
        assert (np.abs(a - b)[:, :-1] > 1e-4).any() == moves


def test_lsh_models_reject_unsupported_operations():
    model = make_model(small_config(hierarchy="1@1", **LSH))
    with pytest.raises(hg.CausalityError, match="not strictly causal: no prediction attends to a later token"):
        hg.check_causality(model, length=9)  # after no derivative was found to leak
    with pytest.raises(hg.UsageError, match="does not support decoding") as error:
        hg.generate(model, [np.arange(5)], max_tokens=2, key=jax.random.key(0))
    assert "\n" not in str(error.value)
    for ask in (lambda: hg.init_cache(model, 1, 8), lambda: decoding_flops(model.config, 8)):
        with pytest.raises(hg.UsageError, match="does not support decoding"):
            ask()


def test_training_with_lsh_draws_no_samples(tmp_path):
    write_binary(tmp_path / "images", planes(4, 32), planes(2, 32, seed=1))
    images = ImageSource(hg.DataConfig(dataset="cifar10", path=str(tmp_path / "images"), image_size=8, batch_size=2))
    text = TextSource(hg.DataConfig(block_size=16, batch_size=2))
    for source in (images, text):
        config = small_config(hierarchy="1@1", vocab_size=source.tokenizer.vocab_size, **LSH)
        _, sample = source.sampler(config, 0, tmp_path, Signals())
        assert sample(make_model(config)).startswith("(none: token_attention='lsh' does not support decoding")


@pytest.mark.launchers
def test_launchers_train_lsh_models_and_report_noncausality(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 20)
    flags = ["--hierarchy=1@1", "--d_model=16", "--n_heads=2", "--d_ff=16", "--block_size=24", "--batch_size=4"]
    flags += ["--steps=2", "--data_path=text.txt", "--positions=rotary", "--model.token_attention=lsh"]
    result = run_forked("pretrain", *flags, "--model.lsh_chunk=8", "--dropout=0.1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "causal: not strictly" in result.stdout and "not strictly causal: no prediction" in result.stderr
    assert "does not support decoding" in result.stdout
    result = run_forked("evaluate", "--load_model_path=runs/pretrain", "--data_path=text.txt", cwd=tmp_path)
    assert result.returncode == 0 and "BPC" in result.stdout, result.stderr


def test_invalid_lsh_options_raise_errors():
    for options, message in (
        ({"positions": "relative"}, "relative"),
        ({"window": 4}, "window=4"),
        ({"hierarchy": "1@1 1@3 1@1", "window": (0, 4)}, r"window=\(0, 4\)"),
        ({"lsh_chunk": 0}, "chunk"),
    ):
        with pytest.raises(hg.UsageError, match=message):
            small_config(**(LSH | options))
    small_config(hierarchy="1@1 1@3 1@1", window=(0, 0), **LSH)


def test_lsh_costs_grow_linearly_with_length():
    def growth(**options):
        config = small_config(hierarchy="2@1", d_model=64, **options)
        short, long = (sum(forward_flops(config, n).values()) / n for n in (4096, 8192))
        return long / short

    assert growth(**LSH | {"lsh_chunk": 256}) < 1.05 < 1.5 < growth(positions="rotary")
