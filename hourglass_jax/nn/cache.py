"""What decoding remembers: keys and values of every attention, and where each row of the batch began.

All rows share one clock and are padded on the left, by multiples of the total factor K: so groups end at the same
time in every row, a level runs for the whole batch or not at all, and new keys go to the same place in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hourglass_jax.errors import UsageError
from hourglass_jax.nn.positions import rotate

NEVER = -(2**30)  # a time before all others


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clock:
    """Where a batch stands; times count padding and start anew when old tokens are dropped.

    time: int32 [], tokens before the current one, the same for all rows.
    origin: int32 [B], when each row's first token came; negative once that is dropped.
    start: int32 [B], when the oldest token came that the row still sees; a multiple of K, as is `origin`.

    Below a level whose groups end where the text says, every row has a time of its own: `time` is int32 [B], and only
    the rows that are `live`, bool [B], take the step. Times there count k tokens for each group, and no padding.
    """

    time: jax.Array
    origin: jax.Array
    start: jax.Array
    live: jax.Array | None = None


def where_live(live: jax.Array | None, new: Any, old: Any) -> Any:
    """`new` of the rows that take the step, `old` of the others."""
    if live is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(live.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def forgotten(length: Any, context: int, factor: int) -> Any:
    """How many tokens a row of `length` has forgotten when it takes the next one, a multiple of `factor`.

    About a quarter of the context goes at a time, so a row sees between three quarters and all of `context` tokens:
    a function of its own length, whatever batch it sits in.
    """
    quantum = max(context // (4 * factor), 1) * factor
    quanta = -((context - 1 - length) // quantum)
    return quanta.clip(min=0) * quantum


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of one attention layer, a row for each key position; with a window a ring of its newest rows.

    A key's row is its place among all keys modulo R, which matters where there are fewer rows than keys.

    keys, values: [B, H, R, K], the keys already turned where positions are rotary.
    relative: [P, H, R, K], W_r R of the Transformer-XL formula for query slot p; row e is for the key R - 1 - e rows
        before the newest.
    stride: tokens a row.
    rows: int32 [b], where b rows of the batch stand for it, see `of_rows`.
    own_time: see `in_own_time`.
    """

    keys: jax.Array
    values: jax.Array
    relative: jax.Array | None
    stride: int = field(metadata={"static": True})
    rotary: bool = field(metadata={"static": True})
    rows: jax.Array | None = None
    own_time: bool = field(default=False, metadata={"static": True})

    def write(
        self, keys: jax.Array, values: jax.Array, row: jax.Array | int, live: jax.Array | None = None
    ) -> KeyValueCache:
        """Puts keys and values [B, n, H, K] at the places row .. row + n - 1; more than R only from row 0 on.

        Where each row of the batch has a place of its own, `row` [B], n is 1; those that are not `live` are left alone.
        """
        n_rows, n = self.keys.shape[2], keys.shape[1]
        if live is not None:
            row = jnp.where(live, row % n_rows, n_rows)

            batch = jnp.arange(len(row)) if self.rows is None else self.rows

            def put_each(rows: jax.Array, new: jax.Array) -> jax.Array:
                return rows.at[batch, :, row].set(new[:, 0].astype(rows.dtype), mode="drop")

            return replace(self, keys=put_each(self.keys, keys), values=put_each(self.values, values))

        def put(rows: jax.Array, new: jax.Array) -> jax.Array:
            new = new.swapaxes(1, 2).astype(rows.dtype)
            if n > n_rows:
                return jnp.roll(new[:, :, n - n_rows :], n % n_rows, axis=2)
            return lax.dynamic_update_slice_in_dim(rows, new, row % n_rows, axis=2)

        return replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, H, R, K]."""
        if (rows := self.rows) is None:
            return self.keys, self.values

        def taken(part: jax.Array) -> jax.Array:  # row by row: on a CPU faster than a gather
            return jnp.stack([lax.dynamic_index_in_dim(part, row, keepdims=False) for row in rows])

        return taken(self.keys), taken(self.values)

    def lags(self, newest: jax.Array) -> jax.Array:
        """int [1, R]: how long before the newest key that of each row comes; of a row yet to be filled, more than all.

        [B, R] where each row of the batch has a newest key of its own, `newest` [B].
        """
        n_rows = self.keys.shape[2]
        lags = jnp.reshape(newest, (-1, 1)) % n_rows - jnp.arange(n_rows, dtype=jnp.int32)[None]
        return jnp.where(lags < 0, lags + n_rows, lags)

    def filled_from(self, smaller: KeyValueCache) -> KeyValueCache:
        def fill(ours: jax.Array, theirs: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(ours, theirs, (0, 0, 0, 0))

        return replace(self, keys=fill(self.keys, smaller.keys), values=fill(self.values, smaller.values))

    def drop(self, tokens: jax.Array) -> KeyValueCache:
        """Forgets the oldest tokens; the others move to the front, with positions counted from there."""
        if self.own_time:
            return self
        keys, values = (jnp.roll(rows, -(tokens // self.stride), axis=2) for rows in (self.keys, self.values))
        if self.rotary:
            keys = rotate(keys, -tokens)
        return replace(self, keys=keys, values=values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EventCache:
    """The events of a level, and the position before the next.

    when: int32 [B, R], the time at which each fired, a ring: that of event n is in row n mod R.
    count: int32 [B], events so far.
    newest: the newest position, x [B, D] and its token int32 [B].
    fresh: bool [B], whether an event fired there.
    own_time: see `in_own_time`.
    """

    when: jax.Array
    count: jax.Array
    newest: tuple[jax.Array, jax.Array]
    fresh: jax.Array
    own_time: bool = field(default=False, metadata={"static": True})

    def filled_from(self, smaller: EventCache) -> EventCache:
        when = lax.dynamic_update_slice(self.when, smaller.when, (0, 0))
        return replace(smaller, when=when)

    def drop(self, tokens: jax.Array) -> EventCache:
        return self if self.own_time else replace(self, when=self.when - tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Everything decoding carries from token to token.

    max_length: tokens that fit, padding included; drop some before `clock.time` gets there.
    context: tokens a row may see; see `forgotten`.
    factor: K, of which both are multiples.
    """

    clock: Clock
    levels: dict[str, Any]
    max_length: int = field(metadata={"static": True})
    context: int = field(metadata={"static": True})
    factor: int = field(metadata={"static": True})

    def now(self) -> Clock:
        """The clock for the next token, with what that one makes each row forget."""
        clock = self.clock
        start = clock.origin + forgotten(clock.time - clock.origin, self.context, self.factor)
        return replace(clock, start=jnp.maximum(clock.start, start))

    def check_room(self, batch: int) -> None:
        """Raises UsageError for another number of rows, and where the next token has no place; traced times pass."""
        rows, time = len(self.clock.start), self.clock.time
        if batch != rows:
            raise UsageError(f"{batch} tokens for a cache of {rows} rows; give one token a row")
        if not isinstance(time, jax.core.Tracer) and time >= self.max_length:
            raise UsageError(f"the cache holds {self.max_length} tokens and is full; make it with a larger max_length")

    def check_prompts(self, batch: int, length: int, *starts: Any) -> None:
        """Raises UsageError for rows and tokens without a place, and where these begin or end within a group."""
        if batch != len(self.clock.start):
            raise UsageError(f"{batch} prompts for a cache of {len(self.clock.start)} rows; give one a row")
        if length > self.max_length:
            raise UsageError(
                f"the cache holds {self.max_length} tokens, not {length}; make it with a larger max_length"
            )
        known = [np.asarray(start) for start in starts if not isinstance(start, jax.core.Tracer)]
        if length % self.factor or any((start % self.factor).any() for start in known):
            raise UsageError(
                f"prompts of {length} tokens: all must begin and end at multiples of {self.factor}, a group's length; "
                "leave the rest to `step`, or use `generate`"
            )

    def filled_from(self, smaller: Cache) -> Cache:
        """This cache, larger and empty, with what the smaller one holds."""
        return replace(self, clock=smaller.clock, levels=map_levels(filled, self.levels, smaller.levels))

    def drop(self, tokens: jax.Array) -> Cache:
        """Makes room: removes the oldest `tokens`, a multiple of K which no row still sees, at every level."""
        clock = jax.tree.map(lambda times: times - tokens, self.clock)
        return replace(self, clock=clock, levels=map_levels(lambda leaf: dropped_from(leaf, tokens), self.levels))


PARTS = (KeyValueCache, EventCache)


def filled(ours: Any, theirs: Any) -> Any:
    return ours.filled_from(theirs) if isinstance(ours, PARTS) else theirs


def dropped_from(part: Any, tokens: jax.Array) -> Any:
    return part.drop(tokens) if isinstance(part, PARTS) else part


def map_levels(function: Callable[..., Any], *levels: Any) -> Any:
    """`jax.tree.map` with every part that has a way of its own to grow and to forget as one leaf."""
    return jax.tree.map(function, *levels, is_leaf=lambda leaf: isinstance(leaf, PARTS))


def of_rows(levels: Any, rows: jax.Array) -> Any:
    """What is remembered of the rows [b] of a batch, as a batch of their own; of keys and values nothing is copied."""

    def of_part(part: Any) -> Any:
        if isinstance(part, KeyValueCache):
            return replace(part, rows=rows if part.rows is None else part.rows[rows])
        return jax.tree.map(lambda leaf: leaf[rows], part)

    return map_levels(of_part, levels)


def with_rows(levels: Any, rows: jax.Array, new: Any) -> Any:
    """`levels` with what their rows [b] remember now: `new`, once `of_rows`."""

    def with_part(part: Any, new: Any) -> Any:
        if isinstance(part, KeyValueCache):
            return replace(new, rows=part.rows)
        return jax.tree.map(lambda leaf, values: leaf.at[rows].set(values), part, new)

    return map_levels(with_part, levels, new)


def in_own_time(levels: Any) -> Any:
    """What the levels below events remember: their time counts events, which dropping tokens does not move."""
    return map_levels(lambda part: replace(part, own_time=True) if isinstance(part, PARTS) else part, levels)
