"""Attention in blocks of queries, with a custom backward pass: memory grows linearly with length.

Blocks skip most keys that the causal mask or the window hides. The forward pass keeps each
query's log-sum-exp; from it, the backward pass recomputes a block's weights without a sum over keys. `plain` has the
formula, `positions.relative_shift` the alignment of relative scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hourglass_jax.nn import cpu
from hourglass_jax.nn.attention.pattern import Inputs, Pattern, upcast
from hourglass_jax.nn.layers import dropped
from hourglass_jax.nn.platform import platform
from hourglass_jax.nn.positions import relative_shift_padded

QUERY_ROWS = 64  # queries in a block on a CPU; eight times as many on accelerators
SEGMENTS = 8  # maximum per sequence; a segment is one loop over its blocks and the keys up to its end


DropoutKey = tuple[jax.Array, jax.Array | int] | None  # key, and the number of earlier rows in the batch


class Segment(NamedTuple):
    """Query groups start .. end - 1 in `n_blocks` blocks; the last block is padded to `block` groups.

    A block attends to the keys of all groups before `end`. With `reach`, which requires a single segment, it attends to
    a band: the keys from `reach` groups before its first group to its last group.
    """

    start: int
    end: int
    block: int
    n_blocks: int
    reach: int | None = None

    @property
    def missing(self) -> int:
        """The number of padding groups in the last block."""
        return self.start + self.block * self.n_blocks - self.end

    @property
    def n_key_groups(self) -> int:
        """The number of groups whose keys a block attends to."""
        return self.end if self.reach is None else self.reach + self.block

    def to_blocks(self, x: jax.Array | None, slots: int) -> jax.Array | None:
        """[B, H, G P, K] -> [n_blocks, B, H, block P, K]."""
        if x is None:
            return None
        x = x[:, :, self.start * slots : self.end * slots]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, self.missing * slots), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.n_blocks, self.block * slots, x.shape[3]), 2, 0)

    def from_blocks(self, blocks: jax.Array, slots: int) -> jax.Array:
        """Undo `to_blocks`."""
        x = jnp.moveaxis(blocks, 0, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[4])[:, :, : (self.end - self.start) * slots]

    def keys(self, inputs: Inputs, slots: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Return the keys, values and relative keys of the segment, as columns; see `with_columns`."""
        k, v, r, n = inputs.k, inputs.v, inputs.r, self.n_key_groups * slots
        ahead = 0 if r is None else max(r.shape[-1] - k.shape[-1], 0)  # lags below 0, if not causal
        if r is not None:  # prepend masked lags beyond the largest; append the column of `relative_shift_padded`
            r = pad_columns(r[..., -n - ahead :], max(n - r.shape[-1], 0), slots)
        if self.reach is not None:
            k, v = (pad_columns(x, self.reach * slots, self.missing * slots) for x in (k, v))
            return k, v, r
        if r is not None:  # prepend lags of padding groups; append lags of later keys
            r = pad_columns(r, self.missing * slots, (self.n_blocks * self.block - 1) * slots - ahead)
        return k[..., :n], v[..., :n], r

    def keys_of_block(self, i: jax.Array, keys: jax.Array, slots: int) -> jax.Array:
        """Return the keys, or values, of block i from those of the segment."""
        if self.reach is None:
            return keys
        return lax.dynamic_slice_in_dim(keys, i * self.block * slots, self.n_key_groups * slots, axis=3)

    def add_block(self, i: jax.Array, total: jax.Array, d_keys: jax.Array, slots: int) -> jax.Array:
        """Add the gradient of block i's keys to that of the segment's; transposes `keys_of_block`."""
        if self.reach is None:
            return total + d_keys
        d_keys += self.keys_of_block(i, total, slots)
        return lax.dynamic_update_slice_in_dim(total, d_keys, i * self.block * slots, axis=3)

    def loop(self, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, blocks: Any) -> tuple[Any, Any]:
        """Scan body(carry, (i, block i)) over the blocks."""
        numbered = (jnp.arange(self.n_blocks, dtype=jnp.int32), blocks)
        return lax.scan(body, carry, numbered, unroll=self.n_blocks == 1)


def with_columns(inputs: Inputs) -> Inputs:
    """Transpose k and v to [B, H, K, G S], r to [H, P, K, N S].

    Otherwise the matrix products of the backward pass transpose weights and scores by lag, which takes longer on a CPU
    than the products.
    """
    k, v, r = inputs.k.swapaxes(2, 3), inputs.v.swapaxes(2, 3), inputs.r
    return inputs._replace(k=k, v=v, r=None if r is None else r.transpose(1, 0, 3, 2))


def with_relative_keys(inputs: Inputs, r: jax.Array | None) -> Inputs:
    """Return `inputs` with r [H, P, K, N S] broadcast to the batch."""
    return inputs._replace(r=None if r is None else jnp.broadcast_to(r, (inputs.q.shape[0], *r.shape)))


def pad_columns(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def segments(pattern: Pattern, groups: int) -> list[Segment]:
    """Return the segments of a sequence of `groups` groups on this platform."""
    rows = QUERY_ROWS if platform() == "cpu" else 8 * QUERY_ROWS
    block = max(1, min(rows // pattern.query_slots, groups))
    if not pattern.causal:
        return [Segment(0, groups, block, -(-groups // block))]
    if pattern.window:
        narrow = min(block, max(pattern.window, QUERY_ROWS // pattern.query_slots))
        if narrow + pattern.window <= groups // 2:  # otherwise a band saves little
            return [Segment(0, groups, narrow, -(-groups // narrow), pattern.window - 1)]
    n_segments = SEGMENTS if platform() == "cpu" else SEGMENTS // 2  # each compiles separately
    longest = -(-groups // (block * n_segments)) * block
    ends = [min(start + longest, groups) for start in range(0, groups, longest)]
    return [
        Segment(start, end, block, -(-(end - start) // block))
        for start, end in zip(range(0, groups, longest), ends, strict=True)
    ]


def block_scores(
    pattern: Pattern, segment: Segment, i: jax.Array, q: jax.Array, q_position: Any, k: jax.Array, r: Any
) -> jax.Array:
    """q [B, H, block P, K], k [B, H, K, M S] -> scores of block i [B, H, block P, M S], in float32 or wider."""
    scores = jnp.einsum("bhqk,bhkm->bhqm", q, k)
    if r is not None:
        groups, slots = segment.n_key_groups + 1, pattern.key_slots
        if segment.reach is None:
            groups += segment.missing if pattern.causal else segment.block - 1
            r = lax.dynamic_slice_in_dim(r, (segment.n_blocks - 1 - i) * segment.block * slots, groups * slots, axis=4)
        batch, heads, _, size = q.shape
        q_position = q_position.reshape(batch, heads, segment.block, pattern.query_slots, size)
        by_lag = jnp.einsum("bhpgk,bhpkn->bhpgn", q_position.swapaxes(2, 3), r)
        by_key = relative_shift_padded(by_lag.reshape(*by_lag.shape[:-1], groups, slots))
        by_key = by_key[..., : segment.n_key_groups, :].reshape(*by_lag.shape[:-1], -1)
        scores += by_key.swapaxes(2, 3).reshape(scores.shape)
    return upcast(scores)


def block_visible(pattern: Pattern, segment: Segment, i: jax.Array, padding: jax.Array | None) -> jax.Array:
    """Return the mask of block i, bool [B or 1, 1, block P or 1, M S or 1]."""
    queries = jnp.arange(segment.block * pattern.query_slots, dtype=jnp.int32) // pattern.query_slots
    queries += segment.start + i * segment.block
    keys = jnp.arange(segment.n_key_groups * pattern.key_slots, dtype=jnp.int32) // pattern.key_slots
    if segment.reach is not None:
        keys += i * segment.block - segment.reach
    return pattern.visible(queries, keys, padding)


def drop(pattern: Pattern, x: jax.Array, key: DropoutKey, segment: Segment, i: jax.Array) -> jax.Array:
    """Apply dropout to the weights of block i, or to their gradient."""
    if key is None:
        return x
    base, rows_before = key
    return dropped(x, pattern.dropout, jax.random.fold_in(base, segment.start + i), rows_before)


def blocked_attention(
    pattern: Pattern, inputs: Inputs, padding: Array | None = None, key: Array | None = None
) -> Float[Array, "B H GP K"]:
    """Compute attention; `Pattern` describes `padding`. `key` turns dropout on."""
    batch, heads = inputs.q.shape[:2]
    n_parts = cpu.batch_parts(batch, heads)
    return _attention(pattern, n_parts, with_columns(inputs), padding, key)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    pattern: Pattern, n_parts: int, inputs: Inputs, padding: jax.Array | None, key: jax.Array | None
) -> jax.Array:
    return _forward(pattern, n_parts, inputs, padding, key)[0]


def in_parts(n_parts: int, tree: Any) -> Any:
    """Split the batch of each array: [B, ...] -> [n_parts, B / n_parts, ...]."""
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(n_parts, x.shape[0] // n_parts, *x.shape[1:]), tree)


def _forward(
    pattern: Pattern, n_parts: int, inputs: Inputs, padding: Any, key: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    rows, r = inputs.q.shape[0] // n_parts, inputs.r

    def one_part(part: Any) -> tuple[jax.Array, jax.Array]:
        i, inputs, padding = part
        return _forward_rows(pattern, with_relative_keys(inputs, r), padding, key if key is None else (key, i * rows))

    parts = jnp.arange(n_parts, dtype=jnp.int32), *in_parts(n_parts, (inputs._replace(r=None), padding))
    out, log_total = (x.reshape(inputs.q.shape[0], *x.shape[2:]) for x in lax.map(one_part, parts))
    return out, (inputs, padding, key, out, log_total)


def _backward(
    pattern: Pattern, n_parts: int, residuals: tuple[Any, ...], d_out: jax.Array
) -> tuple[Inputs, None, None]:
    inputs, padding, key, out, log_total = residuals
    rows, r = inputs.q.shape[0] // n_parts, inputs.r
    parts = in_parts(n_parts, (padding, out, log_total, d_out))

    def one_part(i: Any, carry: Any) -> Any:
        inputs, d_r = carry  # a part's gradients overwrite its inputs, which saves memory
        part, (padding, *results) = jax.tree.map(lambda x: x[i], (inputs, parts))
        dropout_key = key if key is None else (key, i * rows)
        gradients = _backward_rows(pattern, with_relative_keys(part, r), padding, dropout_key, *results)
        if gradients.r is not None:
            d_r += gradients.r.sum(axis=0)
        gradients = gradients._replace(r=None)
        return jax.tree.map(lambda x, d_x: x.at[i].set(d_x), inputs, gradients), d_r

    carry = in_parts(n_parts, inputs._replace(r=None)), jax.tree.map(jnp.zeros_like, r)
    gradients, d_r = lax.fori_loop(0, n_parts, one_part, carry)
    gradients = jax.tree.map(lambda x: x.reshape(inputs.q.shape[0], *x.shape[2:]), gradients)
    return gradients._replace(r=d_r), None, None


_attention.defvjp(_forward, _backward)


def _forward_rows(pattern: Pattern, inputs: Inputs, padding: Any, key: DropoutKey) -> tuple[jax.Array, jax.Array]:
    """Return the result [B, H, G P, K] and the log-sum-exp of each query's scores [B, H, G P, 1]."""
    parts = []
    for segment in segments(pattern, inputs.q.shape[2] // pattern.query_slots):
        k, v, r = segment.keys(inputs, pattern.key_slots)

        def one_block(_: None, block: Any, segment=segment, k=k, v=v, r=r) -> tuple[None, Any]:
            i, (q, q_position) = block
            k, v = (segment.keys_of_block(i, x, pattern.key_slots) for x in (k, v))
            scores = block_scores(pattern, segment, i, q, q_position, k, r)
            scores += jnp.where(block_visible(pattern, segment, i, padding), 0.0, -jnp.inf).astype(scores.dtype)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(-1, keepdims=True)
            weights = drop(pattern, weights / total, key, segment, i).astype(v.dtype)
            return None, (jnp.einsum("bhqm,bhkm->bhqk", weights, v), largest + jnp.log(total))

        blocks = [segment.to_blocks(x, pattern.query_slots) for x in (inputs.q, inputs.q_position)]
        _, results = segment.loop(one_block, None, blocks)
        parts.append([segment.from_blocks(x, pattern.query_slots) for x in results])
    out, log_total = (jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))
    return out, log_total


def _backward_rows(
    pattern: Pattern,
    inputs: Inputs,
    padding: Any,
    key: DropoutKey,
    out: jax.Array,
    log_total: jax.Array,
    d_out: jax.Array,
) -> Inputs:
    """Return the gradients of the inputs."""
    correction = (d_out * out).astype(log_total.dtype).sum(-1, keepdims=True)  # sum of weight * d_weight over keys
    d_queries: list[Any] = []
    d_inputs: Any = None
    for segment in segments(pattern, inputs.q.shape[2] // pattern.query_slots):
        (k, v, r), from_segment = jax.vjp(partial(segment.keys, slots=pattern.key_slots), inputs)

        def one_block(d_segment: Any, block: Any, segment=segment, k=k, v=v, r=r) -> tuple[Any, Any]:
            i, (q, q_position, d_out, log_total, correction) = block
            k, v = (segment.keys_of_block(i, x, pattern.key_slots) for x in (k, v))
            scores, scores_vjp = jax.vjp(partial(block_scores, pattern, segment, i), q, q_position, k, r)
            weights = jnp.exp(jnp.where(block_visible(pattern, segment, i, padding), scores - log_total, -jnp.inf))
            d_v = jnp.einsum("bhqk,bhqm->bhkm", d_out, drop(pattern, weights, key, segment, i).astype(v.dtype))
            d_weights = jnp.einsum("bhqk,bhkm->bhqm", d_out, v).astype(weights.dtype)
            d_weights = drop(pattern, d_weights, key, segment, i)
            d_q, d_q_position, d_k, d_r = scores_vjp(weights * (d_weights - correction))
            d_keys, d_values, d_relative = d_segment
            d_keys, d_values = (
                segment.add_block(i, total, x, pattern.key_slots) for total, x in ((d_keys, d_k), (d_values, d_v))
            )
            return (d_keys, d_values, None if d_r is None else d_relative + d_r), (d_q, d_q_position)

        queries = (inputs.q, inputs.q_position, d_out, log_total, correction)
        blocks = [segment.to_blocks(x, pattern.query_slots) for x in queries]
        nothing = jax.tree.map(jnp.zeros_like, (k, v, r))
        totals, d_blocks = segment.loop(one_block, nothing, blocks)
        d_queries.append([x if x is None else segment.from_blocks(x, pattern.query_slots) for x in d_blocks])
        [more] = from_segment(totals)
        d_inputs = more if d_inputs is None else jax.tree.map(jnp.add, d_inputs, more)
    d_q, d_q_position = (None if x[0] is None else jnp.concatenate(x, axis=2) for x in zip(*d_queries, strict=True))
    return d_inputs._replace(q=d_q, q_position=d_q_position)
