"""Relative attention in cuDNN's kernel, with the relative logits as its additive bias: an experiment for GPUs.

The logits are one matrix product, shifted; `plain` has the formula. cuDNN returns the gradient of a bias only for a
batch of one, so rows and heads become heads. The backward pass computes the bias again. Rows and heads are computed in
parts, which limits the logits in memory. Elsewhere `jax.nn` computes the same, for tests.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.platform import platform
from hourglass_jax.nn.positions import relative_shift_padded

LIMIT = 2**30  # bytes of relative logits in memory at a time; at least one head of one row
MULTIPLE = 8  # of groups and of columns: products and cuDNN require aligned rows
HIDDEN = -(2.0**41)  # bias of a masked key, as in JAX; cuDNN returns nan for larger ones


def biased_attention(
    pattern: Pattern, inputs: Inputs, padding: Array | None = None, key: Array | None = None
) -> Float[Array, "B H GP K"]:
    """Compute causal attention; `choice` selects it only with relative positions and without dropout."""
    assert key is None
    batch, heads, n_queries, size = inputs.q.shape
    groups = n_queries // pattern.query_slots
    more = -groups % MULTIPLE

    def pad(x: Any, slots: int) -> Any:
        return jnp.pad(x, [(0, 0), (0, 0), (0, more * slots), (0, 0)])

    r = inputs.nearest((groups + more) * pattern.key_slots)
    assert r is not None
    inputs = Inputs(
        pad(inputs.q, pattern.query_slots),
        pad(inputs.k, pattern.key_slots),
        pad(inputs.v, pattern.key_slots),
        pad(inputs.q_position, pattern.query_slots),
        jnp.broadcast_to(r.swapaxes(0, 1), (batch, heads, *r.shape[::2], size)),
    )
    of_head = inputs.q.shape[2] * inputs.k.shape[2] * inputs.q.dtype.itemsize
    rows = largest_divisor(batch, LIMIT // (heads * of_head))
    part_heads = largest_divisor(heads, LIMIT // (rows * of_head))
    grid = batch // rows, heads // part_heads

    def to_parts(x: jax.Array) -> jax.Array:
        """[B, H, ...] -> [parts, rows, part_heads, ...]."""
        x = x.reshape(grid[0], rows, grid[1], part_heads, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    first = None if padding is None else jnp.broadcast_to(padding[:, None], (batch, heads))
    parts = jax.tree.map(to_parts, (inputs, first))
    one_part = jax.checkpoint(lambda part: part_attention(pattern, *part), policy=is_attention)
    n_parts = grid[0] * grid[1]
    out = jax.lax.scan(lambda _, part: (None, one_part(part)), None, parts, unroll=n_parts == 1)[1]
    out = out.reshape(*grid, rows, part_heads, *out.shape[3:]).swapaxes(1, 2)
    return out.reshape(batch, heads, *out.shape[4:])[:, :, :n_queries]


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n up to `limit`, at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(limit, 1))


def is_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Return whether an operation is cuDNN's forward pass, whose results are kept for the backward pass."""
    return primitive.name.startswith("dot_product_attention_fwd")


def part_attention(pattern: Pattern, inputs: Inputs, first: jax.Array | None) -> Float[Array, "B H GP K"]:
    """Compute attention with r [B, H, P, NS, K]; groups before first [B, H] are padding."""
    q, k, v = (x.reshape(1, -1, *x.shape[2:]).swapaxes(1, 2) for x in inputs[:3])  # [1, L, B H, K]
    logits = relative_logits(pattern, inputs)
    square = pattern.query_slots == pattern.key_slots == 1
    if not square or pattern.window or first is not None:
        query_groups, key_groups = (
            jnp.arange(x.shape[2], dtype=jnp.int32) // slots
            for x, slots in ((inputs.q, pattern.query_slots), (inputs.k, pattern.key_slots))
        )
        visible = pattern.visible(query_groups, key_groups, None if first is None else first[:, 0])
        logits = jnp.where(visible, logits, HIDDEN)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    out = jax.nn.dot_product_attention(
        *(q, k, v, logits.reshape(1, -1, *logits.shape[2:])),
        scale=1.0,
        is_causal=square,
        implementation="cudnn" if platform() == "gpu" and half else "xla",
    )
    return out.swapaxes(1, 2).reshape(inputs.q.shape)


def relative_logits(pattern: Pattern, inputs: Inputs) -> Float[Array, "B H GP GS"]:
    """Return the relative logits of all queries and keys; those of later groups are undefined.

    The row stride is a multiple of `MULTIPLE`, and the last columns are those that `relative_shift_padded` requires.
    """
    assert inputs.q_position is not None and inputs.r is not None
    batch, heads, n_queries, size = inputs.q.shape
    query_slots, key_slots = pattern.query_slots, pattern.key_slots
    groups = n_queries // query_slots
    q_position = inputs.q_position.reshape(batch, heads, groups, query_slots, size)
    r = jnp.pad(inputs.r, [(0, 0)] * 3 + [(0, MULTIPLE * key_slots), (0, 0)])
    # r has a batch: otherwise the product for its gradient transposes all logits.
    by_lag = jnp.einsum("bhgpk,bhpmk->bhpgm", q_position, r)
    by_lag = by_lag.reshape(*by_lag.shape[:-1], groups + MULTIPLE, key_slots)
    by_key = relative_shift_padded(by_lag)[..., :groups, :]
    return by_key.reshape(batch, heads, query_slots, groups, -1).swapaxes(2, 3).reshape(batch, heads, n_queries, -1)
