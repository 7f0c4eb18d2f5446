"""JAX's strict modes, transfer guard and export, around the library's calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx
from jax import export

import hourglass_jax as hg
from hourglass_jax import UsageError
from hourglass_jax.run_config import OptimizerConfig
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.step import first_state, make_train_step

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
    **{name: {"attention": name} for name in ("plain", "fused", "kernel")},
    **{positions: {"positions": positions, "dtype": "bfloat16"} for positions in ("relative", "rotary", "learned")},
    "window": {"window": 3, "hierarchy": "2@1"},
    "bidirectional": {"causal": False},
    "linear": {"shortening": "linear", "upsampling": "linear"},
    "pooled": {"shortening": "attention_linear", "upsampling": "attention_repeat"},
    "lsh": {"token_attention": "lsh", "lsh_chunk": 4, "positions": "rotary"},
    **{
        rule: {"boundaries": rule, "shortening": "attention_average", "upsampling": up, "boundary_tokens": (1,)}
        for rule, up in {"router": "smooth", "gumbel": "attention", "entropy": "repeat", "tokens": "smooth"}.items()
    },
}


@pytest.mark.parametrize("options", STRICT.values(), ids=STRICT)
def test_strict_modes_accept_training_and_decoding(strict, options):
    trace(small_config(dropout=0.1, **options))


def exported(model, function, *shape):
    graph, params = nnx.split(model)
    tokens = jax.ShapeDtypeStruct(export.symbolic_shape(",".join(shape)), jnp.int32)
    program = export.export(jax.jit(lambda params, tokens: function(nnx.merge(graph, params), tokens)))(params, tokens)
    return lambda tokens: program.call(params, tokens)


def forward(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("function", [forward, hg.score])
@pytest.mark.parametrize(("attention", "shape"), [("blocked", ("b", "20")), ("plain", ("b", "l"))])
def test_exported_program_with_symbolic_sizes_equals_the_call(attention, shape, function):
    model = make_model(small_config(attention=attention))
    np.testing.assert_allclose(exported(model, function, *shape)(TOKENS), nnx.jit(function)(model, TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "shape", "message"),
    [("blocked", ("1", "l"), "symbolic length"), ("kernel", ("b", "20"), "fixed batch size")],
)
def test_export_names_what_needs_fixed_sizes(attention, shape, message):
    with pytest.raises(UsageError, match=message):
        exported(make_model(small_config(attention=attention)), hg.score, *shape)
