"""The README's shortening method, defined outside of the package, works wherever the package's own do."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import forward, make_model, small_config
from flax import nnx
from launching import METHOD, run_forked

import hourglass_jax as hg
from hourglass_jax.costs import count_parameters, decoding_flops, forward_flops
from hourglass_jax.nn.resampling import AttentionShortening, AverageShortening, Shortening, Upsampling
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS
from hourglass_jax.training.step import TrainState, make_train_step


@pytest.fixture(scope="module", autouse=True)
def gated():
    """The method is known to this module's tests alone."""
    known = dict(SHORTENINGS)
    exec(METHOD, {"__name__": "method"})
    SHORTENINGS["attention_gated"] = partial(AttentionShortening, pool=SHORTENINGS["gated"])
    yield SHORTENINGS["gated"]
    SHORTENINGS.clear()
    SHORTENINGS.update(known)


def test_the_method_is_twenty_lines():
    assert len(METHOD.splitlines()) <= 20


def test_registered_methods_are_valid_config_values():
    assert small_config(shortening="gated").shortening == "gated"
    with pytest.raises(hg.UsageError, match=r"choose one of average, .*, gated"):
        small_config(shortening="gate")


@pytest.mark.parametrize("shortening", ["gated", "attention_gated"])
def test_a_custom_method_is_causal_and_cached_logits_equal_full_forward(shortening):
    model = make_model(small_config(hierarchy="0@1 1@3 0@1", shortening=shortening, upsampling="repeat"))
    hg.check_causality(model)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2]]
    for prompt, new in zip(
        prompts, hg.generate(model, prompts, max_tokens=8, key=jax.random.key(0), temperature=0), strict=True
    ):
        text = np.zeros((1, 15), int)
        text[0, : len(prompt) + 8] = [*prompt, *new]
        likeliest = np.asarray(forward(model, text)[0].argmax(-1))
        np.testing.assert_array_equal(new, likeliest[len(prompt) - 1 : len(prompt) + 7])


def test_weights_of_a_custom_method_are_trained(gated):
    model = make_model(small_config(hierarchy="1@1 0@2 0@1", shortening="gated", upsampling="repeat"), scale=1)
    assert isinstance(model.hourglass.shorten, gated)
    before = np.asarray(model.hourglass.shorten.gate.kernel[...])
    graph, params = nnx.split(model)
    optimizer = optax.adam(1e-2)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    step = make_train_step(graph, optimizer, seed=0)
    tokens, losses = jnp.tile(jnp.arange(7), (4, 5)), []
    for _ in range(10):
        state, metrics = step(state, tokens, jnp.ones((4, 34)))
        losses.append(float(metrics["train_loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert np.abs(nnx.merge(graph, state.params).hourglass.shorten.gate.kernel[...] - before).max() > 1e-3


def xla_forward_flops(config, length):
    graph, params = nnx.split(nnx.eval_shape(lambda: hg.HourglassLM(config, rngs=nnx.Rngs(0))))
    program = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    return program.lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).cost_analysis()["flops"]


class MixingShortening(AverageShortening):
    """Its name says nothing of its cost: d_model x d_model a token."""

    def __init__(self, config, shorten_factor, tokens_per_position, *, rngs):
        self.mix = nnx.Linear(config.d_model, config.d_model, rngs=rngs)

    def __call__(self, x, groups, *, key=None):
        return super().__call__(jax.checkpoint(lambda x: self.mix(x))(x), groups)


@pytest.mark.parametrize("shortening", ["gated", "attention_gated", "mixing"])
def test_flops_of_a_custom_method_equal_the_compiled_program(shortening, monkeypatch):
    monkeypatch.setitem(SHORTENINGS, "mixing", MixingShortening)
    wide = partial(
        small_config, hierarchy="1@1 1@2 1@6 0@2 1@1", d_model=256, d_ff=256, positions="rotary", upsampling="repeat"
    )
    config, average = wide(shortening=shortening), wide(shortening="average")
    assert sum(forward_flops(config, 48).values()) == pytest.approx(xla_forward_flops(config, 48), rel=0.05)
    if shortening == "mixing":  # of 48 and 24 tokens
        assert sum(forward_flops(config, 48).values()) - sum(forward_flops(average, 48).values()) == 72 * 2 * 256**2
    assert all(map(math.isfinite, decoding_flops(config, 48).values()))
    per_shortening = {"gated": 257, "mixing": 257 * 256}.get(shortening)
    assert per_shortening is None or count_parameters(config) - count_parameters(average) == 2 * per_shortening


TINY = ["--hierarchy=1@1 1@2 1@1", "--d_model=16", "--n_heads=2", "--d_ff=16", "--block_size=16", "--batch_size=4"]
TINY += ["--steps=2", "--data_path=text.txt", "--shortening=gated"]


@pytest.mark.launchers
@pytest.mark.slow
def test_launchers_load_a_method_as_a_plugin(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 20)
    (tmp_path / "gated.py").write_text(METHOD)
    result = run_forked("pretrain", *TINY, "--plugin=gated.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "causal: yes" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("finetune.py --load_model_path=runs/pretrain --plugin=gated.py")
    flags = ["--load_model_path=runs/pretrain", "--data_path=text.txt", "--block_size=16"]
    result = run_forked("evaluate", *flags, "--plugin=gated.py", cwd=tmp_path)
    assert "BPC" in result.stdout, result.stderr


LEAKY = """
from hourglass_jax.nn.resampling import AverageShortening
from hourglass_jax.registry import SHORTENINGS


class Reversed(AverageShortening):
    def __call__(self, x, groups, *, key=None):
        return super().__call__(x[:, ::-1], groups)


SHORTENINGS["gated"] = Reversed
"""


@pytest.mark.launchers
def test_a_custom_method_that_leaks_raises_a_one_line_error(tmp_path):
    (tmp_path / "text.txt").write_text("a text to train on. " * 40)
    (tmp_path / "leaky.py").write_text(LEAKY)
    result = run_forked("pretrain", *TINY, "--hierarchy=0@1 1@2 0@1", "--plugin=leaky.py", cwd=tmp_path)
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("pretrain.py: error: ") and "depend" in line


class Unpooled(Shortening):
    def __call__(self, x, groups, *, key=None):
        return x


class Unspread(Upsampling):
    def __call__(self, x, short, groups, *, key=None):
        return short


@pytest.mark.parametrize("boundaries", ["fixed", "tokens"])
@pytest.mark.parametrize(
    "method, words",
    [
        (
            {"shortening": "odd", "upsampling": "repeat"},
            r"Unpooled returned \[2, 9, 16\]; it must return \[2, \d, 16\]",
        ),
        (
            {"shortening": "average", "upsampling": "odd"},
            r"Unspread returned \[2, \d, 16\]; it must return \[2, 9, 16\]",
        ),
    ],
)
def test_a_custom_method_with_a_wrong_output_shape_raises_a_one_line_error(monkeypatch, method, words, boundaries):
    monkeypatch.setitem(SHORTENINGS, "odd", Unpooled)
    monkeypatch.setitem(UPSAMPLINGS, "odd", Unspread)
    config = small_config(
        hierarchy="0@1 1@3 0@1", boundaries=boundaries, boundary_tokens=(1,), boundary_slack=1, **method
    )
    with pytest.raises(hg.UsageError, match=words):
        forward(make_model(config), np.zeros((2, 9), int))


@pytest.mark.launchers
def test_help_shows_the_shared_flags(tmp_path):
    shown = run_forked("pretrain", "--help", cwd=tmp_path).stdout
    assert all(f"--{flag}:" in shown for flag in ("plugin", "hierarchy", "out"))


@pytest.mark.launchers
@pytest.mark.parametrize(
    "plugin, words",
    [
        ([], "shortening='gated' is unknown"),
        (["--plugin=nowhere.py"], "nowhere.py: no such file"),
        (["--plugin=nowhere.methods"], "nowhere.methods: no such module"),
        (["--plugin=json.methods"], "json.methods: no such module"),
        (["--plugin=./methods"], "./methods: no such module"),
    ],
)
def test_a_missing_plugin_raises_a_one_line_error(plugin, words, tmp_path):
    (tmp_path / "text.txt").write_text("a text to train on. " * 40)
    result = run_forked("pretrain", *TINY, *plugin, cwd=tmp_path)
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("pretrain.py: error: ") and words in line
