"""Parameters of a model by dotted names, such as `hourglass.inner.pre.layers.attention.query.kernel`.

The first axis of an array in a stack is the layer; kernels are [in, out].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM


def named_parameters(model: HourglassLM) -> dict[str, np.ndarray]:
    """Return the parameters of a model by name."""
    return {name: np.asarray(leaf[...]) for name, leaf in _named(nnx.state(model, nnx.Param)).items()}


def build_model(
    config: HourglassConfig, tensors: Mapping[str, np.ndarray], source: object, *, add_biases: bool = False
) -> HourglassLM:
    """Build a model with these parameters, in evaluation mode. Errors name `source`.

    add_biases: sets biases to zero if no layer has them.

    Raises UsageError for missing and unknown tensors, and for other shapes and types.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))
    expected = _named(state)
    if add_biases:
        kinds = {_kind(name) for name in tensors}
        absent = [name for name in expected if name.endswith(".bias") and _kind(name) not in kinds]
        tensors = {**tensors, **{name: np.zeros(expected[name].shape, expected[name].dtype) for name in absent}}
    if missing := expected.keys() - tensors.keys():
        raise UsageError(f"{source}: lacks {listed(missing)}")
    if unknown := tensors.keys() - expected.keys():
        raise UsageError(f"{source}: has unknown parameters: {listed(unknown)}")
    for name, leaf in expected.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise UsageError(f"{source}: {name} is {found.dtype}{found.shape}, not {leaf.dtype}{leaf.shape}")
    placed = {path: leaf.replace(jnp.asarray(tensors[_dotted(path)])) for path, leaf in nnx.to_flat_state(state)}
    model = nnx.merge(graph, nnx.from_flat_state(placed))
    model.eval()
    return model


def listed(names: Iterable[str], at_most: int = 4) -> str:
    """Join the first names in alphabetical order, and append the number of others."""
    names = sorted(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _kind(name: str) -> str:
    """Return the name within a layer, such as `feed_forward.up.bias`."""
    return ".".join(name.split(".")[-3:])


def _named(state: nnx.State) -> dict[str, nnx.Param]:
    return {_dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}


def _dotted(path: Iterable[object]) -> str:
    return ".".join(map(str, path))
