"""What the tests share: the grid of methods, small models, fast compilation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hourglass_jax import HourglassConfig, HourglassLM
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS

POSITIONS = ("relative", "rotary", "learned")
METHODS = list(itertools.product(SHORTENINGS, UPSAMPLINGS, POSITIONS))
# No shortening, equal and unequal layers before and after, one to three shortenings.
HIERARCHIES = ("2@1", "1@1 1@3 1@1", "1@1 1@2 1@6 0@2 2@1", "0@1 1@2 0@4 1@8 1@4 0@2 1@1")


forward = nnx.jit(lambda model, tokens, key=None: model(tokens, key))


@pytest.fixture
def quick_compile():
    """For the sweeps: XLA's optimisations would take longer than what they speed up."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small_config(**options) -> HourglassConfig:
    defaults = {"vocab_size": 11, "hierarchy": "1@1 1@3 1@1", "d_model": 16, "n_heads": 2, "d_ff": 32}
    return HourglassConfig(**(defaults | {"max_length": 64} | options))


def make_model(config: HourglassConfig, seed: int = 0, scale: float = 5.0) -> HourglassLM:
    """A model with weights `scale` times their usual size, so that no path is too faint to test.

    Drawn by NumPy, biases and norm scales too: to compile the initialisation would take longer than most tests.
    """
    rng = np.random.default_rng(seed)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        mean = 1.0 if path[-2].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.02 * scale, leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree.map_with_path(draw, parameters))
