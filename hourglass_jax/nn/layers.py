"""Linear layers with the configured initialisation, and dropout with an explicit key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hourglass_jax.config import HourglassConfig

NORMAL_STDDEV = 0.02


def kernel_init(config: HourglassConfig) -> nnx.Initializer:
    if config.initialization == "xavier":
        return nnx.initializers.xavier_uniform()
    return nnx.initializers.normal(NORMAL_STDDEV)


def linear(config: HourglassConfig, d_in: int, d_out: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        d_in, d_out, use_bias=bias, kernel_init=kernel_init(config), dtype=jnp.dtype(config.dtype), rngs=rngs
    )


def layer_norm(config: HourglassConfig, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over d_model; Flax takes mean and variance in float32 at least."""
    return nnx.LayerNorm(config.d_model, epsilon=1e-5, dtype=jnp.dtype(config.dtype), rngs=rngs)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 [*shape], hashed from each element's index and a seed drawn from `key`.

    A counter-based integer hash (the finaliser of MurmurHash3) fuses into its consumer: on a CPU a mask costs
    a fiftieth of one drawn by threefry. Good enough to drop units, not for anything else.
    """
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    index = jnp.full(shape, seeds[0], jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    bits = index * jnp.uint32(0x9E3779B9) ^ seeds[1]
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


class Dropout(nnx.Module):
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate).

    Acts only where it is given a key, and never after `model.eval()`.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if key is None or self.deterministic or self.rate == 0:
            return x
        keep = random_bits(key, x.shape) >= jnp.uint32(self.rate * 2**32)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """n keys, or n times None where there is no key."""
    return [None] * n if key is None else list(jax.random.split(key, n))
