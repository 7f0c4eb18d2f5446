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

import jax
import jax.numpy as jnp
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.layers import Dropout, kernel_init, linear, split_key

QUERY_ROWS = 64  # rows of a query block; blocks never touch the upper triangle and recompute their scores


def sinusoids(distances: jax.Array, d_model: int) -> jax.Array:
    """R of Transformer-XL: [...] distances -> [..., d_model], sines in the first half, cosines in the second."""
    n = (d_model + 1) // 2
    frequencies = 10_000.0 ** (-jnp.arange(n) / n)
    angles = distances[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :d_model]


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions: x [..., H, K] at positions [...], pairs (i, i + K/2) turned by 10000^(-2i/K) a token."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[..., None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def slot_distances(groups: int, query_slots: int, key_slots: int, unit: int) -> jax.Array:
    """[G, P, S] in tokens; row e is for groups that lie G - 1 - e apart (farthest first)."""
    lag = jnp.arange(groups)[::-1, None, None] * (query_slots * key_slots)
    return unit * (lag + jnp.arange(query_slots)[:, None] - jnp.arange(key_slots))


def align_lags(x: jax.Array) -> jax.Array:
    """Turns scores by lag into scores by key: [..., b, N, S] -> [..., b, N, S].

    Row i belongs to query group N - b + i. Its entry e comes in for lag N - 1 - e and goes out at key group m,
    lag N - b + i - m; what lies beyond the diagonal is left undefined for the causal mask to cover.
    """
    *lead, b, n, s = x.shape
    padded = jnp.pad(x, [(0, 0)] * len(lead) + [(0, 0), (0, 1), (0, 0)])
    flat = padded.reshape(*lead, b * (n + 1), s)
    return flat[..., b - 1 : b - 1 + b * n, :].reshape(*lead, b, n, s)


class Attention(nnx.Module):
    """Multi-head attention with the configured positions; no bias in the query, key and value projections."""

    def __init__(self, config: HourglassConfig, *, rngs: nnx.Rngs):
        d_model = config.d_model
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

    def relative_keys(self, distances: jax.Array) -> jax.Array:
        """W_r R of the formula: [...] distances in tokens -> [..., H, K]."""
        d_model = self.relative.in_features
        return self.split_heads(self.relative(sinusoids(distances, d_model)))

    def __call__(self, queries: jax.Array, keys: jax.Array, *, unit: int, key: jax.Array | None = None) -> jax.Array:
        """[B, G, P, D], [B, G, S, D] -> [B, G, P, D]; `unit` in tokens; `key` turns dropout on."""
        _, groups, p, _ = queries.shape
        s = keys.shape[2]
        q, k, v = (self.split_heads(f(x)) for f, x in ((self.query, queries), (self.key, keys), (self.value, keys)))
        r = None
        if self.positions == "relative":
            r = self.relative_keys(slot_distances(groups, p, s, unit))
        elif self.positions == "rotary":
            start = jnp.arange(groups)[:, None] * (p * s)
            q = rotate(q, unit * (start + jnp.arange(p)))
            k = rotate(k, unit * (start + jnp.arange(s)))

        block = max(1, QUERY_ROWS // p)
        starts = range(0, groups, block)
        attend = jax.checkpoint(self.attend) if len(starts) > 1 else self.attend
        outputs = []
        for start, block_key in zip(starts, split_key(key, len(starts)), strict=True):
            end = min(start + block, groups)
            visible = None if r is None else r[groups - end :]
            outputs.append(attend(q[:, start:end], k[:, :end], v[:, :end], visible, block_key))
        out = jnp.concatenate(outputs, axis=1)
        return self.out(out.reshape(*out.shape[:-2], -1))

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, r: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """The last b of N groups attend: q [B, b, P, H, K], k, v [B, N, S, H, K], r [N, P, S, H, K] by lag."""
        b, n = q.shape[1], k.shape[1]
        if r is None:
            scores = jnp.einsum("bgphk,bmshk->bhpgms", q, k)
        else:
            scores = jnp.einsum("bgphk,bmshk->bhpgms", q + self.content_bias[...].astype(q.dtype), k)
            by_lag = jnp.einsum("bgphk,npshk->bhpgns", q + self.position_bias[...].astype(q.dtype), r)
            scores += align_lags(by_lag)
        causal = jnp.arange(n) <= jnp.arange(n - b, n)[:, None]
        probabilities = masked_softmax(scores * q.shape[-1] ** -0.5, causal[..., None]).astype(v.dtype)
        return jnp.einsum("bhpgms,bmshk->bgphk", self.dropout(probabilities, key), v)


def masked_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax over the last two axes where `visible`, exactly zero elsewhere; float32 at least."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=(-2, -1))
