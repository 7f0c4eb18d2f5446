"""What the tests share: the grid of methods, small models, fast compilation."""

import functools
import gc
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from flax import nnx

import hourglass_jax as hg
from hourglass_jax import HourglassConfig, HourglassLM
from hourglass_jax.prompts import AlignedPrompts
from hourglass_jax.registry import BOUNDARIES, SHORTENINGS, UPSAMPLINGS

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


# Each option of the modern recipe alone, and all together.
MODERN = {
    "rms": {"normalization": "rms"},
    "qk_norm": {"qk_norm": True},
    "relu_squared": {"activation": "relu_squared"},
    "swiglu": {"activation": "swiglu"},
    "residual_init": {"residual_init": "zero"},
    "softcap": {"logit_softcap": 1.5},
    "input_residual": {"input_residual": True},
    "ngrams": {"ngram_sizes": (2, 3), "ngram_buckets": 13},
    "widths": {"d_model": (16, 24), "n_heads": (2, 3), "d_ff": (32, 48)},
    "windows": {"window": (4, 2)},
}
MODERN["together"] = {name: value for options in MODERN.values() for name, value in options.items()}

EXPERIMENTS = Path(__file__).with_name("experiments")
# The older code generator of XLA:CPU compiles small programs three times as fast, and one module faster than 32 parts.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# Most programs run once: the optimizations take longer to compile than they save.
SETTINGS = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}
CACHE_BYTES = 500_000_000


def pytest_configure(config):
    """Set how workers and launchers compile: quickly, and into one cache that is kept between runs."""
    if hasattr(config, "workerinput"):
        return
    if "XLA_FLAGS" not in os.environ and knows_quick_flags():
        os.environ["XLA_FLAGS"] = QUICK_FLAGS
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or compile_cache(config)
    for name, value in (SETTINGS | {"jax_compilation_cache_dir": cache}).items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def knows_quick_flags():
    """Return whether this release of XLA accepts QUICK_FLAGS: unknown flags end the process."""
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(probe, env=os.environ | {"XLA_FLAGS": QUICK_FLAGS}, capture_output=True).returncode == 0


def compile_cache(config):
    """Return a directory for compiled programs: in pytest's cache, or a temporary one where that is read-only."""
    kept = config.rootpath / ".pytest_cache" / "compiled" / jaxlib.__version__
    try:
        if kept.parent.exists() and sum(path.stat().st_size for path in kept.parent.rglob("*")) > CACHE_BYTES:
            shutil.rmtree(kept.parent)
        kept.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=kept).close()
    except OSError:
        temporary = tempfile.TemporaryDirectory(prefix="compiled-")
        config.add_cleanup(temporary.cleanup)
        return temporary.name
    return str(kept)


def pytest_xdist_auto_num_workers(config):
    """Run in this process where the command names a file or a test: workers take seconds to start."""
    named = [argument for argument in config.args if ".py" in argument]
    return 0 if named else None


def pytest_ignore_collect(collection_path, config):
    """Import no launcher where -m deselects all of them."""
    return True if collection_path == EXPERIMENTS and "not launchers" in config.option.markexpr else None


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items):
    for item in items:
        if EXPERIMENTS in item.path.parents:
            item.add_marker(pytest.mark.launchers)


def pytest_collection_finish():
    """Exempt modules from garbage collection, which takes a tenth of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


TESTS_A_CACHE = 100
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


@pytest.fixture
def optimized():
    """Compile with XLA's optimizations, as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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


def event_config(**options) -> HourglassConfig:
    """Return a config whose groups end at the tokens 0, 1 and 2."""
    defaults = {"boundaries": "whitespace", "boundary_tokens": (0, 1, 2), "shortening": "average"}
    return small_config(**(defaults | {"upsampling": "repeat"} | options))


def learned_config(boundaries="router", **options) -> HourglassConfig:
    defaults = {"shortening": "select", "upsampling": "smooth", "boundary_slack": 3.0}
    return small_config(**(defaults | {"boundaries": boundaries} | options))


def tokens_of(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 11, shape)


@functools.cache
def abstract_model(config, *methods):
    """Return the graph and abstract parameters of a model; `methods` are those that the names in its config mean."""
    return nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))


def make_model(config: HourglassConfig, seed: int = 0, scale: float = 5.0) -> HourglassLM:
    """A model with weights `scale` times their usual size, so that no path is too faint to test.

    Drawn by NumPy, biases and norm scales too: to compile the initialisation would take longer than most tests.
    """
    rng = np.random.default_rng(seed)
    boundaries = (BOUNDARIES.get(name) for name in config.boundaries_by_level)
    methods = SHORTENINGS[config.shortening], UPSAMPLINGS[config.upsampling], *boundaries
    graph, parameters = abstract_model(config, *methods)

    def draw(path, leaf):
        mean = 1.0 if path[-2].key in ("scale", "input_scales") else 0.0
        return jnp.asarray(rng.normal(mean, 0.02 * scale, leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree.map_with_path(draw, parameters))
