"""Attention at group granularity: one formula for self-attention, shortening and upsampling.

Queries come as [B, G, P, D] and keys as [B, G, S, D]: G groups of P query slots and S key slots, where P or S
is 1. Query group g sees the key groups m <= g, whole; not causal, all of them. Causally, that is
    self-attention       P = S = 1        position i sees positions j <= i
    attention shortening P = 1, S = k     group g sees all shifted positions of groups <= g
    attention upsampling P = k, S = 1     position t sees the shortened vectors of groups <= t // k
and the distance between query slot (g, p) and key slot (m, s) is `unit * ((g - m) * P * S + p - s)` tokens,
with `unit` the total factor of the finer of the two sequences: token units at every level.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.attention.choice import attend
from hourglass_jax.nn.attention.pattern import Inputs, Pattern, float32_at_least
from hourglass_jax.nn.cache import Clock, KeyValueCache
from hourglass_jax.nn.layers import Dropout, dropped, kernel_init, linear
from hourglass_jax.nn.positions import align_each, align_newest, rotate, sinusoids, slot_distances

HIDDEN = -1e30  # a score of no weight, and with a derivative


class Attention(nnx.Module):
    """Multi-head attention with the configured positions."""

    def __init__(self, config: HourglassConfig, unit: int, *, query_slots: int = 1, key_slots: int = 1, rngs: nnx.Rngs):
        d_model, d_heads, bias = config.d_model, config.n_heads * config.head_dim, config.qkv_bias
        self.unit, self.query_slots, self.key_slots = unit, query_slots, key_slots
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.window = config.window if unit == query_slots == key_slots == 1 else 0
        self.positions, self.implementation, self.causal = config.positions, config.attention, config.causal
        self.query = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.key = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.value = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.out = linear(config, d_heads, d_model, rngs=rngs)
        self.dropout = Dropout(config.dropout)
        if self.positions == "relative":
            shape = (config.n_heads, config.head_dim)
            self.relative = linear(config, d_model, d_heads, bias=False, rngs=rngs)
            self.content_bias = nnx.Param(kernel_init(config)(rngs.params(), shape, jnp.float32))  # u of the formula
            self.position_bias = nnx.Param(kernel_init(config)(rngs.params(), shape, jnp.float32))  # v

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
        biases = (bias[...].astype(q.dtype) for bias in (self.content_bias, self.position_bias))
        content, position = (q + jnp.expand_dims(bias, range(q.ndim - 2)) for bias in biases)
        return content, position

    def __call__(
        self, queries: jax.Array, keys: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, G, P, D], [B, G, S, D] -> [B, G, P, D]; `key` turns dropout on.

        mask: bool [B, G S], the keys that count; for attention that is not causal.
        """
        return self.merge_heads(self.attend(*self.project(queries, keys), padding=mask, key=key))

    def project(self, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, G, P, H, K], k and v [B, G, S, H, K]; q and k turned where positions are rotary."""
        q, k, v = (self.split_heads(f(x)) for f, x in ((self.query, queries), (self.key, keys), (self.value, keys)))
        if self.positions == "rotary":
            start = jnp.arange(q.shape[1])[:, None] * (self.query_slots * self.key_slots)
            q = rotate(q, self.unit * (start + jnp.arange(self.query_slots)[None]))
            k = rotate(k, self.unit * (start + jnp.arange(self.key_slots)[None]))
        return q, k, v

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, padding: jax.Array | None = None, key: Any = None
    ) -> jax.Array:
        """-> [B, G, P, H, K]. For `padding` see `Pattern`."""
        scale = self.head_dim**-0.5
        q_position = r = None
        if self.positions == "relative":
            lags = min(q.shape[1], self.window or q.shape[1])
            distances = slot_distances(lags, self.query_slots, self.key_slots, self.unit, causal=self.causal)
            r = jnp.einsum("gpshk->phgsk", self.relative_keys(distances))
            r = r.reshape(*r.shape[:2], -1, self.head_dim)
            q, q_position = self.content_and_position(q)
            q_position = heads_first(q_position * scale)
        inputs = Inputs(heads_first(q * scale), heads_first(k), heads_first(v), q_position, r)
        pattern = Pattern(self.query_slots, self.key_slots, self.dropout.rate, self.window, self.causal)
        out = attend(self.implementation, pattern, inputs, padding, self.dropout.used(key))
        return out.swapaxes(1, 2).reshape(q.shape)

    def attend_from(
        self, queries: jax.Array, keys: jax.Array, places: jax.Array, first: Any = 0, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, D], [B, M, D] -> [B, N, D], and the keys and values [B, M, H, K] for a cache.

        A query at `places`, int [B, N], sees the keys `first` [B or 1] .. its place; -1 sees nothing, which gives zero.
        For events, which are anywhere: the formula as it stands, one slot a group.
        """
        q, k, v = (self.split_heads(f(x)) for f, x in ((self.query, queries), (self.key, keys), (self.value, keys)))
        rows = jnp.arange(keys.shape[1], dtype=jnp.int32)
        content = q
        if self.positions == "rotary":
            content, k = rotate(q, self.unit * places), rotate(k, self.unit * rows)
        elif self.positions == "relative":
            content, position = self.content_and_position(q)
        scores = jnp.einsum("bnhk,bmhk->bhnm", content, k)
        if self.positions == "relative":
            by_lag = jnp.einsum("bnhk,mhk->bhnm", position, self.relative_keys(self.unit * rows))
            lags = jnp.maximum(places[:, None, :, None] - rows[None, None, None], 0)
            scores += jnp.take_along_axis(by_lag, lags, axis=-1)
        visible = (rows[None, None] <= places[..., None]) & (rows[None, None] >= jnp.reshape(first, (-1, 1, 1)))
        scores = float32_at_least(scores) * self.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, HIDDEN)) * visible[:, None].astype(scores.dtype)
        if (dropout_key := self.dropout.used(key)) is not None:
            weights = dropped(weights, self.dropout.rate, dropout_key)
        return self.merge_heads(jnp.einsum("bhnm,bmhk->bnhk", weights.astype(v.dtype), v)), k, v

    def init_cache(self, batch: int, max_length: int) -> KeyValueCache:
        """For `max_length` tokens, a multiple of the total factor, or for the window."""
        stride = self.unit * self.query_slots
        rows = min(max_length // stride, self.window or max_length)
        relative = None
        if self.positions == "relative":
            slots = jnp.arange(self.query_slots)[:, None] + 1 - self.key_slots
            relative = self.relative_keys(jnp.arange(rows)[None, ::-1] * stride + self.unit * slots).swapaxes(1, 2)
        keys, values = jnp.zeros((2, batch, self.n_heads, rows, self.head_dim), self.out.dtype)
        return KeyValueCache(keys, values, relative, stride, self.positions == "rotary")

    def prefill(
        self, queries: jax.Array, keys: jax.Array, cache: KeyValueCache, start: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """A call on rows that begin at `start` [B] tokens, whose keys and values fill the cache from the front."""
        q, k, v = self.project(queries, keys)
        out = self.attend(q, k, v, padding=start // (self.unit * self.query_slots * self.key_slots))
        k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
        return self.merge_heads(out), cache.write(k, v, row=0)

    def step(
        self, query: jax.Array, keys: jax.Array | None, cache: KeyValueCache, clock: Clock
    ) -> tuple[jax.Array, KeyValueCache]:
        """One query [B, D] at `clock.time` -> [B, D]; `keys` [B, S, D] or [B, D], where new, are its group's.

        Where each row has a time of its own, only those that are live are told what is new.
        """
        if keys is not None:
            cache = self.write(keys, cache, clock)
        q = self.split_heads(self.query(query))
        slot = clock.time // self.unit % self.query_slots
        if cache.rotary:
            q = rotate(q, clock.time)
        newest = self.group_row(clock) + self.key_slots - 1
        arguments = (q, cache, newest, clock.start // cache.stride, slot)
        # On a CPU in a branch of its own: fused with the write before it, it would take seven times as long.
        in_branch = partial(lax.cond, jnp.all(newest >= 0), self.attend_to_cache, lambda q, *_: q)
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
            k = rotate(
                k, (jnp.reshape(row, (-1, 1)) + jnp.arange(self.key_slots, dtype=jnp.int32)[None]) * cache.stride
            )
        return cache.write(k, v, row, clock.live)

    def attend_to_cache(
        self, q: jax.Array, cache: KeyValueCache, newest: jax.Array, first: jax.Array, slot: jax.Array
    ) -> jax.Array:
        """q [B, H, K] sees the keys first [B] .. newest, as far as they are kept -> [B, H, K]."""
        keys, values = cache.read()
        if cache.relative is None:
            scores = jnp.einsum("bhk,bhnk->bhn", q, keys)
        else:
            content, position = self.content_and_position(q)
            r = cache.relative[0] if newest.ndim else lax.dynamic_index_in_dim(cache.relative, slot, keepdims=False)
            scores = jnp.einsum("bhk,bhnk->bhn", content, keys)
            by_lag = jnp.einsum("bhk,hnk->bhn", position, r)
            if newest.ndim:
                scores += align_each(by_lag, cache.lags(newest))
            else:
                scores += align_newest(by_lag, newest % r.shape[1])
        visible = cache.lags(newest) <= (newest - first)[:, None]
        probabilities = masked_softmax(scores * q.shape[-1] ** -0.5, visible[:, None])
        return jnp.einsum("bhn,bhnk->bhk", probabilities.astype(q.dtype), values)


def heads_first(x: jax.Array) -> jax.Array:
    """[B, G, P, H, K] -> [B, H, G P, K]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)


def masked_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Over the last axis where `visible`, exactly zero elsewhere; float32 at least."""
    return jnp.where(visible, jax.nn.softmax(jnp.where(visible, float32_at_least(scores), -jnp.inf)), 0)
