"""The flash kernels of `kernel` with relative logits from memory: an experiment for GPUs.

A matrix product computes the logits by lag. A kernel loads a tile of them with a row stride of one column less, which
aligns lags with keys. The backward pass overwrites logits with their gradients, and matrix products return those of
q_position and r. Chunks of queries compute only the lags that they attend to. Memory is quadratic in length.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hourglass_jax.nn.attention.kernel import call, kernel_attention, like, round_up, run_kernels, wide
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.tiles import Arrays, Plan, forward_tile, key_tile, stored_query_tile

CHUNKS = 4  # of a long sequence; computes 5/8 of all lags
MIN_BLOCKS = 8  # query blocks in a chunk


def stored_attention(
    pattern: Pattern, inputs: Inputs, first: Int[Array, " B"] | None = None, key: Array | None = None
) -> Float[Array, "B H GP K"]:
    """Compute attention; groups before `first` are padding. `key` turns dropout on.

    Raises UsageError for a symbolic batch size.
    """
    if inputs.r is None:
        return kernel_attention(pattern, inputs, first, key)
    return run_kernels(_attention, pattern, inputs, first, key)


def chunks(plan: Plan) -> list[Plan]:
    """Return plans for chunks of the queries; one with a window, which limits the lags."""
    n = 1 if plan.pattern.window else max(1, min(CHUNKS, plan.n_blocks // MIN_BLOCKS))
    bounds = [plan.n_blocks * i // n for i in range(n + 1)]
    return [plan._replace(queries=pair) for pair in itertools.pairwise(bounds)]


def n_lags(plan: Plan) -> int:
    """Return the number of lags that tiles of the chunk read, in whole blocks."""
    n = plan.range[1] * plan.block
    window = plan.pattern.window
    return min(n, round_up(window, plan.block) + 2 * plan.block) if window else n


def relative_logits(plan: Plan, q_position: jax.Array, r: jax.Array) -> jax.Array:
    """[B, H P, g, K], [H P, S G, K] -> [B, H P, g S, N + b]: N lags that fall to 0, and a block for later keys."""
    batch, heads, _, size = q_position.shape
    r = r.reshape(heads, plan.pattern.key_slots, -1, size)[:, :, -n_lags(plan) :]
    r = jnp.pad(r, [(0, 0), (0, 0), (0, plan.block), (0, 0)])
    # r has a batch: otherwise the product for its gradient transposes all logits.
    every_r = jnp.broadcast_to(r.reshape(heads, -1, size), (batch, heads, r.shape[1] * r.shape[2], size))
    logits = jnp.einsum("bhgk,bhnk->bhgn", q_position, every_r)
    return logits.reshape(batch, heads, -1, r.shape[2])


def of_chunk(plan: Plan, x: jax.Array) -> jax.Array:
    """Return the rows of a chunk's queries."""
    start, stop = plan.range
    return x[:, :, start * plan.block : stop * plan.block]


def with_logits(plan: Plan, arrays: Arrays) -> tuple[Arrays, Any]:
    """Return a chunk's inputs with logits in place of q_position and r, and the function of their gradients."""
    logits, pullback = jax.vjp(partial(relative_logits, plan), of_chunk(plan, arrays.q_position), arrays.r)
    return arrays._replace(q_position=None, r=None, logits=logits), pullback


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, arrays: Arrays) -> jax.Array:
    return _forward(plan, arrays)[0]


def _forward(plan: Plan, arrays: Arrays) -> tuple[jax.Array, Any]:
    results = []
    for chunk in chunks(plan):
        given, _ = with_logits(chunk, arrays)
        q = of_chunk(chunk, arrays.q)
        log_totals = jax.ShapeDtypeStruct((*q.shape[:3], 1), wide(arrays))
        results.append(call(chunk, forward_tile, given, (), chunk.range[1] - chunk.range[0], like(q), log_totals))
    out, log_total = (jnp.concatenate(each, axis=2) for each in zip(*results, strict=True))
    return out, (arrays, out, log_total)


def _backward(plan: Plan, residuals: Any, d_out: jax.Array) -> tuple[Arrays]:
    # Without the barrier, XLA would keep the logits of all layers from the forward pass.
    (arrays, out, log_total), d_out = jax.lax.optimization_barrier((residuals, d_out))
    correction = (d_out * out).astype(log_total.dtype).sum(-1, keepdims=True)  # sum of weight * d_weight over keys
    more, n_keys = (d_out, log_total, correction), plan.n_blocks * plan.pattern.key_slots
    of_keys = jax.ShapeDtypeStruct((*arrays.q.shape[:2], *arrays.k.shape[2:]), wide(arrays))
    of_queries, of_pairs = [], []
    for chunk in chunks(plan):
        given, pullback = with_logits(chunk, arrays)
        d_k, d_v = call(chunk, key_tile, given, more, n_keys, of_keys, of_keys)
        # The next kernel overwrites the logits, so it must wait.
        given, d_k, d_v = jax.lax.optimization_barrier((given, d_k, d_v))
        outputs = like(of_chunk(chunk, arrays.q)), like(given.logits)
        n = chunk.range[1] - chunk.range[0]
        d_q, d_logits = call(chunk, stored_query_tile, given, more, n, *outputs, in_place=True)
        d_q_position, d_r = pullback(d_logits)
        of_queries.append((d_q, d_q_position))
        of_pairs.append((d_k, d_v, d_r))
    d_q, d_q_position = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *of_queries)
    d_k, d_v, d_r = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *of_pairs)
    d_k, d_v = (x.reshape(*arrays.k.shape[:2], -1, *x.shape[2:]).sum(2).astype(arrays.k.dtype) for x in (d_k, d_v))
    return (Arrays(d_q, d_k, d_v, d_q_position, d_r, None, None),)


_attention.defvjp(_forward, _backward)
