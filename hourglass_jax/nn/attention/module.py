"""Attention between groups of positions: one module for self-attention, shortening and upsampling.

Queries [B, G, P, D] and keys [B, G, S, D] have G groups of P query slots and S key slots; P or S is 1. A query in group
g attends to all keys of groups m <= g, or of all groups if not causal. The causal cases are

    self-attention         P = S = 1       position i attends to positions j <= i
    attention shortening   P = 1, S = k    group g attends to the shifted positions of groups <= g
    attention upsampling   P = k, S = 1    position t attends to the shortened vectors of groups <= t // k

The distance from query slot (g, p) to key slot (m, s) is `tokens_per_position * ((g - m) * P * S + p - s)` tokens,
where `tokens_per_position` is the total factor of the longer sequence. So distances are in tokens at every level.
`plain` has the formula.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hourglass_jax.config import LevelConfig
from hourglass_jax.nn import cpu
from hourglass_jax.nn.attention.choice import attend
from hourglass_jax.nn.attention.pattern import Inputs, Pattern, upcast
from hourglass_jax.nn.cache import Clock, KeyValueCache
from hourglass_jax.nn.layers import Dropout, dropped, head_norm, kernel_init, linear, residual_linear
from hourglass_jax.nn.positions import relative_shift_each, relative_shift_newest, rotate, sinusoids, slot_distances

HIDDEN = -1e30  # score of a masked key; unlike -inf, it has a finite derivative


class Attention(nnx.Module):
    """Multi-head attention with relative, rotary or no position encoding (`positions`)."""

    def __init__(
        self,
        config: LevelConfig,
        tokens_per_position: int,
        *,
        query_slots: int = 1,
        key_slots: int = 1,
        window: int = 0,
        rngs: nnx.Rngs,
    ):
        d_model, d_heads, bias = config.d_model, config.n_heads * config.head_dim, config.qkv_bias
        self.tokens_per_position, self.query_slots, self.key_slots = tokens_per_position, query_slots, key_slots
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.window = window  # positions; only of self-attention
        self.own_time = config.event_levels > 0 and tokens_per_position > config.shared_factor
        self.positions, self.implementation, self.causal = config.positions, config.attention, config.causal
        self.query = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.key = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.value = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.query_norm, self.key_norm = head_norm(config, rngs=rngs), head_norm(config, rngs=rngs)
        self.out = residual_linear(config, d_heads, d_model, rngs=rngs)
        self.dropout = Dropout(config.dropout)
        if self.positions == "relative":
            shape = (config.n_heads, config.head_dim)
            self.relative = linear(config, d_model, d_heads, bias=False, rngs=rngs)
            self.content_bias = nnx.Param(kernel_init(config)(rngs.params(), shape, jnp.float32))  # u of the formula
            self.position_bias = nnx.Param(kernel_init(config)(rngs.params(), shape, jnp.float32))  # v

    def split_heads(self, x: Float[Array, "... HK"]) -> Float[Array, "... H K"]:
        return x.reshape(*x.shape[:-1], self.n_heads, -1)

    def merge_heads(self, x: Float[Array, "... H K"]) -> Float[Array, "... D"]:
        return self.out(x.reshape(*x.shape[:-2], -1))

    def queries(self, x: Float[Array, "... D"]) -> Float[Array, "... H K"]:
        """Return each head's queries, normalized if configured."""
        q = self.split_heads(self.query(x))
        return q if self.query_norm is None else self.query_norm(q)

    def keys_and_values(self, x: Float[Array, "... D"]) -> tuple[Float[Array, "... H K"], Float[Array, "... H K"]]:
        """Return each head's keys, normalized if configured, and values."""
        k, v = self.split_heads(self.key(x)), self.split_heads(self.value(x))
        return k if self.key_norm is None else self.key_norm(k), v

    def relative_keys(self, distances: Int[Array, " ..."]) -> Float[Array, "... H K"]:
        """Return W_r R of the formula for distances in tokens."""
        d_model = self.relative.in_features
        return self.split_heads(self.relative(sinusoids(distances, d_model)))

    def content_and_position(
        self, q: Float[Array, "B ... H K"]
    ) -> tuple[Float[Array, "B ... H K"], Float[Array, "B ... H K"]]:
        """Return q + u, which is multiplied with keys, and q + v, which is multiplied with relative keys."""
        biases = (bias[...].astype(q.dtype) for bias in (self.content_bias, self.position_bias))
        content, position = (q + jnp.expand_dims(bias, range(q.ndim - 2)) for bias in biases)
        return content, position

    def __call__(
        self,
        queries: Float[Array, "B G P D"],
        keys: Float[Array, "B G S D"],
        *,
        mask: Bool[Array, "B GS"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B G P D"]:
        """Attend from queries to keys; `key` turns dropout on.

        mask: true for keys that are not padding; only if not causal.
        """
        return self.merge_heads(self.attend(*self.project(queries, keys), padding=mask, key=key))

    def project(
        self, queries: Float[Array, "B G P D"], keys: Float[Array, "B G S D"]
    ) -> tuple[Float[Array, "B G P H K"], Float[Array, "B G S H K"], Float[Array, "B G S H K"]]:
        """Return q, k and v; q and k are rotated if positions are rotary."""
        q, (k, v) = self.queries(queries), self.keys_and_values(keys)
        if self.positions == "rotary":
            start = jnp.arange(q.shape[1])[:, None] * (self.query_slots * self.key_slots)
            q = rotate(q, self.tokens_per_position * (start + jnp.arange(self.query_slots)[None]))
            k = rotate(k, self.tokens_per_position * (start + jnp.arange(self.key_slots)[None]))
        return q, k, v

    def attend(
        self,
        q: Float[Array, "B G P H K"],
        k: Float[Array, "B G S H K"],
        v: Float[Array, "B G S H K"],
        *,
        padding: Array | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B G P H K"]:
        """Attend with the configured implementation; `Pattern` describes `padding`."""
        scale = self.head_dim**-0.5
        q_position = r = None
        if self.positions == "relative":
            lags = min(q.shape[1], self.window or q.shape[1])
            distances = slot_distances(
                lags, self.query_slots, self.key_slots, self.tokens_per_position, causal=self.causal
            )
            r = jnp.einsum("gpshk->phgsk", self.relative_keys(distances))
            r = r.reshape(*r.shape[:2], -1, self.head_dim)
            q, q_position = self.content_and_position(q)
            q_position = heads_first(q_position * scale)
        inputs = Inputs(heads_first(q * scale), heads_first(k), heads_first(v), q_position, r)
        pattern = Pattern(self.query_slots, self.key_slots, self.dropout.rate, self.window, self.causal)
        out = attend(self.implementation, pattern, inputs, padding, self.dropout.used(key))
        return out.swapaxes(1, 2).reshape(q.shape)

    def attend_from(
        self,
        queries: Float[Array, "B N D"],
        keys: Float[Array, "B M D"],
        places: Int[Array, "B N"],
        first: Any = 0,
        *,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B M H K"], Float[Array, "B M H K"]]:
        """Attend from queries at `places` to keys first .. place; used by groups of variable length.

        Args:
            places: the last key that each query attends to; a query at -1 has no keys, and its result is zero.
            first: int [B] or [1], the first key that is not padding.

        Returns:
            The result, and the projected keys and values for a cache.
        """
        q, (k, v) = self.queries(queries), self.keys_and_values(keys)
        rows = jnp.arange(keys.shape[1], dtype=jnp.int32)
        content = q
        if self.positions == "rotary":
            content, k = rotate(q, self.tokens_per_position * places), rotate(k, self.tokens_per_position * rows)
        elif self.positions == "relative":
            content, position = self.content_and_position(q)
        scores = jnp.einsum("bnhk,bmhk->bhnm", content, k)
        if self.positions == "relative":
            by_lag = jnp.einsum("bnhk,mhk->bhnm", position, self.relative_keys(self.tokens_per_position * rows))
            lags = jnp.maximum(places[:, None, :, None] - rows[None, None, None], 0)
            scores += jnp.take_along_axis(by_lag, lags, axis=-1)
        visible = (rows[None, None] <= places[..., None]) & (rows[None, None] >= jnp.reshape(first, (-1, 1, 1)))
        scores = upcast(scores) * self.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, HIDDEN)) * visible[:, None].astype(scores.dtype)
        if (dropout_key := self.dropout.used(key)) is not None:
            weights = dropped(weights, self.dropout.rate, dropout_key)
        return self.merge_heads(jnp.einsum("bhnm,bmhk->bnhk", weights.astype(v.dtype), v)), k, v

    def init_cache(self, batch: int, max_length: int) -> KeyValueCache:
        """Return an empty cache for `max_length` tokens, a multiple of the stride, or for a shorter window.

        Below variable boundaries it holds all keys, since the newest ones of a prompt differ between rows.
        """
        stride = self.tokens_per_position * self.query_slots
        rows = max_length // stride
        if self.window and not self.own_time:
            rows = min(rows, self.window)
        relative = None
        if self.positions == "relative":
            slots = jnp.arange(self.query_slots)[:, None] + 1 - self.key_slots
            relative = self.relative_keys(
                jnp.arange(rows)[None, ::-1] * stride + self.tokens_per_position * slots
            ).swapaxes(1, 2)
        keys, values = jnp.zeros((2, batch, self.n_heads, rows, self.head_dim), self.out.dtype)
        return KeyValueCache(keys, values, relative, stride, self.positions == "rotary")

    def prefill(
        self,
        queries: Float[Array, "B G P D"],
        keys: Float[Array, "B G S D"],
        cache: KeyValueCache,
        start: Int[Array, " B"],
    ) -> tuple[Float[Array, "B G P D"], KeyValueCache]:
        """Process rows that begin at token `start`, and store their keys and values from row 0 on."""
        q, k, v = self.project(queries, keys)
        out = self.attend(q, k, v, padding=start // (self.tokens_per_position * self.query_slots * self.key_slots))
        k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
        return self.merge_heads(out), cache.write(k, v, row=0)

    def step(
        self,
        query: Float[Array, "B D"],
        keys: Float[Array, "B S D"] | Float[Array, "B D"] | None,
        cache: KeyValueCache,
        clock: Clock,
    ) -> tuple[Float[Array, "B D"], KeyValueCache]:
        """Decode one query at `clock.time`; `keys`, if any, are the new keys of its group.

        With a time for each row, only live rows store their keys.
        """
        if keys is not None:
            cache = self.write(keys, cache, clock)
        q = self.queries(query)
        slot = clock.time // self.tokens_per_position % self.query_slots
        if cache.rotary:
            q = rotate(q, clock.time)
        newest = self.group_row(clock) + self.key_slots - 1
        first = clock.start // cache.stride
        out = cpu.in_own_branch(self.attend_to_cache, jnp.all(newest >= 0), q, cache, newest, first, slot)
        return self.merge_heads(out), cache

    def group_row(self, clock: Clock) -> Int[Array, " *B"]:
        """Return the index of the current group's first key."""
        return clock.time // (self.tokens_per_position * self.query_slots * self.key_slots) * self.key_slots

    def write(
        self, keys: Float[Array, "B S D"] | Float[Array, "B D"], cache: KeyValueCache, clock: Clock
    ) -> KeyValueCache:
        """Store the keys and values of the current group in the cache."""
        row = self.group_row(clock)
        keys = keys.reshape(keys.shape[0], self.key_slots, -1)
        k, v = self.keys_and_values(keys)
        if cache.rotary:
            k = rotate(
                k, (jnp.reshape(row, (-1, 1)) + jnp.arange(self.key_slots, dtype=jnp.int32)[None]) * cache.stride
            )
        return cache.write(k, v, row, clock.live)

    def attend_to_cache(
        self,
        q: Float[Array, "B H K"],
        cache: KeyValueCache,
        newest: Int[Array, " *B"],
        first: Int[Array, " B"],
        slot: Int[Array, " *B"],
    ) -> Float[Array, "B H K"]:
        """Attend from q, in query slot `slot`, to the cached keys first .. newest.

        `newest` and `slot` are scalars, or have one value for each row.
        """
        keys, values = cache.read()
        if cache.relative is None:
            scores = jnp.einsum("bhk,bhnk->bhn", q, keys)
        else:
            content, position = self.content_and_position(q)
            r = cache.relative[0] if newest.ndim else lax.dynamic_index_in_dim(cache.relative, slot, keepdims=False)
            scores = jnp.einsum("bhk,bhnk->bhn", content, keys)
            by_lag = jnp.einsum("bhk,hnk->bhn", position, r)
            if newest.ndim:
                scores += relative_shift_each(by_lag, cache.lags(newest))
            else:
                scores += relative_shift_newest(by_lag, newest % r.shape[1])
        visible = cache.lags(newest) <= (newest - first)[:, None]
        if self.window:
            visible &= cache.lags(newest) < self.window
        probabilities = masked_softmax(scores * q.shape[-1] ** -0.5, visible[:, None])
        return jnp.einsum("bhn,bhnk->bhk", probabilities.astype(q.dtype), values)


def heads_first(x: Float[Array, "B G P H K"]) -> Float[Array, "B H GP K"]:
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)


def masked_softmax(scores: Float[Array, "... n"], visible: Bool[Array, "... n"]) -> Float[Array, "... n"]:
    """Return the softmax over the visible entries of the last axis, in float32 or wider; others are exactly zero."""
    return jnp.where(visible, jax.nn.softmax(jnp.where(visible, upcast(scores), -jnp.inf)), 0)
