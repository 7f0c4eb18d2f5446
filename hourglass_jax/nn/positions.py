"""What attention knows of distances: Transformer-XL's sinusoids and rotary turns."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def angles_at(positions: jax.Array, n: int) -> jax.Array:
    """[...] -> [..., n]: angle i grows by 10000^(-i/n) a token."""
    frequencies = 10_000.0 ** (-jnp.arange(n) / n)
    return jnp.multiply.outer(jnp.asarray(positions, frequencies.dtype), frequencies)


def sinusoids(distances: jax.Array, d_model: int) -> jax.Array:
    """R of Transformer-XL: [...] distances -> [..., d_model], sines in the first half, cosines in the second."""
    angles = angles_at(distances, (d_model + 1) // 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :d_model]


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions: x [..., H, K] at positions [...], pairs (i, i + K/2) turned by 10000^(-2i/K) a token."""
    half = x.shape[-1] // 2
    angles = angles_at(positions, half)[..., None, :]
    angles = jnp.expand_dims(angles, range(x.ndim - angles.ndim))
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def slot_distances(groups: int, query_slots: int, key_slots: int, unit: int, *, causal: bool = True) -> jax.Array:
    """[G, P, S] in tokens; row e is for groups that lie G - 1 - e apart (farthest first).

    Not causal, [2 G - 1, P, S]: they go on to the keys that lie as far ahead.
    """
    lags = jnp.arange(0 if causal else 1 - groups, groups)
    lag = lags[::-1, None, None] * (query_slots * key_slots)
    return unit * (lag + jnp.arange(query_slots)[None, :, None] - jnp.arange(key_slots)[None, None])


def align_lags(x: jax.Array) -> jax.Array:
    """Turns scores by lag into scores by key: [..., b, N, S] -> [..., b, N, S].

    Row i belongs to query group N - b + i. Its entry e comes in for lag N - 1 - e and goes out at key group m,
    lag N - b + i - m; what lies beyond the diagonal is left undefined for the causal mask to cover. Where lags go on
    below 0, row i belongs to query group i, entry e is for lag b - 1 - e, and the first groups that come out are keys.
    """
    return align_padded_lags(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]))


def align_padded_lags(x: jax.Array) -> jax.Array:
    """`align_lags` of rows with one more entry at their end, whatever it is: [..., b, N + 1, S] -> [..., b, N, S]."""
    *lead, b, n_padded, s = x.shape
    n = n_padded - 1
    flat = x.reshape(*lead, b * n_padded, s)
    return flat[..., b - 1 : b - 1 + b * n, :].reshape(*lead, b, n, s)


def align_newest(x: jax.Array, newest: jax.Array) -> jax.Array:
    """Turns scores by lag into scores by key for the query of row `newest`: [..., n] -> [..., n].

    Entry e comes in for the key n - 1 - e rows before the newest; the rows are a ring, which ends at the newest.
    """
    n = x.shape[-1]
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, x], axis=-1), n - 1 - newest, n, axis=-1)


def align_each(x: jax.Array, lags: jax.Array) -> jax.Array:
    """`align_newest` for queries of different rows, from the lag of each key, int [B, n]: [B, H, n] -> [B, H, n]."""
    return jnp.take_along_axis(x, x.shape[-1] - 1 - lags[:, None], axis=-1)
