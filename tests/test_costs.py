"""What costs.py counts by hand agrees with XLA's own count of the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from conftest import small_config
from flax import nnx

from hourglass_jax import HourglassLM
from hourglass_jax.costs import decoding_flops

METHODS = [
    ("attention_average", "attention_linear", "relative"),
    ("linear", "linear", "rotary"),
    ("average", "repeat", "learned"),
    ("attention_linear", "attention", "learned"),
]


def abstract(config):
    return nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("hierarchy", ["6@1", "2@1 4@4 2@1", "2@1 1@2 4@4 1@2 2@1"])
@pytest.mark.parametrize("shortening, upsampling, positions", METHODS)
def test_decoding_flops_of_all_levels_are_those_of_the_program(hierarchy, shortening, upsampling, positions):
    options = {"shortening": shortening, "upsampling": upsampling, "positions": positions}
    config = small_config(hierarchy=hierarchy, vocab_size=256, d_model=256, n_heads=8, d_ff=1024, **options)
    graph, params = abstract(config)
    cache = jax.eval_shape(lambda params: nnx.merge(graph, params).init_cache(1, 512), params)
    step = jax.jit(lambda params, token, cache: nnx.merge(graph, params).step(token, cache))
    program = step.lower(params, jax.ShapeDtypeStruct((1,), jnp.int32), cache).compile()
    # XLA counts a branch as if it were taken: here, as at the first token of a group, which runs every level.
    assert sum(decoding_flops(config, 512).values()) == pytest.approx(program.cost_analysis()["flops"], rel=0.03)
