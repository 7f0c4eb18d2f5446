"""Decoding caches: keys and values of every attention layer, and the position of each row of the batch.

All rows share one clock and are left-padded by multiples of the shared factor K. So groups of fixed length end at the
same time in all rows, and their level runs for the full batch or not at all. New keys have the same index in all rows.
Below variable boundaries each row has its own time; see `Clock`.
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
    """The position of a batch. Times include padding and are reduced when old tokens are dropped.

    time: int32 [], tokens before the current one, the same for all rows.
    origin: int32 [B], time of each row's first token; negative once it is dropped.
    start: int32 [B], time of the oldest token that the row attends to. `origin` and `start` are multiples of K.
    live: bool [B], the rows that take this step, or None.

    Below variable boundaries each row has its own time: `time` is int32 [B], and only `live` rows take a step. These
    times count k tokens for each group, and no padding.
    """

    time: jax.Array
    origin: jax.Array
    start: jax.Array
    live: jax.Array | None = None


def where_live(live: jax.Array | None, new: Any, old: Any) -> Any:
    """Select `new` for live rows and `old` for the others."""
    if live is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(live.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def forgotten(length: Any, context: int, factor: int) -> Any:
    """Return how many tokens a row of `length` tokens has dropped at the next token, a multiple of `factor`.

    About a quarter of the context is dropped at a time, so a row attends to between three quarters and all of `context`
    tokens. The result depends on the row's own length only, not on its batch.
    """
    quantum = max(context // (4 * factor), 1) * factor
    quanta = -((context - 1 - length) // quantum)
    return quanta.clip(min=0) * quantum


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of one attention layer, one row for each key position; with a window, a ring of the newest rows.

    A key's row is its index modulo R.

    keys, values: [B, H, R, K]; keys are already rotated if positions are rotary.
    relative: [P, H, R, K], W_r R of the Transformer-XL formula for query slot p; row e is for the key R - 1 - e rows
        before the newest.
    stride: tokens for each row.
    rows: int32 [b], the selected rows of the batch, see `of_rows`; None: all.
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
        """Store keys and values [B, n, H, K] at indices row .. row + n - 1; n may exceed R only if row is 0.

        With an index for each row of the batch, `row` [B], n is 1, and only `live` rows are changed.
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
        """Return keys and values [B, H, R, K]."""
        if self.rows is None:
            return self.keys, self.values
        return self.keys[self.rows], self.values[self.rows]

    def lags(self, newest: jax.Array) -> jax.Array:
        """Return int [1, R]: how many keys before the newest one each cache row is. Unfilled rows have larger lags.

        [B, R] if each row of the batch has its own newest key, `newest` [B].
        """
        n_rows = self.keys.shape[2]
        lags = jnp.reshape(newest, (-1, 1)) % n_rows - jnp.arange(n_rows, dtype=jnp.int32)[None]
        return jnp.where(lags < 0, lags + n_rows, lags)

    def filled_from(self, smaller: KeyValueCache) -> KeyValueCache:
        def fill(ours: jax.Array, theirs: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(ours, theirs, (0, 0, 0, 0))

        return replace(self, keys=fill(self.keys, smaller.keys), values=fill(self.values, smaller.values))

    def drop(self, tokens: jax.Array) -> KeyValueCache:
        """Drop the oldest tokens; the others move to the front, with positions counted from there."""
        if self.own_time:
            return self
        keys, values = (jnp.roll(rows, -(tokens // self.stride), axis=2) for rows in (self.keys, self.values))
        if self.rotary:
            keys = rotate(keys, -tokens)
        return replace(self, keys=keys, values=values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EventCache:
    """The boundaries of a level so far, and its newest position.

    when: int32 [B, R], the times of boundaries, a ring: boundary n is in row n mod R.
    count: int32 [B], boundaries so far.
    newest: the newest position, x [B, D] and its token int32 [B].
    fresh: bool [B], whether the newest position is a boundary.
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
    """The state of decoding.

    history: int32 [B, n], the newest tokens, for n-grams.
    max_length: tokens that fit, including padding; `drop` some before `clock.time` reaches it.
    context: tokens that a row attends to at most; see `forgotten`.
    factor: K; `max_length` and `context` are multiples of it.
    """

    clock: Clock
    levels: dict[str, Any]
    history: jax.Array
    max_length: int = field(metadata={"static": True})
    context: int = field(metadata={"static": True})
    factor: int = field(metadata={"static": True})

    def with_history(self, tokens: jax.Array) -> Cache:
        """Return the cache after `tokens` [B, L]."""
        history = jnp.concatenate([self.history, tokens.astype(jnp.int32)], axis=1)[:, tokens.shape[1] :]
        return replace(self, history=history)

    def now(self) -> Clock:
        """Return the clock of the next token, after the tokens that each row drops for it."""
        clock = self.clock
        start = clock.origin + forgotten(clock.time - clock.origin, self.context, self.factor)
        return replace(clock, start=jnp.maximum(clock.start, start))

    def check_room(self, batch: int) -> None:
        """Raise UsageError for another number of rows, and if the cache is full (not checked for traced times)."""
        rows, time = len(self.clock.start), self.clock.time
        if batch != rows:
            raise UsageError(f"{batch} tokens for a cache of {rows} rows; give one token for each row")
        if not isinstance(time, jax.core.Tracer) and time >= self.max_length:
            raise UsageError(f"the cache holds {self.max_length} tokens and is full; create a larger one")

    def check_prompts(self, batch: int, length: int, *starts: Any) -> None:
        """Raise UsageError if rows or tokens do not fit, or if prompts begin or end within a group."""
        if batch != len(self.clock.start):
            raise UsageError(f"{batch} prompts for a cache of {len(self.clock.start)} rows; give one for each row")
        if length > self.max_length:
            raise UsageError(
                f"the cache holds {self.max_length} tokens, not {length}; create it with a larger max_length"
            )
        known = [np.asarray(start) for start in starts if not isinstance(start, jax.core.Tracer)]
        if length % self.factor or any((start % self.factor).any() for start in known):
            raise UsageError(
                f"prompts of {length} tokens: all must begin and end at multiples of {self.factor}, the group length; "
                "decode the remaining tokens with `step`, or use `generate`"
            )

    def filled_from(self, smaller: Cache) -> Cache:
        """Copy the contents of a smaller cache into this empty one."""
        levels = map_levels(filled, self.levels, smaller.levels)
        return replace(self, clock=smaller.clock, levels=levels, history=smaller.history)

    def drop(self, tokens: jax.Array) -> Cache:
        """Remove the oldest `tokens`, a multiple of K that no row attends to, at every level."""
        clock = jax.tree.map(lambda times: times - tokens, self.clock)
        return replace(self, clock=clock, levels=map_levels(lambda leaf: dropped_from(leaf, tokens), self.levels))


PARTS = (KeyValueCache, EventCache)


def filled(ours: Any, theirs: Any) -> Any:
    return ours.filled_from(theirs) if isinstance(ours, PARTS) else theirs


def dropped_from(part: Any, tokens: jax.Array) -> Any:
    return part.drop(tokens) if isinstance(part, PARTS) else part


def map_levels(function: Callable[..., Any], *levels: Any) -> Any:
    """`jax.tree.map` that treats KeyValueCache and EventCache as leaves."""
    return jax.tree.map(function, *levels, is_leaf=lambda leaf: isinstance(leaf, PARTS))


def of_rows(levels: Any, rows: jax.Array) -> Any:
    """Return the cache of the rows [b] of a batch as a batch; keys and values are not copied."""

    def of_part(part: Any) -> Any:
        if isinstance(part, KeyValueCache):
            return replace(part, rows=rows if part.rows is None else part.rows[rows])
        return jax.tree.map(lambda leaf: leaf[rows], part)

    return map_levels(of_part, levels)


def with_rows(levels: Any, rows: jax.Array, new: Any) -> Any:
    """Undo `of_rows`: return `levels` with rows [b] replaced by `new`."""

    def with_part(part: Any, new: Any) -> Any:
        if isinstance(part, KeyValueCache):
            return replace(new, rows=part.rows)
        return jax.tree.map(lambda leaf, values: leaf.at[rows].set(values), part, new)

    return map_levels(with_part, levels, new)


def in_own_time(levels: Any) -> Any:
    """Mark caches below variable boundaries: their times count groups, which dropping tokens does not change."""
    return map_levels(lambda part: replace(part, own_time=True) if isinstance(part, PARTS) else part, levels)
