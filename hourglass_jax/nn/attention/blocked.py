"""Attention in blocks of queries, with a backward pass of its own: memory grows linearly with length.

Where it is causal, keys beyond a block's last query are hardly touched, and with a window none before what its first
query sees. Of the scores only each query's log-sum-exp is kept; from it the backward pass has a block's probabilities
again, without a sum over keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hourglass_jax.nn.attention.pattern import Inputs, Pattern, float32_at_least
from hourglass_jax.nn.layers import dropped
from hourglass_jax.nn.platform import on_one_cpu, platform
from hourglass_jax.nn.positions import relative_shift_padded

QUERY_ROWS = 64  # of a block on a CPU; on accelerators eight times as many
HEADS_IN_CACHE = 16  # of a few rows of the batch together, on a CPU
SEGMENTS = 8  # into which a sequence is cut at most; the blocks of a segment are one loop, and all see its last key


DropoutKey = tuple[jax.Array, jax.Array | int] | None  # and how many rows of the batch come before those at hand


class Segment(NamedTuple):
    """Query groups start .. end - 1 in blocks; with groups that do not exist after the last where it is not full.

    A block meets the keys of all groups before `end`, or, of one segment for all, those from `reach` groups before its
    first group to its last.
    """

    start: int
    end: int
    block: int
    n_blocks: int
    reach: int | None = None

    @property
    def missing(self) -> int:
        return self.start + self.block * self.n_blocks - self.end

    @property
    def met(self) -> int:
        """Groups whose keys a block meets."""
        return self.end if self.reach is None else self.reach + self.block

    def blocks_of(self, x: jax.Array | None, slots: int) -> jax.Array | None:
        """[B, H, G P, K] -> [n_blocks, B, H, block P, K]."""
        if x is None:
            return None
        x = x[:, :, self.start * slots : self.end * slots]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, self.missing * slots), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.n_blocks, self.block * slots, x.shape[3]), 2, 0)

    def rows_of(self, blocks: jax.Array, slots: int) -> jax.Array:
        """Undoes `blocks_of`."""
        x = jnp.moveaxis(blocks, 0, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[4])[:, :, : (self.end - self.start) * slots]

    def seen(self, inputs: Inputs, slots: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The keys, values and relative keys, as columns, that the segment's queries meet."""
        k, v, r, n = inputs.k, inputs.v, inputs.r, self.met * slots
        ahead = 0 if r is None else max(r.shape[-1] - k.shape[-1], 0)  # of lags below 0, where they are seen
        if r is not None:  # in front, lags beyond the largest, all hidden; behind, one for `relative_shift_padded`
            r = pad_columns(r[..., -n - ahead :], max(n - r.shape[-1], 0), slots)
        if self.reach is not None:
            k, v = (pad_columns(x, self.reach * slots, self.missing * slots) for x in (k, v))
            return k, v, r
        if r is not None:  # in front the lags of groups that do not exist, behind those of keys yet to come
            r = pad_columns(r, self.missing * slots, (self.n_blocks * self.block - 1) * slots - ahead)
        return k[..., :n], v[..., :n], r

    def near(self, i: jax.Array, seen: jax.Array, slots: int) -> jax.Array:
        """Of the keys or values that the segment's queries meet, those that block i does."""
        if self.reach is None:
            return seen
        return lax.dynamic_slice_in_dim(seen, i * self.block * slots, self.met * slots, axis=3)

    def add_near(self, i: jax.Array, total: jax.Array, near: jax.Array, slots: int) -> jax.Array:
        """Adds to all keys what comes from those that block i meets."""
        if self.reach is None:
            return total + near
        near += self.near(i, total, slots)
        return lax.dynamic_update_slice_in_dim(total, near, i * self.block * slots, axis=3)

    def loop(self, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, blocks: Any) -> tuple[Any, Any]:
        """`lax.scan` of body(carry, (block's number, block))."""
        numbered = (jnp.arange(self.n_blocks, dtype=jnp.int32), blocks)
        return lax.scan(body, carry, numbered, unroll=self.n_blocks == 1)


def with_columns(inputs: Inputs) -> Inputs:
    """k and v as [B, H, K, G S], r as [B, H, P, K, N S].

    So no product of the backward pass transposes a block's weights, nor one for the whole batch its scores by lag: on a
    CPU that takes longer than the product.
    """
    k, v, r = inputs.k.swapaxes(2, 3), inputs.v.swapaxes(2, 3), inputs.r
    if r is not None:
        r = r.transpose(1, 0, 3, 2)
        r = jnp.broadcast_to(r, (k.shape[0], *r.shape))
    return inputs._replace(k=k, v=v, r=r)


def pad_columns(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def segments(pattern: Pattern, groups: int) -> list[Segment]:
    rows = QUERY_ROWS if platform() == "cpu" else 8 * QUERY_ROWS
    block = max(1, min(rows // pattern.query_slots, groups))
    if not pattern.causal:
        return [Segment(0, groups, block, -(-groups // block))]
    if pattern.window:
        narrow = min(block, max(pattern.window, QUERY_ROWS // pattern.query_slots))
        if narrow + pattern.window <= groups // 2:  # otherwise about as much would be met without a band
            return [Segment(0, groups, narrow, -(-groups // narrow), pattern.window - 1)]
    n_segments = SEGMENTS if platform() == "cpu" else SEGMENTS // 2  # each is a program to compile
    longest = -(-groups // (block * n_segments)) * block
    ends = [min(start + longest, groups) for start in range(0, groups, longest)]
    return [
        Segment(start, end, block, -(-(end - start) // block))
        for start, end in zip(range(0, groups, longest), ends, strict=True)
    ]


def block_scores(
    pattern: Pattern, segment: Segment, i: jax.Array, q: jax.Array, q_position: Any, k: jax.Array, r: Any
) -> jax.Array:
    """q [B, H, block P, K], k [B, H, K, N S] -> [B, H, block P, N S], float32 at least."""
    scores = jnp.einsum("bhqk,bhkm->bhqm", q, k)
    if r is not None:
        groups, slots = segment.met + 1, pattern.key_slots
        if segment.reach is None:
            groups += segment.missing if pattern.causal else segment.block - 1
            r = lax.dynamic_slice_in_dim(r, (segment.n_blocks - 1 - i) * segment.block * slots, groups * slots, axis=4)
        batch, heads, _, size = q.shape
        q_position = q_position.reshape(batch, heads, segment.block, pattern.query_slots, size)
        by_lag = jnp.einsum("bhpgk,bhpkn->bhpgn", q_position.swapaxes(2, 3), r)
        by_key = relative_shift_padded(by_lag.reshape(*by_lag.shape[:-1], groups, slots))[..., : segment.met, :]
        by_key = by_key.reshape(*by_key.shape[:-2], -1)
        scores += by_key.swapaxes(2, 3).reshape(scores.shape)
    return float32_at_least(scores)


def block_visible(pattern: Pattern, segment: Segment, i: jax.Array, padding: jax.Array | None) -> jax.Array:
    """bool [B or 1, 1, block P or 1, N S or 1]."""
    queries = jnp.arange(segment.block * pattern.query_slots, dtype=jnp.int32) // pattern.query_slots
    queries += segment.start + i * segment.block
    keys = jnp.arange(segment.met * pattern.key_slots, dtype=jnp.int32) // pattern.key_slots
    if segment.reach is not None:
        keys += i * segment.block - segment.reach
    return pattern.visible(queries, keys, padding)


def drop(pattern: Pattern, x: jax.Array, key: DropoutKey, segment: Segment, i: jax.Array) -> jax.Array:
    if key is None:
        return x
    base, rows_before = key
    return dropped(x, pattern.dropout, jax.random.fold_in(base, segment.start + i), rows_before)


def blocked_attention(
    pattern: Pattern, inputs: Inputs, padding: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """-> [B, H, G P, K]. For `padding` see `Pattern`; `key` turns dropout on.

    On one CPU it takes a few rows of the batch at a time, whose scores fit into its cache.
    """
    batch, heads = inputs.q.shape[:2]
    inputs = with_columns(inputs)
    rows = max(1, HEADS_IN_CACHE // heads)
    if not isinstance(batch, int) or not on_one_cpu() or batch <= rows or batch % rows:
        return _attention(pattern, inputs, padding, None if key is None else (key, 0))

    def some_rows(part: Any) -> jax.Array:
        rows_before, inputs, padding = part
        return _attention(pattern, inputs, padding, None if key is None else (key, rows_before))

    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (inputs, padding))
    return lax.map(some_rows, (jnp.arange(0, batch, rows, dtype=jnp.int32), *parts)).reshape(inputs.q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(pattern: Pattern, inputs: Inputs, padding: jax.Array | None, key: DropoutKey) -> jax.Array:
    return _forward(pattern, inputs, padding, key)[0]


def _forward(pattern: Pattern, inputs: Inputs, padding: Any, key: DropoutKey) -> tuple[jax.Array, tuple[Any, ...]]:
    parts = []
    for segment in segments(pattern, inputs.q.shape[2] // pattern.query_slots):
        k, v, r = segment.seen(inputs, pattern.key_slots)

        def one_block(_: None, block: Any, segment=segment, k=k, v=v, r=r) -> tuple[None, Any]:
            i, (q, q_position) = block
            k, v = (segment.near(i, x, pattern.key_slots) for x in (k, v))
            scores = block_scores(pattern, segment, i, q, q_position, k, r)
            scores += jnp.where(block_visible(pattern, segment, i, padding), 0.0, -jnp.inf).astype(scores.dtype)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(-1, keepdims=True)
            weights = drop(pattern, weights / total, key, segment, i).astype(v.dtype)
            return None, (jnp.einsum("bhqm,bhkm->bhqk", weights, v), largest + jnp.log(total))

        blocks = [segment.blocks_of(x, pattern.query_slots) for x in (inputs.q, inputs.q_position)]
        _, results = segment.loop(one_block, None, blocks)
        parts.append([segment.rows_of(x, pattern.query_slots) for x in results])
    out, log_total = (jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))
    return out, (inputs, padding, key, out, log_total)


def _backward(pattern: Pattern, residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[Inputs, None, None]:
    inputs, padding, key, out, log_total = residuals
    correction = (d_out * out).astype(log_total.dtype).sum(-1, keepdims=True)  # probabilities times their gradients
    d_queries: list[Any] = []
    d_seen: Any = None
    for segment in segments(pattern, inputs.q.shape[2] // pattern.query_slots):
        (k, v, r), unsee = jax.vjp(lambda inputs, segment=segment: segment.seen(inputs, pattern.key_slots), inputs)

        def one_block(d_seen: Any, block: Any, segment=segment, k=k, v=v, r=r) -> tuple[Any, Any]:
            i, (q, q_position, d_out, log_total, correction) = block
            k, v = (segment.near(i, x, pattern.key_slots) for x in (k, v))
            scores, of_scores = jax.vjp(partial(block_scores, pattern, segment, i), q, q_position, k, r)
            weights = jnp.exp(jnp.where(block_visible(pattern, segment, i, padding), scores - log_total, -jnp.inf))
            d_v = jnp.einsum("bhqk,bhqm->bhkm", d_out, drop(pattern, weights, key, segment, i).astype(v.dtype))
            d_weights = jnp.einsum("bhqk,bhkm->bhqm", d_out, v).astype(weights.dtype)
            d_weights = drop(pattern, d_weights, key, segment, i)
            d_q, d_q_position, d_k, d_r = of_scores(weights * (d_weights - correction))
            d_keys, d_values, d_relative = d_seen
            d_keys, d_values = (
                segment.add_near(i, total, x, pattern.key_slots) for total, x in ((d_keys, d_k), (d_values, d_v))
            )
            return (d_keys, d_values, None if d_r is None else d_relative + d_r), (d_q, d_q_position)

        queries = (inputs.q, inputs.q_position, d_out, log_total, correction)
        blocks = [segment.blocks_of(x, pattern.query_slots) for x in queries]
        nothing = jax.tree.map(jnp.zeros_like, (k, v, r))
        totals, d_blocks = segment.loop(one_block, nothing, blocks)
        d_queries.append([x if x is None else segment.rows_of(x, pattern.query_slots) for x in d_blocks])
        [d_inputs] = unsee(totals)
        d_seen = d_inputs if d_seen is None else jax.tree.map(jnp.add, d_seen, d_inputs)
    d_q, d_q_position = (None if x[0] is None else jnp.concatenate(x, axis=2) for x in zip(*d_queries, strict=True))
    return d_seen._replace(q=d_q, q_position=d_q_position), None, None


_attention.defvjp(_forward, _backward)
