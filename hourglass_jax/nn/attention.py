"""Causal attention at group granularity: one formula for self-attention, shortening and upsampling.

Queries come as [B, G, P, D] and keys as [B, G, S, D]: G groups of P query slots and S key slots, where P or S
is 1. Query group g sees the key groups m <= g, whole. That is
    self-attention       P = S = 1        position i sees positions j <= i
    attention shortening P = 1, S = k     group g sees all shifted positions of groups <= g
    attention upsampling P = k, S = 1     position t sees the shortened vectors of groups <= t // k
and the distance between query slot (g, p) and key slot (m, s) is `unit * ((g - m) * P * S + p - s)` tokens,
with `unit` the total factor of the finer of the two sequences: token units at every level.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.cache import Clock, KeyValueCache
from hourglass_jax.nn.layers import Dropout, kernel_init, linear, split_key
from hourglass_jax.nn.positions import align_lags, align_newest, rotate, sinusoids, slot_distances

QUERY_ROWS = 64  # rows of a query block, on accelerators eight times as many; blocks recompute their scores
SEGMENTS = 8  # into which a sequence is cut at most; each sees only the keys before its end, its blocks are one loop


class Attention(nnx.Module):
    """Multi-head attention with the configured positions; no bias in the query, key and value projections."""

    def __init__(self, config: HourglassConfig, unit: int, *, query_slots: int = 1, key_slots: int = 1, rngs: nnx.Rngs):
        d_model = config.d_model
        self.unit, self.query_slots, self.key_slots = unit, query_slots, key_slots
        self.n_heads = config.n_heads
        self.positions = config.positions
        self.query = linear(config, d_model, d_model, bias=False, rngs=rngs)
        self.key = linear(config, d_model, d_model, bias=False, rngs=rngs)
        self.value = linear(config, d_model, d_model, bias=False, rngs=rngs)
        self.out = linear(config, d_model, d_model, rngs=rngs)
        self.dropout = Dropout(config.dropout)
        if self.positions == "relative":
            shape = (config.n_heads, config.head_dim)
            self.relative = linear(config, d_model, d_model, bias=False, rngs=rngs)
            self.content_bias = nnx.Param(kernel_init(config)(rngs.params(), shape))  # u of the formula
            self.position_bias = nnx.Param(kernel_init(config)(rngs.params(), shape))  # v

    def split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.n_heads, -1)

    def merge_heads(self, x: jax.Array) -> jax.Array:
        return self.out(x.reshape(*x.shape[:-2], -1))

    def relative_keys(self, distances: jax.Array) -> jax.Array:
        """W_r R of the formula: [...] distances in tokens -> [..., H, K]."""
        d_model = self.relative.in_features
        return self.split_heads(self.relative(sinusoids(distances, d_model)))

    def content_and_position(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q + u, which meets keys, and q + v, which meets relative keys."""
        return q + self.content_bias[...].astype(q.dtype), q + self.position_bias[...].astype(q.dtype)

    def __call__(self, queries: jax.Array, keys: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """[B, G, P, D], [B, G, S, D] -> [B, G, P, D]; `key` turns dropout on."""
        return self.merge_heads(self.attend_in_blocks(*self.project(queries, keys), key=key))

    def project(self, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, G, P, H, K], k and v [B, G, S, H, K]; q and k turned where positions are rotary."""
        q, k, v = (self.split_heads(f(x)) for f, x in ((self.query, queries), (self.key, keys), (self.value, keys)))
        if self.positions == "rotary":
            start = jnp.arange(q.shape[1])[:, None] * (self.query_slots * self.key_slots)
            q = rotate(q, self.unit * (start + jnp.arange(self.query_slots)))
            k = rotate(k, self.unit * (start + jnp.arange(self.key_slots)))
        return q, k, v

    def attend_in_blocks(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, first: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """-> [B, G, P, H, K]. Groups before `first` [B] are padding, seen by themselves alone.

        Scores exist for one block of queries at a time, forward and backward: memory grows linearly with length.
        """
        groups = q.shape[1]
        r = None
        if self.positions == "relative":
            r = self.relative_keys(slot_distances(groups, self.query_slots, self.key_slots, self.unit))
        rows = QUERY_ROWS if jax.default_backend() == "cpu" else 8 * QUERY_ROWS
        block = max(1, rows // self.query_slots)
        segment = -(-groups // (block * SEGMENTS)) * block
        starts = range(0, groups, segment)
        outputs = []
        for start, segment_key in zip(starts, split_key(key, len(starts)), strict=True):
            attend = partial(self.attend_segment, start, min(start + segment, groups), block)
            if len(starts) > 1:  # sliced inside, so that what is kept for the backward pass is shared by all segments
                attend = jax.checkpoint(attend)
            outputs.append(attend(q, k, v, r, first, segment_key))
        return jnp.concatenate(outputs, axis=1)

    def attend_segment(
        self,
        start: int,
        end: int,
        block: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        r: jax.Array | None,
        first: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """The query groups start .. end - 1, in one block or in a loop over blocks."""
        r = None if r is None else r[q.shape[1] - end :]
        q, k, v = q[:, start:end], k[:, :end], v[:, :end]
        if end - start <= block:
            return self.attend(q, k, v, r, start, first, key)
        n_blocks = -(-(end - start) // block)
        missing = n_blocks * block - (end - start)
        q = jnp.pad(q, [(0, 0), (0, missing)] + [(0, 0)] * 3)
        blocks = q.reshape(q.shape[0], n_blocks, block, *q.shape[2:]).swapaxes(0, 1)
        if r is not None:  # in front lags of the missing queries, behind those of keys yet to come: none is looked at
            r = jnp.pad(r, [(missing, n_blocks * block)] + [(0, 0)] * 4)

        def attend(inputs: tuple[jax.Array, ...]) -> jax.Array:
            i, q, key = inputs
            seen = None
            if r is not None:
                seen = lax.dynamic_slice_in_dim(r, (n_blocks - 1 - i) * block, end + missing)
            return self.attend(q, k, v, seen, start + i * block, first, key)

        keys = None if key is None else jax.random.split(key, n_blocks)
        out = lax.map(jax.checkpoint(attend), (jnp.arange(n_blocks), blocks, keys))
        return out.swapaxes(0, 1).reshape(q.shape)[:, : end - start]

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        r: jax.Array | None,
        offset: jax.Array | int,
        first: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """Query groups offset .. offset + b - 1 of q [B, b, P, H, K] see k, v [B, N, S, H, K] up to themselves.

        r [M, P, S, H, K], M at least N and offset + b: row e is for a lag of offset + b - 1 - e groups.
        """
        b, n = q.shape[1], k.shape[1]
        if r is None:
            scores = jnp.einsum("bgphk,bmshk->bhpgms", q, k)
        else:
            content, position = self.content_and_position(q)
            scores = jnp.einsum("bgphk,bmshk->bhpgms", content, k)
            scores += align_lags(jnp.einsum("bgphk,npshk->bhpgns", position, r))[..., :n, :]
        query_groups = offset + jnp.arange(b)[:, None]
        visible = jnp.arange(n) <= query_groups
        if first is not None:
            visible &= jnp.arange(n) >= jnp.minimum(first[:, None, None, None, None], query_groups)
        probabilities = masked_softmax(scores * q.shape[-1] ** -0.5, visible[..., None], axis=(-2, -1))
        return jnp.einsum("bhpgms,bmshk->bgphk", self.dropout(probabilities.astype(v.dtype), key), v)

    def init_cache(self, batch: int, max_length: int) -> KeyValueCache:
        """For `max_length` tokens, a multiple of the total factor."""
        stride = self.unit * self.query_slots
        rows = max_length // stride
        head_dim = self.out.in_features // self.n_heads
        relative = None
        if self.positions == "relative":
            slots = jnp.arange(self.query_slots)[:, None] + 1 - self.key_slots
            relative = self.relative_keys(jnp.arange(rows)[::-1] * stride + self.unit * slots).swapaxes(1, 2)
        keys, values = jnp.zeros((2, batch, self.n_heads, rows, head_dim), self.out.dtype)
        return KeyValueCache(keys, values, relative, stride, self.positions == "rotary")

    def prefill(
        self, queries: jax.Array, keys: jax.Array, cache: KeyValueCache, start: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """A call on rows that begin at `start` [B] tokens, whose keys and values fill the cache from the front."""
        q, k, v = self.project(queries, keys)
        out = self.attend_in_blocks(q, k, v, first=start // (self.unit * self.query_slots * self.key_slots))
        cache = cache.write(*(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v)), row=0)
        return self.merge_heads(out), cache

    def step(
        self, query: jax.Array, keys: jax.Array | None, cache: KeyValueCache, clock: Clock
    ) -> tuple[jax.Array, KeyValueCache]:
        """One query [B, D] at `clock.time` -> [B, D]; `keys` [B, S, D] or [B, D], where new, are its group's."""
        if keys is not None:
            cache = self.write(keys, cache, clock)
        q = self.split_heads(self.query(query))
        slot = clock.time // self.unit % self.query_slots
        if cache.rotary:
            q = rotate(q, clock.time)
        newest = self.group_row(clock) + self.key_slots - 1
        arguments = (q, cache, newest, clock.start // cache.stride, slot)
        # On a CPU in a branch of its own: fused with the write before it, it would take seven times as long.
        in_branch = partial(lax.cond, newest >= 0, self.attend_to_cache, lambda q, *_: q)
        out = lax.platform_dependent(*arguments, cpu=in_branch, default=self.attend_to_cache)
        return self.merge_heads(out), cache

    def group_row(self, clock: Clock) -> jax.Array:
        """The first row of the current group's keys."""
        return clock.time // (self.unit * self.query_slots * self.key_slots) * self.key_slots

    def write(self, keys: jax.Array, cache: KeyValueCache, clock: Clock) -> KeyValueCache:
        """Puts the keys and values of the current group, from [B, S, D] (or [B, D]), into the cache."""
        row = self.group_row(clock)
        keys = keys.reshape(keys.shape[0], self.key_slots, -1)
        k, v = self.split_heads(self.key(keys)), self.split_heads(self.value(keys))
        if cache.rotary:
            k = rotate(k, (row + jnp.arange(self.key_slots)) * cache.stride)
        return cache.write(k, v, row)

    def attend_to_cache(
        self, q: jax.Array, cache: KeyValueCache, newest: jax.Array, first: jax.Array, slot: jax.Array
    ) -> jax.Array:
        """q [B, H, K] sees the rows first [B] .. newest -> [B, H, K]."""
        if cache.relative is None:
            scores = jnp.einsum("bhk,bhnk->bhn", q, cache.keys)
        else:
            content, position = self.content_and_position(q)
            r = lax.dynamic_index_in_dim(cache.relative, slot, keepdims=False)
            scores = jnp.einsum("bhk,bhnk->bhn", content, cache.keys)
            scores += align_newest(jnp.einsum("bhk,hnk->bhn", position, r), newest)
        rows = jnp.arange(scores.shape[-1])
        visible = (rows <= newest) & (rows >= first[:, None])
        probabilities = masked_softmax(scores * q.shape[-1] ** -0.5, visible[:, None], axis=-1)
        return jnp.einsum("bhn,bhnk->bhk", probabilities.astype(q.dtype), cache.values)


def masked_softmax(scores: jax.Array, visible: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Softmax where `visible`, exactly zero elsewhere; float32 at least."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=axis)
