"""Linear layers with the configured initialization, and dropout with an explicit key."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hourglass_jax.config import HourglassConfig, LevelConfig
from hourglass_jax.nn import cpu

_ROWS = 0x726F7773  # folded into a key, so that its row keys differ from its split keys


def kernel_init(config: HourglassConfig) -> nnx.Initializer:
    if config.initialization == "xavier":
        return nnx.initializers.xavier_uniform()
    return nnx.initializers.normal(0.02)


def flax_on_matrix(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return layer(x) for a Flax layer; see `cpu.on_matrix`. Flax layers require the standard dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return cpu.on_matrix(layer, x)


class Linear(nnx.Linear):
    """`nnx.Linear` on a matrix; see `cpu.on_matrix`."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return flax_on_matrix(super().__call__, x)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` on a matrix; see `cpu.on_matrix`."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return flax_on_matrix(super().__call__, x)


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` on a matrix; see `cpu.on_matrix`."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return flax_on_matrix(super().__call__, x)


def linear(config: HourglassConfig, d_in: int, d_out: int, *, bias: bool = True, rngs: nnx.Rngs) -> Linear:
    return Linear(d_in, d_out, use_bias=bias, kernel_init=kernel_init(config), dtype=jnp.dtype(config.dtype), rngs=rngs)


def residual_linear(config: HourglassConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> Linear:
    """Return a linear layer that ends a residual branch; see `HourglassConfig.residual_init`."""
    layer = linear(config, d_in, d_out, rngs=rngs)
    if config.residual_init == "zero":
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    return layer


def normalization(config: LevelConfig, *, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    """Return the configured norm over d_model; Flax computes its statistics in float32 at least."""
    norm = RMSNorm if config.normalization == "rms" else LayerNorm
    return norm(config.d_model, epsilon=1e-5, dtype=jnp.dtype(config.dtype), rngs=rngs)


def head_norm(config: LevelConfig, *, rngs: nnx.Rngs) -> RMSNorm | None:
    """Return the norm of each head's queries or keys, None without `HourglassConfig.qk_norm`."""
    return RMSNorm(config.head_dim, epsilon=1e-5, dtype=jnp.dtype(config.dtype), rngs=rngs) if config.qk_norm else None


def at_least_float32(dtype: Any) -> np.dtype:
    """Return `dtype`, or float32 if that is wider; the type of sums and probabilities."""
    return np.promote_types(jnp.dtype(dtype), np.float32)


def random_bits(key: jax.Array, shape: tuple[int, ...], skipped: jax.Array | int = 0) -> jax.Array:
    """Return uint32 [*shape]: a hash of each element's index, counted from `skipped`, with a seed drawn from `key`.

    The counter-based integer hash (the finalizer of MurmurHash3) fuses into its consumer. On a CPU a mask takes a
    fiftieth of the time that threefry takes. The hash is good enough for dropout, but not for other random numbers.
    """
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    index = jnp.full(shape, seeds[0] + jnp.uint32(skipped), jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return hashed(index, seeds[1])


def hashed(index: jax.Array, seed: jax.Array) -> jax.Array:
    """Hash uint32 to uint32; see `random_bits`."""
    bits = index * jnp.uint32(0x9E3779B9) ^ seed
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def dropped(x: jax.Array, rate: float, key: jax.Array, rows_before: jax.Array | int = 0) -> jax.Array:
    """Zero elements with probability `rate` and scale the others by 1 / (1 - rate).

    rows_before: number of rows before x in a larger array. A slice of rows gets the same mask as in the full array.
    """
    keep = random_bits(key, x.shape, rows_before * math.prod(x.shape[1:])) >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Dropout(nnx.Module):
    """Dropout, applied only with a key, and not after `model.eval()`."""

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        key = self.used(key)
        return x if key is None else dropped(x, self.rate, key)

    def used(self, key: jax.Array | None) -> jax.Array | None:
        """Return `key`, or None if dropout is off."""
        return None if self.deterministic or self.rate == 0 else key


def threefry(key: jax.Array) -> jax.Array:
    """Return `key`, or a threefry key drawn from it: under vmap, other implementations draw for the whole batch."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def keys_of_rows(key: jax.Array, n_rows: int) -> jax.Array:
    """Return a key for each row [n_rows], derived from `key` and the row index; unlike those of `split_key`."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(threefry(key), _ROWS)))(jnp.arange(n_rows))


def split_key(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """Split a key into n keys; return n times None without a key."""
    return [None] * n if key is None else list(jax.random.split(key, n))
