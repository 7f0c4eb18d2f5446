"""The public names, their documentation, and an import that is light and changes nothing."""

import inspect
import os
import re
import subprocess
import sys

import pytest
from launching import ROOT

import hourglass_jax as hg

NAMES = [
    *("ByteTokenizer", "CausalityError", "CharTokenizer", "DataConfig", "Evaluation", "Hierarchy", "Hook", "Hourglass"),
    *(
        "HourglassConfig",
        "HourglassLM",
        "ImageTokenizer",
        "OptimizerConfig",
        "Run",
        "RuntimeConfig",
        "Shortening",
        "TrainConfig",
        "Upsampling",
        "UsageError",
    ),
    *(
        "at_shorten_factor",
        "check_causality",
        "evaluate",
        "evaluate_sliding",
        "fit",
        "generate",
        "group_ends",
        "init_cache",
        "load",
        "load_pretrained",
        "save",
        "score",
    ),
    "summary",
]
MODULES = ["costs", "data", "interop", "nn", "registry", "training"]


def test_completion_offers_the_names_that_matter():
    assert hg.__all__ == NAMES
    assert set(dir(hg)) == {*NAMES, *MODULES, "__version__"}
    assert all(inspect.ismodule(getattr(hg, name)) for name in MODULES)
    assert not any(inspect.ismodule(getattr(hg, name)) for name in NAMES)


@pytest.mark.parametrize("name", NAMES + MODULES)
def test_the_package_introduces_each_name_and_each_has_a_docstring_of_its_own(name):
    assert re.search(rf"\b{name}\b", hg.__doc__)
    documented = getattr(hg, name).__doc__ or ""
    assert len(documented.split()) >= 5 and not documented.startswith(f"{name}(")  # the signature, as dataclasses add


def members(owner):
    """Public methods and properties that the class itself defines."""
    for name, member in vars(owner).items():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            yield name, inspect.getdoc(member)


CLASSES = [name for name in NAMES if inspect.isclass(getattr(hg, name))]


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_say_what_they_do(name):
    silent = [member for member, documented in members(getattr(hg, name)) if not documented]
    assert not silent


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("Config")])
def test_configurations_explain_every_field(name):
    config = getattr(hg, name)
    explained = re.findall(r"^([\w, ]+):", inspect.cleandoc(config.__doc__), re.M)
    explained = {field for fields in explained for field in fields.split(", ")}
    missing = [field for field in config.__dataclass_fields__ if field not in explained]
    assert not missing


@pytest.mark.parametrize(
    "name, words",
    [
        ("HourglassLM", ["[B, L]", "[B, L, vocab_size]", "UsageError"]),
        ("score", ["[B, L + 1]"]),
        ("generate", ["max_tokens", "temperature", "stop_token", "UsageError"]),
        ("evaluate", ["[N]", "block_size", "UsageError"]),
        ("evaluate_sliding", ["[N]", "UsageError"]),
        ("load", ["model, tokenizer, config", "UsageError"]),
        ("summary", ["length", "UsageError"]),
        ("check_causality", ["length", "CausalityError"]),
        ("at_shorten_factor", ["UsageError"]),
        ("group_ends", ["[L]", "[S, L]", "UsageError"]),
        ("save", ["tokenizer", "UsageError"]),
        ("fit", ["UsageError"]),
        ("init_cache", ["batch", "max_length", "UsageError"]),
    ],
)
def test_help_has_shapes_units_and_errors(name, words):
    missing = [word for word in words if word not in inspect.getdoc(getattr(hg, name))]
    assert not missing


PROBE = """
import logging, os, random, sys, warnings
import absl.flags, absl.logging, flax.nnx, jax, matplotlib, numpy, tqdm
from jax._src import xla_bridge

def state():
    return (
        dict(os.environ), os.getcwd(), list(sys.path), list(warnings.filters), random.getstate(),
        numpy.random.get_state()[1].tolist(), numpy.geterr(), dict(jax.config.values), dict(matplotlib.rcParams),
        set(absl.flags.FLAGS), list(logging.root.handlers), logging.root.level, xla_bridge.backends_are_initialized(),
    )

of_others = set(sys.modules)
before = state()
import hourglass_jax
heavy = {"fcntl", "grain", "optax", "orbax", "resource", "safetensors", "tensorboardX"} & sys.modules.keys()
assert not heavy - of_others, heavy
assert state() == before and not xla_bridge.backends_are_initialized()

# What this would have noticed.
numpy.random.seed(0)
assert state() != before
jax.devices()
assert xla_bridge.backends_are_initialized()
"""


@pytest.mark.launchers
def test_the_import_prints_nothing_and_changes_nothing():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROBE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


RESULTS = [
    path
    for directory in ("experiments/results", "hourglass_jax/weights")
    for path in sorted((ROOT / directory).rglob("*"))
    if path.suffix in (".json", ".md")
]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_committed_result_says_where_it_was_made(path):
    assert not re.search(r"/(root|home|Users|work|tmp|usr|opt)/", path.read_text())
