"""Shortening and upsampling (section 2 of the paper): one interface each, chosen by name.

A shortening maps groups of token vectors [B, G, k, D], already shifted right, to one vector each [B, G, D].
An upsampling maps the unshifted token vectors [B, G, k, D] and the shortened ones [B, G, D] to [B, G, k, D].
Both are built as `Method(config, shorten_factor, unit, rngs=rngs)`, where `unit` is the total factor of the
longer sequence, and called with `key=` for dropout. A new method is one class and one entry below.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.layers import linear
from hourglass_jax.nn.transformer import Block
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS


def to_groups(x: jax.Array, k: int, shift: int = 0) -> jax.Array:
    """[B, L, D] -> [B, ceil(L / k), k, D], moved right by `shift` positions with zeros entering on the left."""
    batch, length, d_model = x.shape
    groups = -(-length // k)
    x = jnp.pad(x, ((0, 0), (shift, k), (0, 0)))[:, : groups * k]
    return x.reshape(batch, groups, k, d_model)


class AverageShortening(nnx.Module):
    """The mean of each group."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return x.mean(axis=2)


class LinearShortening(nnx.Module):
    """A projection of the group's k vectors, concatenated slot by slot, to one."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        self.project = linear(config, shorten_factor * config.d_model, config.d_model, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.project(x.reshape(*x.shape[:2], -1))


class AttentionShortening(nnx.Module):
    """x' = S(x) + Attention(Q=S(x), K=V=x), then a feed-forward: a block whose queries are pooled groups."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, pool: type, rngs: nnx.Rngs):
        self.pool = pool(config, shorten_factor, unit, rngs=rngs)
        self.block = Block(config, cross=True, rngs=rngs)
        self.unit = unit

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        pooled = self.pool(x)[:, :, None]
        return self.block(pooled, x, unit=self.unit, key=key)[:, :, 0]


class RepeatUpsampling(nnx.Module):
    """Each shortened vector, k times."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: jax.Array, short: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return jnp.broadcast_to(short[:, :, None], x.shape)


class LinearUpsampling(nnx.Module):
    """A projection of each shortened vector to k."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        self.project = linear(config, config.d_model, shorten_factor * config.d_model, rngs=rngs)

    def __call__(self, x: jax.Array, short: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.project(short).reshape(x.shape)


class AttentionUpsampling(nnx.Module):
    """U + Attention(Q=U, K=V=x'), then a feed-forward, where U = x or x plus another upsampling of x'."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, base: type | None, rngs: nnx.Rngs):
        self.base = None if base is None else base(config, shorten_factor, unit, rngs=rngs)
        self.block = Block(config, cross=True, rngs=rngs)
        self.unit = unit

    def __call__(self, x: jax.Array, short: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        queries = x if self.base is None else x + self.base(x, short)
        return self.block(queries, short[:, :, None], unit=self.unit, key=key)


SHORTENINGS |= {
    "average": AverageShortening,
    "linear": LinearShortening,
    "attention_average": partial(AttentionShortening, pool=AverageShortening),
    "attention_linear": partial(AttentionShortening, pool=LinearShortening),
}

UPSAMPLINGS |= {
    "repeat": RepeatUpsampling,
    "linear": LinearUpsampling,
    "attention": partial(AttentionUpsampling, base=None),
    "attention_repeat": partial(AttentionUpsampling, base=RepeatUpsampling),
    "attention_linear": partial(AttentionUpsampling, base=LinearUpsampling),
}
