"""Boundary rules, which decide where groups end: by position, by token, or by a custom rule.

A rule is constructed as `Rule(config, level, rngs=rngs)`. It decides at each position from that position and the one
before it, so it is causal and supports decoding. A new rule is one class with `fires` and one entry in
`registry.BOUNDARIES`. `nn.learned` has the learned rules.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.config import LevelConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Level
from hourglass_jax.nn.cache import NEVER, Clock, EventCache, where_live
from hourglass_jax.nn.event_groups import Decision, EventGroups, OpenGroup, limit
from hourglass_jax.nn.groups import FixedGroups, Groups
from hourglass_jax.registry import BOUNDARIES

SPARE = 4  # boundaries beyond the rate limit, so that a row may begin with several
SPECIAL = (256, 257)  # BOS and EOS of the byte tokenizer
WHITESPACE = (*range(9, 14), 32, *SPECIAL)  # bytes
# SpaceByte's rule: all bytes except ASCII letters, digits and continuation bytes of UTF-8.
SPACELIKE = (*(b for b in range(256) if b >= 0xC0 or (b < 0x80 and not chr(b).isalnum())), *SPECIAL)


class Position(NamedTuple):
    """The input of a rule at each position: the vector x [B, L, D], the token and the index in the row, int [B, L].

    The token is None below the first shortening.
    """

    x: jax.Array
    token: jax.Array | None
    place: jax.Array


class InnerStep(NamedTuple):
    """One step of decoding, as the deeper level receives it.

    due: bool [] or [B], whether the deeper level runs.
    clock: the deeper level's clock.
    x, groups: the input of shortening, which runs at every position if `gathers`, otherwise only when due.
    """

    due: jax.Array
    clock: Clock
    x: jax.Array
    groups: Groups
    gathers: bool

    def of_rows(self, rows: jax.Array) -> InnerStep:
        """Select rows [b]; each must have its own time."""
        assert isinstance(self.groups, OpenGroup)
        due, clock, x = jax.tree.map(lambda leaf: leaf[rows], (self.due, self.clock, self.x))
        return InnerStep(due, clock, x, self.groups.of_rows(rows), self.gathers)


class FixedBoundaries(nnx.Module):
    """A boundary every k positions, at the same time in all rows."""

    own_time = False  # whether each row of the deeper level has its own time

    def __init__(self, config: LevelConfig, level: Level, *, rngs: nnx.Rngs):
        self.k, self.tokens_per_position = level.shorten_factor, level.factor
        self.shift = self.k if config.shift == "original" else self.k - 1
        self.causal = config.causal
        if not self.causal:
            self.shift = 0
        self.d_model, self.dtype = config.d_model, config.dtype

    def __call__(
        self,
        x: jax.Array,
        tokens: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        row_keys: jax.Array | None = None,
    ) -> FixedGroups:
        """Return the groups of x [B, L, D]; `mask` marks positions that are not padding, if not causal."""
        if mask is None and not self.causal:  # hides the padding of the last group from attention
            mask = jnp.ones(x.shape[:2], bool)
        return FixedGroups(self.k, x.shape[1], self.shift, mask)

    def n_groups(self, length: int) -> int:
        """Return the number of groups of a sequence of `length` positions."""
        return -(-length // self.k)

    def max_partial_rows(self, batch: int) -> int:
        """Return 0: the groups of all rows end at the same time; see `Boundaries`."""
        return 0

    def inner_capacity(self, max_length: int, context: int) -> tuple[int, int]:
        """Return the deeper level's `max_length` and `context`, in tokens."""
        return max_length, context

    def init_cache(self, batch: int, max_length: int, context: int) -> jax.Array:
        """Return the cache of the newest positions, from which the next group is pooled."""
        return jnp.zeros((batch, self.shift + 1, self.d_model), self.dtype)

    def step_template(self, batch: int) -> tuple[jax.Array, FixedGroups]:
        """Return examples of the `x` and `groups` of `InnerStep`."""
        return jnp.zeros((batch, self.k, self.d_model), self.dtype), FixedGroups(self.k, self.k)

    def prefill(
        self, x: jax.Array, tokens: jax.Array | None, cache: jax.Array, clock: Clock
    ) -> tuple[jax.Array, FixedGroups, Clock, jax.Array]:
        """Process x [B, L, D], k divides L -> the input of shortening, its groups, the inner clock, the cache."""
        begun = jnp.arange(x.shape[1], dtype=jnp.int32)[None] >= clock.start[:, None] // self.tokens_per_position
        known = jnp.where(begun[..., None], x, 0)  # zeros, not padding, enter with the shift
        return known, self(x), clock, jnp.concatenate([cache, known], axis=1)[:, -self.shift - 1 :]

    def step(
        self, x: jax.Array, token: jax.Array | None, cache: jax.Array, clock: Clock
    ) -> tuple[InnerStep, jax.Array]:
        """Decode one position [B, D]; the deeper level runs at the first one of a group."""
        window = jnp.concatenate([cache[:, 1:], x[:, None]], axis=1)
        due = clock.time // self.tokens_per_position % self.k == 0
        return InnerStep(due, clock, window[:, : self.k], FixedGroups(self.k, self.k), gathers=False), window


class Boundaries(nnx.Module):
    """Base class of variable boundaries: where `fires` is true and at each row's first position, up to a rate limit.

    slack: allowed boundaries for each expected one (one in k positions).
    """

    own_time = True

    def __init__(self, config: LevelConfig, level: Level, *, rngs: nnx.Rngs):
        self.k, self.tokens_per_position = level.shorten_factor, level.factor
        self.d_model, self.dtype = config.d_model, config.dtype
        self.slack = min(config.boundary_slack, self.k)  # k allows a boundary at every position

    def fires(self, here: Position, before: Position) -> jax.Array:
        """Return whether a group ends at `here`, bool [B, L]; at a row's first position `before` is zero."""
        raise NotImplementedError

    def decide(self, here: Position, before: Position, row_keys: jax.Array | None = None) -> Decision:
        """Add a row's first position to `fires`; `row_keys` [B] turn on the noise of training."""
        return Decision(self.fires(here, before) | (here.place == 0))

    def room(self, length: Any) -> Any:
        """Return the largest number of boundaries among a row's first `length` positions, an integer or an array."""
        return length * round(100 * self.slack) // (100 * self.k) + SPARE

    def n_groups(self, length: int) -> int:
        """Return the largest number of groups of a sequence of `length` positions."""
        return min(self.room(length), length)

    def __call__(
        self, x: jax.Array, tokens: jax.Array | None = None, mask: None = None, *, row_keys: jax.Array | None = None
    ) -> EventGroups:
        """Return the groups of x [B, L, D] with tokens int [B, L], if any; `mask` is for fixed boundaries only."""
        return self.events(x, tokens, jnp.zeros(1, jnp.int32), x.shape[1], row_keys)

    def events(
        self,
        x: jax.Array,
        tokens: jax.Array | None,
        start: jax.Array,
        stop: jax.Array | int,
        row_keys: jax.Array | None = None,
    ) -> EventGroups:
        """Return the groups of rows that are padding before position `start` [B or 1] and from `stop` on."""
        places = jnp.arange(x.shape[1], dtype=jnp.int32)[None] - start[:, None]
        here = Position(x, tokens, jnp.broadcast_to(places, x.shape[:2]))
        before = jax.tree.map(lambda values: jnp.roll(values, 1, axis=1).at[:, 0].set(0), here)
        valid = (places >= 0) & (places < jnp.reshape(stop - start, (-1, 1)))
        decision = self.decide(here, before, row_keys)
        decision = decision._replace(boundary_mask=decision.boundary_mask & valid)
        fires = limit(decision.boundary_mask, self.room(jnp.maximum(places + 1, 0)))
        return EventGroups(fires, self.n_groups(x.shape[1]), valid, decision)

    def max_partial_rows(self, batch: int) -> int:
        """Return the largest number of due rows that decoding processes without the others; 0: always all rows."""
        few = -(-2 * batch // self.k)  # twice as many as expected
        return few if batch >= 8 and 2 * few <= batch else 0

    def inner_capacity(self, max_length: int, context: int) -> tuple[int, int]:
        """Return the deeper level's `max_length` and `context`, in tokens."""
        length = self.n_groups(min(max_length, context) // self.tokens_per_position) * self.tokens_per_position * self.k
        return length, length

    def init_cache(self, batch: int, max_length: int, context: int) -> EventCache:
        length, _ = self.inner_capacity(max_length, context)
        return EventCache(
            when=jnp.full((batch, length // (self.tokens_per_position * self.k)), NEVER, jnp.int32),
            count=jnp.zeros(batch, jnp.int32),
            newest=self.no_position(batch),
            fresh=jnp.ones(batch, bool),
        )

    def no_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((batch, self.d_model), self.dtype), jnp.zeros(batch, jnp.int32)

    def step_template(self, batch: int) -> tuple[jax.Array, OpenGroup]:
        """Return examples of the `x` and `groups` of `InnerStep`."""
        return self.no_position(batch)[0][:, None], OpenGroup(jnp.ones(batch, bool), jnp.ones(batch, bool))

    def prefill(
        self, x: jax.Array, tokens: jax.Array | None, cache: EventCache, clock: Clock
    ) -> tuple[jax.Array, EventGroups, Clock, EventCache]:
        """Process x [B, L, D] -> the input of shortening, its groups, the inner clock, the cache."""
        stop = jnp.broadcast_to(clock.time // self.tokens_per_position, x.shape[:1])
        groups = self.events(x, tokens, clock.start // self.tokens_per_position, stop)
        fired = jnp.arange(groups.n_groups, dtype=jnp.int32)[None] < groups.count[:, None]
        when = jnp.where(fired, groups.when * self.tokens_per_position, NEVER)
        last = jnp.maximum(stop - 1, 0)
        rows = jnp.arange(len(x))
        newest = x[rows, last], cache.newest[1] if tokens is None else tokens[rows, last].astype(jnp.int32)
        fresh = groups.when[rows, jnp.maximum(groups.count - 1, 0)] == last
        when = cache.when.at[:, : groups.n_groups].set(when)
        cache = replace(cache, when=when, count=groups.count, newest=newest, fresh=fresh)
        zero = jnp.zeros_like(groups.count)
        return x, groups, Clock(groups.count * self.tokens_per_position * self.k, zero, zero), cache

    def step(
        self, x: jax.Array, token: jax.Array | None, cache: EventCache, clock: Clock
    ) -> tuple[InnerStep, EventCache]:
        """Decode one position [B, D]; the deeper level runs in rows that have a boundary here."""
        place = jnp.broadcast_to(clock.time - clock.start, x.shape[:1]) // self.tokens_per_position
        token = cache.newest[1] if token is None else token.astype(jnp.int32)
        here = Position(x[:, None], token[:, None], place[:, None])
        before = Position(*(values[:, None] for values in (*cache.newest, place - 1)))
        seen = (cache.when >= clock.start[:, None]).sum(axis=1, dtype=jnp.int32)
        decision = self.decide(here, before)
        fires = decision.boundary_mask[:, 0] & (seen < self.room(place + 1))
        if clock.live is not None:
            fires &= clock.live
        stride = self.tokens_per_position * self.k
        count = cache.count + fires.astype(jnp.int32)
        below = Clock(cache.count * stride, jnp.zeros_like(place), (cache.count - seen) * stride, fires)
        serving = replace(below, time=(count - 1) * stride, live=None)
        groups = OpenGroup(cache.fresh, fires, serving, boundary_prob=decision.boundary_prob)
        row = jnp.where(fires, cache.count % cache.when.shape[1], cache.when.shape[1])
        when = cache.when.at[jnp.arange(len(row)), row].set(clock.time, mode="drop")
        newest = where_live(clock.live, (x, token), cache.newest)
        fresh = where_live(clock.live, fires, cache.fresh)
        cache = replace(cache, when=when, count=count, newest=newest, fresh=fresh)
        return InnerStep(fires, below, x[:, None], groups, gathers=True), cache


class EveryKth(Boundaries):
    """Boundaries at positions 0, k, 2k ... of each row: a fixed factor below variable boundaries."""

    def __init__(self, config: LevelConfig, level: Level, *, rngs: nnx.Rngs):
        super().__init__(config, level, rngs=rngs)
        self.slack = 1.0

    def fires(self, here: Position, before: Position) -> jax.Array:
        return here.place % self.k == 0


class TokenBoundaries(Boundaries):
    """A boundary at each of `boundary_tokens`, or at the first of each run of them (`first_of_run`)."""

    def __init__(
        self,
        config: LevelConfig,
        level: Level,
        *,
        of_bytes: tuple[int, ...] = (),
        first_of_run: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, level, rngs=rngs)
        self.tokens = config.boundary_tokens or tuple(byte for byte in of_bytes if byte < config.vocab_size)
        self.vocab_size, self.first_of_run = config.vocab_size, first_of_run

    def fires(self, here: Position, before: Position) -> jax.Array:
        if here.token is None or before.token is None:
            raise UsageError("boundaries that depend on the text require its tokens; pass `tokens`, int [B, L]")
        listed = jnp.asarray(np.isin(np.arange(self.vocab_size), self.tokens))
        fires = listed[here.token]
        return fires & ~listed[before.token] if self.first_of_run else fires


BOUNDARIES |= {
    "fixed": FixedBoundaries,
    "whitespace": partial(TokenBoundaries, of_bytes=WHITESPACE, first_of_run=True),
    "spacelike": partial(TokenBoundaries, of_bytes=SPACELIKE, first_of_run=True),
    "tokens": TokenBoundaries,
    "every": EveryKth,
}
