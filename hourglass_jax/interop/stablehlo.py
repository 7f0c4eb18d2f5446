"""Export of a model as StableHLO programs, which JAX runs without this library, on CPUs, GPUs and TPUs.

score.jax, start.jax, step.jax   the programs, serialized by `jax.export`; see `export_stablehlo`
programs.json                    their inputs and outputs in order; `cache.history` is the entry `history` of `cache`
parameters.npz                   parameters by the names of `interop.parameters`
config.json, vocab.json          as in `interop.safetensors`
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from hourglass_jax.checks import check_tokenizer
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import score
from hourglass_jax.files import whole_directory, write_whole
from hourglass_jax.generation import init_cache
from hourglass_jax.interop.parameters import build_model, named_parameters
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import Tokenizer
from hourglass_jax.training.run import Record, Run

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAMS, PARAMETERS = "programs.json", "parameters.npz"
SIGNATURES = {  # names of arguments and results
    "score": (("parameters", "tokens"), ("log_probabilities",)),
    "start": ((), ("cache",)),
    "step": (("parameters", "tokens", "cache"), ("logits", "cache")),
}

Arrays = Mapping[str, Any]


def export_stablehlo(
    directory: str | Path,
    model: HourglassLM,
    tokenizer: Tokenizer | None = None,
    *,
    batch: int = 1,
    max_length: int | None = None,
) -> None:
    """Write the programs of a model to a new directory.

    score(parameters, tokens) -> log_probabilities: int32 [b, l] -> [b, l - 1], see `hg.score`. b is any number, l too
        if boundaries are fixed and attention is full; otherwise l is `max_length` + 1.
    start() -> cache: an empty cache. A cache, like `parameters`, is a dictionary of arrays.
    step(parameters, tokens, cache) -> (logits, cache): int32 [batch] -> [batch, V], see `HourglassLM.step`. A model
        that does not decode has neither this nor `start`.

    max_length: tokens that a cache holds, prompt included; default: that of the configuration.

    Raises UsageError without flatbuffers, unless `directory` is empty or absent, and for a model with causal=False.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UsageError("jax.export requires flatbuffers; pip install -e '.[stablehlo]'")
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config)
    max_length = model.config.max_length if max_length is None else max_length
    plain = model.reconfigured(dataclasses.replace(model.config, attention="plain"))  # the same on every platform
    with whole_directory(Path(directory)) as temporary:
        descriptions = {}
        for name, (function, inputs) in functions(plain, batch, max_length).items():
            program = export.export(jax.jit(function, keep_unused=True), platforms=PLATFORMS)(*inputs)
            (temporary / f"{name}.jax").write_bytes(program.serialize())
            descriptions[name] = describe(program, *SIGNATURES[name])
        write_whole(temporary / PROGRAMS, json.dumps(descriptions, indent=1) + "\n")
        parameters: dict[str, Any] = named_parameters(model)
        np.savez(temporary / PARAMETERS, **parameters)
        Run(temporary).write(Record(model.config, tokenizer, settings={}, history=[]))


def functions(model: HourglassLM, batch: int, max_length: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return the function of each program, and its inputs or their shapes."""
    config, parameters = model.config, named_parameters(model)

    def with_parameters(parameters: Arrays) -> HourglassLM:
        return build_model(config, parameters, "parameters")

    def score_tokens(parameters: Arrays, tokens: jax.Array) -> jax.Array:
        return score(with_parameters(parameters), tokens)

    any_length = config.token_attention == "full" and not config.event_levels
    limits = [f"l <= {config.max_length}"] if any_length and config.positions == "learned" else []
    shape = export.symbolic_shape("b, l" if any_length else f"b, {max_length + 1}", constraints=limits)
    scoring = {"score": (score_tokens, (parameters, jax.ShapeDtypeStruct(shape, jnp.int32)))}
    if not config.decodes:
        return scoring
    empty = init_cache(model, batch, max_length)
    names, structure = list(named(empty)), jax.tree.structure(empty)

    def start() -> Arrays:
        return named(init_cache(model, batch, max_length))

    def step(parameters: Arrays, tokens: jax.Array, cache: Arrays) -> tuple[jax.Array, Arrays]:
        before = jax.tree.unflatten(structure, [cache[name] for name in names])
        logits, after = with_parameters(parameters).step(tokens, before)
        return logits, named(after)

    inputs = parameters, jax.ShapeDtypeStruct((batch,), jnp.int32), named(empty)
    return scoring | {"start": (start, ()), "step": (step, inputs)}


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def describe(program: export.Exported, arguments: Sequence[str], results: Sequence[str]) -> dict[str, Any]:
    """Return name, shape and dtype of each input and output of a program, in its order."""

    def arrays(names: Sequence[str], values: Sequence[Any]) -> list[dict[str, Any]]:
        leaves = [pair for name, value in zip(names, values, strict=True) for pair in named({name: value}).items()]
        return [{"name": name, "shape": list(map(size, leaf.shape)), "dtype": str(leaf.dtype)} for name, leaf in leaves]

    def size(dimension: Any) -> int | str:
        return dimension if isinstance(dimension, int) else str(dimension)

    inputs, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    return {"inputs": arrays(arguments, inputs), "outputs": arrays(results, outputs if len(results) > 1 else [outputs])}
