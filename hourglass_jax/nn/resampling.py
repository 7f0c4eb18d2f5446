"""Shortening and upsampling (section 2 of the paper): one interface each, chosen by name.

A shortening maps groups of token vectors [B, G, k, D], already shifted right, to one vector each [B, G, D].
An upsampling maps the unshifted token vectors [B, G, k, D] and the shortened ones [B, G, D] to [B, G, k, D].
Both are built as `Method(config, shorten_factor, unit, rngs=rngs)`, where `unit` is the total factor of the
longer sequence, and called with `key=` for dropout. A new method is one class and one entry in the registry; where
a group needs nothing but itself, the base class knows how to decode it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.cache import Clock, KeyValueCache
from hourglass_jax.nn.layers import linear
from hourglass_jax.nn.transformer import Block
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS


def to_groups(x: jax.Array, k: int, shift: int = 0) -> jax.Array:
    """[B, L, D] -> [B, ceil(L / k), k, D], moved right by `shift` positions with zeros entering on the left."""
    batch, length, d_model = x.shape
    groups = -(-length // k)
    x = jnp.pad(x, ((0, 0), (shift, k), (0, 0)))[:, : groups * k]
    return x.reshape(batch, groups, k, d_model)


class Shortening(nnx.Module):
    """A shortening's side of decoding; as it stands, for methods that look at one group alone."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Shifted groups [B, G, k, D] -> [B, G, D]; `key` turns dropout on."""
        raise NotImplementedError

    def init_cache(self, batch: int, max_length: int) -> Any:
        """What it remembers of a batch of rows of up to `max_length` tokens."""
        return None

    def prefill(self, x: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """A call on rows that begin at `start` [B] tokens, which fills the cache."""
        return self(x), cache

    def step(self, slots: jax.Array, cache: Any, clock: Clock) -> tuple[jax.Array, Any]:
        """One group's shifted vectors [B, k, D] -> [B, D]."""
        return self(slots[:, None])[:, 0], cache


class AverageShortening(Shortening):
    """The mean of each group."""

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return x.mean(axis=2)


class LinearShortening(Shortening):
    """A projection of the group's k vectors, concatenated slot by slot, to one."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        self.project = linear(config, shorten_factor * config.d_model, config.d_model, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.project(x.reshape(*x.shape[:2], -1))


class AttentionShortening(Shortening):
    """x' = S(x) + Attention(Q=S(x), K=V=x), then a feed-forward: a block whose queries are pooled groups."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, pool: type, rngs: nnx.Rngs):
        self.pool = pool(config, shorten_factor, unit, rngs=rngs)
        self.block = Block(config, unit, cross=True, key_slots=shorten_factor, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.block(self.pool(x)[:, :, None], x, key=key)[:, :, 0]

    def init_cache(self, batch: int, max_length: int) -> KeyValueCache:
        return self.block.attention.init_cache(batch, max_length)

    def prefill(self, x: jax.Array, cache: KeyValueCache, start: jax.Array) -> tuple[jax.Array, KeyValueCache]:
        short, cache = self.block.prefill(self.pool(x)[:, :, None], x, cache=cache, start=start)
        return short[:, :, 0], cache

    def step(self, slots: jax.Array, cache: KeyValueCache, clock: Clock) -> tuple[jax.Array, KeyValueCache]:
        return self.block.step(self.pool(slots[:, None])[:, 0], slots, cache=cache, clock=clock)


class Upsampling(nnx.Module):
    """An upsampling's side of decoding; as it stands, for methods that look at one group alone.

    A new shortened vector is handed over with `receive`, then each token of its group asks with `step`.
    """

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        self.shorten_factor = shorten_factor
        self.unit = unit
        self.cache_shape: tuple[int, ...] = (config.d_model,)
        self.cache_dtype = config.dtype

    def __call__(self, x: jax.Array, short: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Unshifted groups [B, G, k, D] and shortened vectors [B, G, D] -> [B, G, k, D]; `key` turns dropout on."""
        raise NotImplementedError

    def init_cache(self, batch: int, max_length: int) -> Any:
        """What it remembers of a batch of rows of up to `max_length` tokens: here the newest shortened vectors."""
        return jnp.zeros((batch, *self.cache_shape), self.cache_dtype)

    def prefill(self, x: jax.Array, short: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """A call on rows that begin at `start` [B] tokens and end with a group, which fills the cache."""
        return self(x, short), cache

    def receive(self, short: jax.Array, cache: Any, clock: Clock) -> Any:
        """The cache with a new group's shortened vector [B, D]."""
        return short

    def step(self, x: jax.Array, cache: Any, clock: Clock) -> jax.Array:
        """One token's vector [B, D] -> [B, D]; calls the method anew for each, so `receive` is for what is costly."""
        slots = jnp.broadcast_to(x[:, None, None], (x.shape[0], 1, self.shorten_factor, x.shape[1]))
        return self(slots, cache[:, None])[:, 0, self.slot(clock)]

    def slot(self, clock: Clock) -> jax.Array:
        """The token's place in its group."""
        return clock.time // self.unit % self.shorten_factor


class RepeatUpsampling(Upsampling):
    """Each shortened vector, k times."""

    def __call__(self, x: jax.Array, short: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return jnp.broadcast_to(short[:, :, None], x.shape)


class LinearUpsampling(Upsampling):
    """A projection of each shortened vector to k."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        super().__init__(config, shorten_factor, unit, rngs=rngs)
        self.cache_shape = (shorten_factor, config.d_model)
        self.project = linear(config, config.d_model, shorten_factor * config.d_model, rngs=rngs)

    def __call__(self, x: jax.Array, short: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.project(short).reshape(x.shape)

    def receive(self, short: jax.Array, cache: jax.Array, clock: Clock) -> jax.Array:
        return self.project(short).reshape(cache.shape)

    def step(self, x: jax.Array, cache: jax.Array, clock: Clock) -> jax.Array:
        return cache[:, self.slot(clock)]


class AttentionUpsampling(Upsampling):
    """U + Attention(Q=U, K=V=x'), then a feed-forward, where U = x or x plus another upsampling of x'."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, base: type | None, rngs: nnx.Rngs):
        self.base: Upsampling | None = None if base is None else base(config, shorten_factor, unit, rngs=rngs)
        self.block = Block(config, unit, cross=True, query_slots=shorten_factor, rngs=rngs)

    def __call__(self, x: jax.Array, short: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.block(self.queries(x, short), short[:, :, None], key=key)

    def queries(self, x: jax.Array, short: jax.Array) -> jax.Array:
        return x if self.base is None else x + self.base(x, short)

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        base = None if self.base is None else self.base.init_cache(batch, max_length)
        return {"base": base, "attention": self.block.attention.init_cache(batch, max_length)}

    def prefill(
        self, x: jax.Array, short: jax.Array, cache: dict[str, Any], start: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        queries, memory = self.queries(x, short), short[:, :, None]
        up, attention = self.block.prefill(queries, memory, cache=cache["attention"], start=start)
        return up, cache | {"attention": attention}

    def receive(self, short: jax.Array, cache: dict[str, Any], clock: Clock) -> dict[str, Any]:
        base = None if self.base is None else self.base.receive(short, cache["base"], clock)
        assert self.block.memory_norm is not None
        keys = self.block.memory_norm(short[:, None])
        return {"base": base, "attention": self.block.attention.write(keys, cache["attention"], clock)}

    def step(self, x: jax.Array, cache: dict[str, Any], clock: Clock) -> jax.Array:
        queries = x if self.base is None else x + self.base.step(x, cache["base"], clock)
        return self.block.step(queries, cache=cache["attention"], clock=clock)[0]


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
