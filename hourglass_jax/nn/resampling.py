"""Shortening and upsampling (section 2 of the paper): one interface each, chosen by name.

A shortening maps token vectors [B, L, D], already shifted right, to one vector for each group [B, G, D]. An upsampling
maps the unshifted token vectors [B, L, D] and the shortened ones [B, G, D] to [B, L, D]. What a group is, `groups`
says: see the verbs of `nn.groups.Groups`.
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
from jax import lax

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.cache import Clock, where_live
from hourglass_jax.nn.groups import Groups
from hourglass_jax.nn.layers import linear
from hourglass_jax.nn.transformer import Block
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS


class Shortening(nnx.Module):
    """A shortening's side of decoding; as it stands, for methods that look at one group alone."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        """Shifted vectors [B, L, D] -> [B, G, D]; `key` turns dropout on."""
        raise NotImplementedError

    def init_cache(self, x: jax.Array, groups: Groups, max_length: int) -> Any:
        """What it remembers of a batch of rows of up to `max_length` tokens; x and groups are such as `step` has."""
        self(x, groups)
        return [jnp.zeros_like(total) for total in groups.rest]

    def prefill(self, x: jax.Array, groups: Groups, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """A call on rows that begin at `start` [B] tokens, which fills the cache."""
        return self(x, groups), groups.rest

    def step(self, x: jax.Array, groups: Groups, cache: Any, clock: Clock) -> tuple[jax.Array, Any]:
        """One group's vectors [B, k, D], or the newest of a group in progress [B, 1, D] -> [B, D]."""
        groups = groups.after(cache)
        return self(x, groups)[:, 0], where_live(clock.live, groups.rest, cache)


class AverageShortening(Shortening):
    """The mean of each group."""

    def __call__(self, x: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        return groups.mean(x)


class SelectShortening(Shortening):
    """The vector at which each group ends: what came before it, the layers before have put there."""

    def __call__(self, x: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        return groups.select(x)


class LinearShortening(Shortening):
    """A projection of the group's k vectors, concatenated slot by slot, to one."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        self.project = linear(config, shorten_factor * config.d_model, config.d_model, rngs=rngs)

    def __call__(self, x: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        slots = groups.slots(x)
        return self.project(slots.reshape(*slots.shape[:2], -1))


class AttentionShortening(Shortening):
    """x' = S(x) + Attention(Q=S(x), K=V=x), then a feed-forward: a block whose queries are pooled groups.

    A query sees its own group and those before it, or all; with groups of any length it stands where its event fires.
    """

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, pool: type, rngs: nnx.Rngs):
        self.pool = pool(config, shorten_factor, unit, rngs=rngs)
        self.by_event = config.ends_by_events(unit)
        self.block = Block(config, unit, cross=True, key_slots=1 if self.by_event else shorten_factor, rngs=rngs)
        self.block.attention.window = 0

    def __call__(self, x: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        pooled = self.pool(x, groups)
        if self.by_event:
            return self.block.attend_from(pooled, x, groups.when, key=key)[0]
        return self.block(pooled[:, :, None], groups.slots(x), mask=groups.slot_mask, key=key)[:, :, 0]

    def init_cache(self, x: jax.Array, groups: Groups, max_length: int) -> dict[str, Any]:
        pool = self.pool.init_cache(x, groups, max_length)
        return {"pool": pool, "attention": self.block.attention.init_cache(len(x), max_length)}

    def prefill(
        self, x: jax.Array, groups: Groups, cache: dict[str, Any], start: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        pooled, pool = self.pool.prefill(x, groups, cache["pool"], start)
        if self.by_event:
            first = start // self.block.attention.unit
            short, attention = self.block.attend_from(pooled, x, groups.when, first, cache=cache["attention"])
            return short, {"pool": pool, "attention": attention}
        slots = groups.slots(x)
        short, attention = self.block.prefill(pooled[:, :, None], slots, cache=cache["attention"], start=start)
        return short[:, :, 0], {"pool": pool, "attention": attention}

    def step(
        self, x: jax.Array, groups: Groups, cache: dict[str, Any], clock: Clock
    ) -> tuple[jax.Array, dict[str, Any]]:
        pooled, pool = self.pool.step(x, groups, cache["pool"], clock)
        if not self.by_event:
            short, attention = self.block.step(pooled, x, cache=cache["attention"], clock=clock)
            return short, {"pool": pool, "attention": attention}
        assert self.block.memory_norm is not None
        attention = self.block.attention.write(self.block.memory_norm(x), cache["attention"], clock)

        def attend() -> jax.Array:
            return self.block.step(pooled, cache=attention, clock=clock)[0]

        short = lax.cond(groups.due.any(), attend, lambda: pooled)
        return short, {"pool": pool, "attention": attention}


class Upsampling(nnx.Module):
    """An upsampling's side of decoding; as it stands, for methods that look at one group alone.

    A new shortened vector is handed over with `receive`, then each token of its group asks with `step`.
    """

    normed = True  # by the Hourglass, where norm='stack'

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        self.unit = unit
        self.cache_shape: tuple[int, ...] = (config.d_model,)
        self.cache_dtype = config.dtype

    def __call__(self, x: jax.Array, short: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        """Unshifted vectors [B, L, D] and shortened ones [B, G, D] -> [B, L, D]; `key` turns dropout on."""
        raise NotImplementedError

    def init_cache(self, batch: int, max_length: int) -> Any:
        """What it remembers of a batch of rows of up to `max_length` tokens: here the newest shortened vectors."""
        return jnp.zeros((batch, *self.cache_shape), self.cache_dtype)

    def prefill(
        self, x: jax.Array, short: jax.Array, groups: Groups, cache: Any, start: jax.Array
    ) -> tuple[jax.Array, Any]:
        """A call on rows that begin at `start` [B] tokens, which fills the cache."""
        return self(x, short, groups), groups.last(short, cache)

    def receive(self, short: jax.Array, groups: Groups, cache: Any, clock: Clock) -> Any:
        """The cache with a new group's shortened vector [B, D]."""
        return where_live(clock.live, short, cache)

    def step(self, x: jax.Array, groups: Groups, cache: Any, clock: Clock) -> jax.Array:
        """One token's vector [B, D] -> [B, D]; calls the method anew for each, so `receive` is for what is costly."""
        x = jnp.broadcast_to(x[:, None], (x.shape[0], groups.length, x.shape[1]))
        return groups.newest(self(x, cache[:, None], groups), clock.time // self.unit)


class RepeatUpsampling(Upsampling):
    """Each shortened vector at all positions of its group."""

    def __call__(self, x: jax.Array, short: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        return groups.spread(short)


class SmoothUpsampling(Upsampling):
    """The moving average of the shortened vectors, each with the weight p of its event, at all positions (H-Net).

    Where boundaries are given, p is 1 and there is nothing to smooth. Where they are learned, gradient reaches p from
    the average, and at each position from a factor of 1, which a norm would undo.
    """

    normed = False

    def __call__(self, x: jax.Array, short: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        return self.spread(self.averages(short, groups), groups)

    def spread(self, averages: jax.Array, groups: Groups) -> jax.Array:
        return (groups.certainty * groups.spread(averages)).astype(averages.dtype)

    def averages(self, short: jax.Array, groups: Groups, before: jax.Array | None = None) -> jax.Array:
        """[B, G, D] -> [B, G, D]; `before` [B, 1, D] is that of the group before them, if any."""
        if groups.p is None:
            return short
        p = groups.select(groups.p[..., None])
        if before is not None:
            return (p * short + (1 - p) * before).astype(short.dtype)
        return moving_average(short, p).astype(short.dtype)

    def prefill(
        self, x: jax.Array, short: jax.Array, groups: Groups, cache: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        averages = self.averages(short, groups)
        return self.spread(averages, groups), groups.last(averages, cache)

    def receive(self, short: jax.Array, groups: Groups, cache: jax.Array, clock: Clock) -> jax.Array:
        return where_live(clock.live, self.averages(short[:, None], groups, cache[:, None])[:, 0], cache)

    def step(self, x: jax.Array, groups: Groups, cache: jax.Array, clock: Clock) -> jax.Array:
        return groups.newest(groups.spread(cache[:, None]), clock.time // self.unit)


class LinearUpsampling(Upsampling):
    """A projection of each shortened vector to k."""

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, rngs: nnx.Rngs):
        super().__init__(config, shorten_factor, unit, rngs=rngs)
        self.cache_shape = (shorten_factor, config.d_model)
        self.project = linear(config, config.d_model, shorten_factor * config.d_model, rngs=rngs)

    def __call__(self, x: jax.Array, short: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        return groups.positions(self.project(short).reshape(*short.shape[:2], *self.cache_shape))

    def receive(self, short: jax.Array, groups: Groups, cache: jax.Array, clock: Clock) -> jax.Array:
        return self.project(short).reshape(cache.shape)

    def step(self, x: jax.Array, groups: Groups, cache: jax.Array, clock: Clock) -> jax.Array:
        return groups.newest(cache, clock.time // self.unit)


class AttentionUpsampling(Upsampling):
    """U + Attention(Q=U, K=V=x'), then a feed-forward, where U = x or x plus another upsampling of x'.

    With groups of any length distances count whole groups, each as the tokens that it is expected to have.
    """

    def __init__(self, config: HourglassConfig, shorten_factor: int, unit: int, *, base: type | None, rngs: nnx.Rngs):
        self.base: Upsampling | None = None if base is None else base(config, shorten_factor, unit, rngs=rngs)
        self.by_event = config.ends_by_events(unit)
        unit, slots = (unit * shorten_factor, 1) if self.by_event else (unit, shorten_factor)
        self.block = Block(config, unit, cross=True, query_slots=slots, rngs=rngs)

    def __call__(self, x: jax.Array, short: jax.Array, groups: Groups, *, key: jax.Array | None = None) -> jax.Array:
        queries = self.queries(x, short, groups)
        if self.by_event:
            return self.block.attend_from(queries, short, groups.served, key=key)[0]
        return groups.positions(self.block(queries, short[:, :, None], mask=groups.mask, key=key))

    def queries(self, x: jax.Array, short: jax.Array, groups: Groups) -> jax.Array:
        """[B, G, k, D], with groups of any length [B, L, D]."""
        if self.by_event:
            return x if self.base is None else x + self.base(x, short, groups)
        slots = groups.slots(x)
        return slots if self.base is None else slots + groups.slots(self.base(x, short, groups))

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        base = None if self.base is None else self.base.init_cache(batch, max_length)
        return {"base": base, "attention": self.block.attention.init_cache(batch, max_length)}

    def prefill(
        self, x: jax.Array, short: jax.Array, groups: Groups, cache: dict[str, Any], start: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        queries, attention = self.queries(x, short, groups), cache["attention"]
        base = None if self.base is None else self.base.prefill(x, short, groups, cache["base"], start)[1]
        if self.by_event:
            up, attention = self.block.attend_from(queries, short, groups.served, cache=attention)
        else:
            up, attention = self.block.prefill(queries, short[:, :, None], cache=attention, start=start)
            up = groups.positions(up)
        return up, {"base": base, "attention": attention}

    def receive(self, short: jax.Array, groups: Groups, cache: dict[str, Any], clock: Clock) -> dict[str, Any]:
        base = None if self.base is None else self.base.receive(short, groups, cache["base"], clock)
        assert self.block.memory_norm is not None
        keys = self.block.memory_norm(short[:, None])
        return {"base": base, "attention": self.block.attention.write(keys, cache["attention"], clock)}

    def step(self, x: jax.Array, groups: Groups, cache: dict[str, Any], clock: Clock) -> jax.Array:
        queries = x if self.base is None else x + self.base.step(x, groups, cache["base"], clock)
        return self.block.step(queries, cache=cache["attention"], clock=groups.query_clock(clock))[0]


def moving_average(z: jax.Array, p: jax.Array) -> jax.Array:
    """a[g] = p[g] z[g] + (1 - p[g]) a[g - 1], from a[-1] = 0: [B, G, D], [B, G, 1] -> [B, G, D], float32 at least."""

    def one_after_the_other(
        first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return first[0] * then[0], then[0] * first[1] + then[1]

    return lax.associative_scan(one_after_the_other, (1 - p, p * z), axis=1)[1]


SHORTENINGS |= {
    "average": AverageShortening,
    "linear": LinearShortening,
    "attention_average": partial(AttentionShortening, pool=AverageShortening),
    "attention_linear": partial(AttentionShortening, pool=LinearShortening),
    "select": SelectShortening,
}

UPSAMPLINGS |= {
    "repeat": RepeatUpsampling,
    "linear": LinearUpsampling,
    "attention": partial(AttentionUpsampling, base=None),
    "attention_repeat": partial(AttentionUpsampling, base=RepeatUpsampling),
    "attention_linear": partial(AttentionUpsampling, base=LinearUpsampling),
    "smooth": SmoothUpsampling,
}
