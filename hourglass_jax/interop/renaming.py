"""From a PyTorch state dict to this library's parameters, by a table of substitutions.

A table is a sequence of (pattern, replacement), applied to each name one after the other. Out comes one of this
library's names, but with PyTorch's endings and layers apart: `hourglass.inner.pre.layers.3.attention.query.weight`.
Attention may also have a matrix for each head, `attention.heads.2.query`, or one for several projections,
`attention.qkv` or `attention.kv`. What is no parameter gets an empty name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hourglass_jax.errors import UsageError
from hourglass_jax.interop.parameters import listed

Tensors = dict[str, np.ndarray]
Table = Sequence[tuple[str, str]]
FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}  # their outputs, one after the other
HEADS = re.compile(r"(.*\.attention\.heads)\.(\d+)\.(.*)")
LAYERS = re.compile(r"(.*\.layers)\.(\d+)\.(.*)")


def rename(state: Mapping[str, np.ndarray], table: Table, source: object) -> Tensors:
    """Names unknown to the table stay. Raises UsageError where two tensors get one name."""
    named: Tensors = {}
    for original, tensor in state.items():
        name = original
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        if name in named:
            raise UsageError(f"{source}: {original} is a second {name}")
        if name:
            named[name] = tensor
    return named


def count_heads(named: Tensors) -> int | None:
    """Heads a layer, where each has matrices of its own."""
    numbers = [int(match[2]) for match in map(HEADS.fullmatch, named) if match]
    return max(numbers) + 1 if numbers else None


def assemble(named: Tensors, source: object) -> Tensors:
    """Renamed tensors as `parameters.build_model` takes them.

    Raises UsageError where a layer lacks what others of its stack have, or differs from them in shape.
    """
    named = _gather(named, HEADS, np.concatenate, source)
    named = {name.replace(".heads.", "."): tensor for name, tensor in named.items()}
    named = {name: part for item in named.items() for name, part in _split(*item)}
    return _gather(dict(_to_flax(*item) for item in named.items()), LAYERS, np.stack, source)


def _gather(
    named: Tensors, pattern: re.Pattern[str], join: Callable[[list[np.ndarray]], np.ndarray], source: object
) -> Tensors:
    """Joins the tensors whose names differ in the number that `pattern` finds alone, in its order."""
    parts: dict[tuple[str, str], dict[int, np.ndarray]] = defaultdict(dict)
    counts: dict[str, int] = defaultdict(int)  # by the part of the name before the number
    joined = {}
    for name, tensor in named.items():
        if match := pattern.fullmatch(name):
            before, number, after = match[1], int(match[2]), match[3]
            parts[before, after][number] = tensor
            counts[before] = max(counts[before], number + 1)
        else:
            joined[name] = tensor
    for (before, after), numbered in parts.items():
        if missing := set(range(counts[before])) - numbered.keys():
            raise UsageError(f"{source}: lacks {listed(f'{before}.{number}.{after}' for number in missing)}")
        if len(shapes := {part.shape for part in numbered.values()}) > 1:
            raise UsageError(f"{source}: {before}.*.{after} have different shapes: {listed(map(str, shapes))}")
        joined[f"{before}.{after}"] = join([numbered[number] for number in sorted(numbered)])
    return joined


def _split(name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The projections of a fused one."""
    module, _, leaf = name.rpartition(".")
    prefix, _, fused = module.rpartition(".")
    parts = FUSED.get(fused, ())
    if not parts or not tensor.ndim or len(tensor) % len(parts):
        return [(name, tensor)]
    return [(f"{prefix}.{part}.{leaf}", x) for part, x in zip(parts, np.split(tensor, len(parts)), strict=True)]


def _to_flax(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """A `weight` is the scale of a norm, or the kernel of a linear layer: [out, in] there, [in, out] here."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return name, tensor
    return (f"{module}.kernel", tensor.T) if tensor.ndim == 2 else (f"{module}.scale", tensor)
