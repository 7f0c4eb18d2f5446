"""Tricks for XLA:CPU: each function returns the same as the plain code, but XLA compiles it differently.

`experiments/benchmark.py --suite=cpu` measures each trick; its report is experiments/results/cpu/tricks.md. Callers
write `cpu.on_matrix(...)`, so that the benchmark can replace a trick by the plain code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from jax import lax
from jaxtyping import Array, Bool, Float

from hourglass_jax.nn.platform import on_one_cpu

HEADS_IN_CACHE = 16  # attention heads of a part of the batch; their scores fit into a CPU's cache


def on_matrix(function: Callable[[Array], Array], x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """Return function(x) for a function of vectors, computed on a matrix [N, D].

    Used by linear layers, norms and feed-forward networks. With more axes, XLA:CPU copies the whole input of a matrix
    product in the backward pass, and sums over rows at half the speed. A training step is 11 % faster.
    """
    y = function(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def in_own_branch(function: Callable[..., Array], always: Bool[Array, ""], x: Array, *rest: Any) -> Array:
    """Return function(x, *rest), an array of x's shape and dtype, compiled apart from the operations before it.

    Used by `Attention.step`. Otherwise XLA:CPU fuses attention with the write to the cache. A computation in a branch
    of `lax.cond` is not fused with its inputs. Decoding one row with a cache for 2,048 tokens is 2.6 times as fast.

    Args:
        always: true at run time, but computed, so that XLA cannot remove the branch.
    """
    branch = partial(lax.cond, always, function, lambda x, *_: x)
    return lax.platform_dependent(x, *rest, cpu=branch, default=function)


def batch_parts(batch: int, heads: int) -> int:
    """Return the number of equal parts of a batch that blocked attention computes one after another.

    On one CPU, only a part's scores are in memory at a time: the temporaries of a step of 8.9M parameters take 0.71 GB
    instead of 0.92, and the step is up to 9 % slower (results/training/memory.json).
    Other devices have one part.
    """
    rows = max(1, HEADS_IN_CACHE // heads)
    if not isinstance(batch, int) or not on_one_cpu() or batch % rows:
        return 1
    return max(1, batch // rows)
