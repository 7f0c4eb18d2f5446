"""What the tests share: the grid of methods, small models, fast compilation."""

import itertools
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hourglass_jax as hg
from hourglass_jax import HourglassConfig, HourglassLM
from hourglass_jax.prompts import AlignedPrompts
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS

POSITIONS = ("relative", "rotary", "learned")


def slow_unless(quick):
    return () if quick else pytest.mark.slow


# Quick is one of each. At fixed boundaries there is nothing to smooth, so that this is repeating without a norm: slow.
PAIRS = list(itertools.product(enumerate(SHORTENINGS), enumerate(UPSAMPLINGS)))
RESAMPLINGS = [pytest.param(down, up, marks=slow_unless(i == j)) for (i, down), (j, up) in PAIRS]
METHODS = [
    pytest.param(down, up, positions, marks=slow_unless(i == j and n == i % len(POSITIONS)))
    for (i, down), (j, up) in PAIRS
    for n, positions in enumerate(POSITIONS)
]
NESTED = "0@1 1@2 1@6 0@2 1@1"  # two shortenings with few layers, all unequal: for the grid of methods
# No shortening, equal and unequal layers before and after, one to three shortenings.
HIERARCHIES = ("2@1", "1@1 1@3 1@1", "1@1 1@2 1@6 0@2 2@1", "0@1 1@2 0@4 1@8 1@4 0@2 1@1")
# Three shortenings take long to compile.
EVERY_HIERARCHY = [*HIERARCHIES[:-1], pytest.param(HIERARCHIES[-1], marks=pytest.mark.slow)]


# The older code generator of XLA:CPU compiles small programs three times as fast.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """Sets what workers and launchers inherit: QUICK_FLAGS, if this release of XLA knows them, and one place for
    compiled programs, which many tests have in common."""
    if hasattr(config, "workerinput"):
        return
    if "XLA_FLAGS" not in os.environ:
        environment = os.environ | {"XLA_FLAGS": QUICK_FLAGS}
        probe = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(probe, env=environment, capture_output=True).returncode == 0:
            os.environ["XLA_FLAGS"] = QUICK_FLAGS
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = tempfile.TemporaryDirectory(prefix="compiled-")
        config.add_cleanup(compiled.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


TESTS_A_CACHE = 50
finished = itertools.count(1)


@pytest.fixture(autouse=True)
def clear_caches():
    """Every compiled program holds memory maps, of which a process may have 65,530: too few for the slow grid."""
    yield
    if next(finished) % TESTS_A_CACHE == 0:
        jax.clear_caches()


forward = nnx.jit(lambda model, tokens, key=None: model(tokens, key))


@nnx.jit
def run_cached(model, read, start, tokens):
    """Logits of every row's position, first in one pass, then token by token."""
    cache = hg.init_cache(model, len(tokens), read.shape[1] + tokens.shape[1])
    passed, cache = model.prefill(read, start, cache)

    def step(cache, _):
        length = jnp.minimum(cache.clock.time - cache.clock.origin, tokens.shape[1] - 1)
        logits, cache = model.step(tokens[jnp.arange(len(tokens)), length], cache)
        return cache, logits

    _, stepped = jax.lax.scan(step, cache, length=tokens.shape[1])
    return passed, stepped.swapaxes(0, 1)


@pytest.fixture(scope="module")
def quick_compile():
    """For the sweeps: XLA's optimisations would take longer than what they speed up. On to the end of a file."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def forgotten_padding(monkeypatch):
    """The prompts of a batch, as if none had padding before it."""
    align = AlignedPrompts.align.__func__

    def forgetful(*arguments):
        aligned = align(*arguments)
        aligned.start[:] = 0
        return aligned

    monkeypatch.setattr(AlignedPrompts, "align", classmethod(forgetful))


def small_config(**options) -> HourglassConfig:
    defaults = {"vocab_size": 11, "hierarchy": "1@1 1@3 1@1", "d_model": 16, "n_heads": 2, "d_ff": 32}
    return HourglassConfig(**(defaults | {"max_length": 64} | options))


def light_config(**options) -> HourglassConfig:
    """For laws that are of other things than the model: a training of it compiles much sooner."""
    return small_config(**{"hierarchy": "0@1 1@2 0@1", "shortening": "average", "upsampling": "repeat"} | options)


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
