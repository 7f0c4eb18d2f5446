"""Shortening and upsampling (section 2 of the paper): one interface each, chosen by name.

A shortening maps vectors of positions [B, L, D], already shifted right, to one vector for each group [B, G, D]. An
upsampling maps the unshifted vectors [B, L, D] and the shortened ones [B, G, D] to [B, L, D]. Both are written with the
methods of `nn.groups.Groups`, so that one class serves groups of fixed and of variable length.

Both are constructed as `Method(config, shorten_factor, tokens_per_position, rngs=rngs)`, where `tokens_per_position` is
the total factor of the longer sequence. Both are called with `key=` for dropout. A new method is one class and one
entry in the registry. The base classes implement cached decoding for methods in which a group depends only on its own
positions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from hourglass_jax.config import LevelConfig
from hourglass_jax.nn.cache import Clock, where_live
from hourglass_jax.nn.groups import Groups
from hourglass_jax.nn.layers import linear
from hourglass_jax.nn.transformer import Block
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS


class Shortening(nnx.Module):
    """Base class of shortenings; its decoding is for methods in which a group depends on its own positions only."""

    def __init__(self, config: LevelConfig, shorten_factor: int, tokens_per_position: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: Float[Array, "B L D"], groups: Groups, *, key: Array | None = None) -> Float[Array, "B G D"]:
        """Pool the shifted vectors of each group; `key` turns dropout on."""
        raise NotImplementedError

    def init_cache(self, x: Float[Array, "B n D"], groups: Groups, max_length: int) -> Any:
        """Return an empty cache for rows of up to `max_length` tokens; `x` and `groups` are examples of `step`'s."""
        self(x, groups)
        return [jnp.zeros_like(total) for total in groups.carry]

    def prefill(
        self, x: Float[Array, "B L D"], groups: Groups, cache: Any, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B G D"], Any]:
        """Apply the method to rows that begin at token `start`, and fill the cache."""
        return self(x, groups), groups.carry

    def step(
        self, x: Float[Array, "B n D"], groups: Groups, cache: Any, clock: Clock
    ) -> tuple[Float[Array, "B D"], Any]:
        """Pool one group of n = k positions, or add the newest position (n = 1) of a group in progress."""
        groups = groups.with_carry(cache)
        return self(x, groups)[:, 0], where_live(clock.live, groups.carry, cache)


class AverageShortening(Shortening):
    """The mean of each group."""

    def __call__(self, x: Float[Array, "B L D"], groups: Groups, *, key: Array | None = None) -> Float[Array, "B G D"]:
        return groups.mean(x)


class SelectShortening(Shortening):
    """The newest vector of each group; the pre layers have added information from the others."""

    def __call__(self, x: Float[Array, "B L D"], groups: Groups, *, key: Array | None = None) -> Float[Array, "B G D"]:
        return groups.select(x)


class LinearShortening(Shortening):
    """A linear projection of the group's k concatenated vectors to one."""

    def __init__(self, config: LevelConfig, shorten_factor: int, tokens_per_position: int, *, rngs: nnx.Rngs):
        self.project = linear(config, shorten_factor * config.d_model, config.d_model, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], groups: Groups, *, key: Array | None = None) -> Float[Array, "B G D"]:
        slots = groups.slots(x)
        return self.project(slots.reshape(*slots.shape[:2], -1))


class AttentionShortening(Shortening):
    """x' = S(x) + Attention(Q=S(x), K=V=x), then a feed-forward network, where S is another shortening.

    A query attends to the positions of its own group and of all groups before it, or to all if not causal.
    """

    def __init__(
        self, config: LevelConfig, shorten_factor: int, tokens_per_position: int, *, pool: type, rngs: nnx.Rngs
    ):
        self.pool = pool(config, shorten_factor, tokens_per_position, rngs=rngs)
        key_slots = 1 if config.ends_by_events(tokens_per_position) else shorten_factor
        self.block = Block(config, tokens_per_position, cross=True, key_slots=key_slots, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], groups: Groups, *, key: Array | None = None) -> Float[Array, "B G D"]:
        return groups.attend_to_positions(self.block, self.pool(x, groups), x, key=key)

    def init_cache(self, x: Float[Array, "B n D"], groups: Groups, max_length: int) -> dict[str, Any]:
        pool = self.pool.init_cache(x, groups, max_length)
        return {"pool": pool, "attention": self.block.attention.init_cache(len(x), max_length)}

    def prefill(
        self, x: Float[Array, "B L D"], groups: Groups, cache: dict[str, Any], start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B G D"], dict[str, Any]]:
        pooled, pool = self.pool.prefill(x, groups, cache["pool"], start)
        short, attention = groups.prefill_to_positions(self.block, pooled, x, cache["attention"], start)
        return short, {"pool": pool, "attention": attention}

    def step(
        self, x: Float[Array, "B n D"], groups: Groups, cache: dict[str, Any], clock: Clock
    ) -> tuple[Float[Array, "B D"], dict[str, Any]]:
        pooled, pool = self.pool.step(x, groups, cache["pool"], clock)
        short, attention = groups.step_to_positions(self.block, pooled, x, cache["attention"], clock)
        return short, {"pool": pool, "attention": attention}


class Upsampling(nnx.Module):
    """Base class of upsamplings; its decoding is for methods in which a position depends on its own group only.

    In decoding, `receive` stores a new shortened vector, and `step` computes each token of its group from it.
    """

    normed = True  # whether the Hourglass normalizes the result with norm='stack'

    def __init__(self, config: LevelConfig, shorten_factor: int, tokens_per_position: int, *, rngs: nnx.Rngs):
        self.tokens_per_position = tokens_per_position
        self.cache_shape: tuple[int, ...] = (config.d_model,)
        self.cache_dtype = config.dtype

    def __call__(
        self, x: Float[Array, "B L D"], short: Float[Array, "B G D"], groups: Groups, *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        """Upsample `short` beside the unshifted vectors `x`; `key` turns dropout on."""
        raise NotImplementedError

    def init_cache(self, batch: int, max_length: int) -> Any:
        """Return an empty cache for rows of up to `max_length` tokens: here for the newest shortened vector."""
        return jnp.zeros((batch, *self.cache_shape), self.cache_dtype)

    def prefill(
        self,
        x: Float[Array, "B L D"],
        short: Float[Array, "B G D"],
        groups: Groups,
        cache: Any,
        start: Int[Array, " B"],
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Apply the method to rows that begin at token `start`, and fill the cache."""
        return self(x, short, groups), groups.last(short, cache)

    def receive(self, short: Float[Array, "B D"], groups: Groups, cache: Any, clock: Clock) -> Any:
        """Return the cache with a new group's shortened vector."""
        return where_live(clock.live, short, cache)

    def step(self, x: Float[Array, "B D"], groups: Groups, cache: Any, clock: Clock) -> Float[Array, "B D"]:
        """Upsample at one token. Override `receive` for work that is the same for all tokens of a group."""
        x = jnp.broadcast_to(x[:, None], (x.shape[0], groups.length, x.shape[1]))
        return groups.newest(self(x, cache[:, None], groups), clock.time // self.tokens_per_position)


class RepeatUpsampling(Upsampling):
    """Each shortened vector at all positions of its group."""

    def __call__(
        self, x: Float[Array, "B L D"], short: Float[Array, "B G D"], groups: Groups, *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        return groups.spread(short)


class SmoothUpsampling(Upsampling):
    """H-Net's smoothing: a moving average of the shortened vectors, weighted by their boundary probability.

    The average passes gradients to the boundary probability; a second factor of value 1 does so at each position. A
    norm would cancel that factor. Without learned boundaries the result equals repetition.
    """

    normed = False

    def __call__(
        self, x: Float[Array, "B L D"], short: Float[Array, "B G D"], groups: Groups, *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        return self.spread(self.averages(short, groups), groups)

    def spread(self, averages: Float[Array, "B G D"], groups: Groups) -> Float[Array, "B L D"]:
        return (groups.certainty * groups.spread(averages)).astype(averages.dtype)

    def averages(
        self, short: Float[Array, "B G D"], groups: Groups, before: Float[Array, "B 1 D"] | None = None
    ) -> Float[Array, "B G D"]:
        """Return the moving average; `before` is that of the preceding group, if any."""
        if groups.boundary_prob is None:
            return short
        p = groups.select(groups.boundary_prob[..., None])
        if before is not None:
            return (p * short + (1 - p) * before).astype(short.dtype)
        return moving_average(short, p).astype(short.dtype)

    def prefill(
        self,
        x: Float[Array, "B L D"],
        short: Float[Array, "B G D"],
        groups: Groups,
        cache: Array,
        start: Int[Array, " B"],
    ) -> tuple[Float[Array, "B L D"], Array]:
        averages = self.averages(short, groups)
        return self.spread(averages, groups), groups.last(averages, cache)

    def receive(self, short: Float[Array, "B D"], groups: Groups, cache: Array, clock: Clock) -> Array:
        return where_live(clock.live, self.averages(short[:, None], groups, cache[:, None])[:, 0], cache)

    def step(self, x: Float[Array, "B D"], groups: Groups, cache: Array, clock: Clock) -> Float[Array, "B D"]:
        return groups.newest(groups.spread(cache[:, None]), clock.time // self.tokens_per_position)


class LinearUpsampling(Upsampling):
    """A linear projection of each shortened vector to k vectors."""

    def __init__(self, config: LevelConfig, shorten_factor: int, tokens_per_position: int, *, rngs: nnx.Rngs):
        super().__init__(config, shorten_factor, tokens_per_position, rngs=rngs)
        self.cache_shape = (shorten_factor, config.d_model)
        self.project = linear(config, config.d_model, shorten_factor * config.d_model, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], short: Float[Array, "B G D"], groups: Groups, *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        return groups.positions(self.project(short).reshape(*short.shape[:2], *self.cache_shape))

    def receive(self, short: Float[Array, "B D"], groups: Groups, cache: Array, clock: Clock) -> Array:
        return self.project(short).reshape(cache.shape)

    def step(self, x: Float[Array, "B D"], groups: Groups, cache: Array, clock: Clock) -> Float[Array, "B D"]:
        return groups.newest(cache, clock.time // self.tokens_per_position)


class AttentionUpsampling(Upsampling):
    """U + Attention(Q=U, K=V=x'), then a feed-forward network, where U = x or x plus another upsampling of x'.

    With groups of variable length, each group counts as k positions, its expected length, in relative distances.
    """

    def __init__(
        self,
        config: LevelConfig,
        shorten_factor: int,
        tokens_per_position: int,
        *,
        base: type | None,
        rngs: nnx.Rngs,
    ):
        self.base: Upsampling | None = (
            None if base is None else base(config, shorten_factor, tokens_per_position, rngs=rngs)
        )
        by_events = config.ends_by_events(tokens_per_position)
        tokens_per_position, query_slots = (
            (tokens_per_position * shorten_factor, 1) if by_events else (tokens_per_position, shorten_factor)
        )
        self.block = Block(config, tokens_per_position, cross=True, query_slots=query_slots, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], short: Float[Array, "B G D"], groups: Groups, *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        return groups.attend_to_groups(self.block, self.queries(x, short, groups), short, key=key)

    def queries(self, x: Float[Array, "B L D"], short: Float[Array, "B G D"], groups: Groups) -> Float[Array, "B L D"]:
        """Return U of the formula."""
        return x if self.base is None else x + self.base(x, short, groups)

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        base = None if self.base is None else self.base.init_cache(batch, max_length)
        return {"base": base, "attention": self.block.attention.init_cache(batch, max_length)}

    def prefill(
        self,
        x: Float[Array, "B L D"],
        short: Float[Array, "B G D"],
        groups: Groups,
        cache: dict[str, Any],
        start: Int[Array, " B"],
    ) -> tuple[Float[Array, "B L D"], dict[str, Any]]:
        queries = self.queries(x, short, groups)
        base = None if self.base is None else self.base.prefill(x, short, groups, cache["base"], start)[1]
        up, attention = groups.prefill_to_groups(self.block, queries, short, cache["attention"], start)
        return up, {"base": base, "attention": attention}

    def receive(
        self, short: Float[Array, "B D"], groups: Groups, cache: dict[str, Any], clock: Clock
    ) -> dict[str, Any]:
        base = None if self.base is None else self.base.receive(short, groups, cache["base"], clock)
        return {"base": base, "attention": self.block.write(short[:, None], cache["attention"], clock)}

    def step(self, x: Float[Array, "B D"], groups: Groups, cache: dict[str, Any], clock: Clock) -> Float[Array, "B D"]:
        queries = x if self.base is None else x + self.base.step(x, groups, cache["base"], clock)
        return self.block.step(queries, cache=cache["attention"], clock=groups.query_clock(clock))[0]


def moving_average(z: Float[Array, "B G D"], p: Float[Array, "B G 1"]) -> Float[Array, "B G D"]:
    """Return a[g] = p[g] z[g] + (1 - p[g]) a[g - 1] with a[-1] = 0, in float32 at least (H-Net's smoothing module)."""

    def compose(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * then[0], then[0] * first[1] + then[1]

    return lax.associative_scan(compose, (1 - p, p * z), axis=1)[1]


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
