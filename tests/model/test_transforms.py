"""The library under JAX's strict modes, and exported with symbolic sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import light_config, make_model, small_config
from flax import nnx
from jax import export

import hourglass_jax as hg
from hourglass_jax import UsageError
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.generation import Sampler
from hourglass_jax.objective import corrupt
from hourglass_jax.prompts import row_keys
from hourglass_jax.run_config import OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.step import first_state, make_train_step
from hourglass_jax.training.trainer import _Training, fit

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 20)).astype(np.int32)


@pytest.fixture
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def trace(config):
    """Traces, but does not compile, a training step and, where the model decodes, prefill and a step."""
    model = make_model(config)
    graph, params = nnx.split(model)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=2, decay_steps=3), 10)
    step = make_train_step(graph, optimizer, 0, accumulate=2)
    jax.eval_shape(lambda params: step(first_state(params, optimizer), TOKENS, jnp.ones((2, 19))), params)
    if config.decodes:

        def decode(params):
            model = nnx.merge(graph, params)
            cache = hg.init_cache(model, 2, 24)
            factor = config.shared_factor
            cache = model.prefill(TOKENS[:, : 2 * factor], jnp.array([0, factor], jnp.int32), cache)[1]
            return model.step(TOKENS[:, 0], cache)

        jax.eval_shape(decode, params)


STRICT = {
    "plain": {"attention": "plain", "positions": "learned", "shortening": "linear", "upsampling": "linear"},
    "fused": {"attention": "fused", "positions": "rotary", "dtype": "bfloat16"},
    "kernel": {"attention": "kernel", "shortening": "attention_linear", "upsampling": "attention_repeat"},
    "blocked": {"window": 3, "dtype": "bfloat16"},
    "bidirectional": {"causal": False},
    "lsh": {"token_attention": "lsh", "lsh_chunk": 4, "positions": "rotary"},
    **{
        rule: {"boundaries": rule, "shortening": "attention_average", "upsampling": up, "boundary_tokens": (1,)}
        for rule, up in {"router": "smooth", "gumbel": "attention", "entropy": "repeat", "tokens": "smooth"}.items()
    },
}


@pytest.mark.core
@pytest.mark.parametrize("options", STRICT.values(), ids=STRICT)
def test_strict_modes_accept_training_and_decoding(strict, options):
    trace(small_config(hierarchy="0@1 1@3 1@1", dropout=0.1, **options))


def export_score(attention, *shape):
    model = make_model(small_config(hierarchy="0@1 1@3 1@1", attention=attention))
    graph, params = nnx.split(model)
    score = jax.jit(lambda params, tokens: hg.score(nnx.merge(graph, params), tokens))
    tokens = jax.ShapeDtypeStruct(export.symbolic_shape(",".join(shape)), jnp.int32)
    return export.export(score)(params, tokens).call(params, TOKENS), score(params, TOKENS)


@pytest.mark.parametrize(("attention", "shape"), [("blocked", ("b", "20")), ("plain", ("b", "l"))])
def test_exported_program_with_symbolic_sizes_equals_the_call(attention, shape):
    np.testing.assert_allclose(*export_score(attention, *shape), atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "shape", "message"),
    [("blocked", ("1", "l"), "symbolic length"), ("kernel", ("b", "20"), "fixed batch size")],
)
def test_export_names_what_needs_fixed_sizes(attention, shape, message):
    with pytest.raises(UsageError, match=message):
        export_score(attention, *shape)


def test_training_decoding_and_evaluation_transfer_nothing_implicitly(monkeypatch, tmp_path):
    model = make_model(light_config(vocab_size=8), scale=1.0)
    text = np.arange(200, dtype=np.int32) % 8
    batches, validation = random_windows(text, 16, 4, seed=0), consecutive_windows(text, 16, 4)
    train_on, key = _Training.train_on, jax.random.key(0)
    monkeypatch.setattr(_Training, "train_on", lambda *arguments: guarded(train_on, *arguments))

    def guarded(function, *arguments, **options):
        with jax.transfer_guard("disallow"):
            return function(*arguments, **options)

    configs = OptimizerConfig(warmup_steps=2), TrainConfig(steps=12, eval_interval=6), RuntimeConfig(log="none")
    names = ("optimizer_config", "train_config", "runtime_config")
    fit(model, batches, validation, tmp_path, **dict(zip(names, configs, strict=True)))
    guarded(hg.evaluate, model, text, block_size=16)
    guarded(hg.generate, model, [[1, 2, 3], [1]], max_tokens=300, key=key, top_k=3, banned_tokens=[2])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_rows_draw_the_same_alone_and_in_a_batch_with_every_kind_of_key(impl):
    key = jax.random.key(0, impl=impl)
    logits = jnp.zeros((2, 1000))
    [_, together], [alone] = (Sampler()(logits[-n:], row_keys(key, [[1, 2], [3]][-n:])) for n in (2, 1))
    assert together == alone
    tokens = jnp.asarray(TOKENS)
    [_, together], [alone] = (corrupt(tokens[-n:], key, 11)[0] for n in (2, 1))
    np.testing.assert_array_equal(together, alone)
