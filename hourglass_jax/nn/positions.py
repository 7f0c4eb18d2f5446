"""Position encodings: Transformer-XL's sinusoids with its relative shift, and rotary positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def angles_at(positions: Int[Array, " ..."], n: int) -> Float[Array, "... n"]:
    """Return n angles for each position; angle i grows by 10000^(-i/n) per token."""
    frequencies = 10_000.0 ** (-jnp.arange(n) / n)
    return jnp.multiply.outer(jnp.asarray(positions, frequencies.dtype), frequencies)


def sinusoids(distances: Int[Array, " ..."], d_model: int) -> Float[Array, "... D"]:
    """Return R of Transformer-XL for distances in tokens: sines in the first half, cosines in the second."""
    angles = angles_at(distances, (d_model + 1) // 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :d_model]


def rotate(x: Float[Array, "... H K"], positions: Int[Array, " ..."]) -> Float[Array, "... H K"]:
    """Apply rotary positions (RoFormer): rotate the pairs (i, i + K/2) by position * 10000^(-2i/K)."""
    half = x.shape[-1] // 2
    angles = angles_at(positions, half)[..., None, :]
    angles = jnp.expand_dims(angles, range(x.ndim - angles.ndim))
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def slot_distances(
    groups: int, query_slots: int, key_slots: int, tokens_per_position: int, *, causal: bool = True
) -> Int[Array, "N P S"]:
    """Return the distances in tokens between slots of groups that are N - 1, N - 2, ... 0 groups apart, N = `groups`.

    If not causal, N = 2 `groups` - 1, and the distances continue to keys equally far ahead.
    """
    lags = jnp.arange(0 if causal else 1 - groups, groups)
    lag = lags[::-1, None, None] * (query_slots * key_slots)
    return tokens_per_position * (lag + jnp.arange(query_slots)[None, :, None] - jnp.arange(key_slots)[None, None])


def relative_shift(x: Float[Array, "... b N S"]) -> Float[Array, "... b N S"]:
    """Align scores by lag to scores by key, as Transformer-XL does (its appendix B).

    For b = N = 3 queries, S = 1 key slot per group, and a score q_i,lag in row i at column N - 1 - lag:

        lag 2  lag 1  lag 0           key 0  key 1  key 2
        q0,2   q0,1   q0,0            q0,0   .      .
        q1,2   q1,1   q1,0     ->     q1,1   q1,0   .
        q2,2   q2,1   q2,0            q2,2   q2,1   q2,0

    A row moves left by one less than the row before it: pad one column, flatten, drop the first b - 1 entries, and cut
    into rows again. Entries beyond the diagonal are undefined; the causal mask hides them. Row i is that of query group
    N - b + i. If not causal, lags continue below 0: row i is that of query group i and column e has lag b - 1 - e.
    """
    return relative_shift_padded(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]))


def relative_shift_padded(x: Float[Array, "... b N+1 S"]) -> Float[Array, "... b N S"]:
    """Apply `relative_shift` to rows that already have the additional column, of any value."""
    *lead, b, n_padded, s = x.shape
    n = n_padded - 1
    flat = x.reshape(*lead, b * n_padded, s)
    return flat[..., b - 1 : b - 1 + b * n, :].reshape(*lead, b, n, s)


def relative_shift_newest(x: Float[Array, "... n"], newest: Int[Array, ""]) -> Float[Array, "... n"]:
    """Apply `relative_shift` to one query whose keys are a ring up to row `newest`; column e has lag n - 1 - e."""
    n = x.shape[-1]
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, x], axis=-1), n - 1 - newest, n, axis=-1)


def relative_shift_each(x: Float[Array, "B H n"], lags: Int[Array, "B n"]) -> Float[Array, "B H n"]:
    """Apply `relative_shift_newest` to queries with different newest rows, given the lag of each key."""
    return jnp.take_along_axis(x, x.shape[-1] - 1 - lags[:, None], axis=-1)
