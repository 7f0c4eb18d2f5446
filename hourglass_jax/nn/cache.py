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
from jax import lax

from hourglass_jax.errors import UsageError
from hourglass_jax.nn.positions import rotate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clock:
    """Where a batch stands; times count padding and start anew when old tokens are dropped.

    time: int32 [], tokens before the current one, the same for all rows.
    origin: int32 [B], when each row's first token came; negative once that is dropped.
    start: int32 [B], when the oldest token came that the row still sees; a multiple of K, as is `origin`.
    """

    time: jax.Array
    origin: jax.Array
    start: jax.Array


def forgotten(length: Any, context: int, factor: int) -> Any:
    """How many tokens a row of `length` has forgotten when it takes the next one, a multiple of `factor`.

    About a quarter of the context goes at a time, so a row sees between three quarters and all of `context` tokens:
    a function of its own length, whatever batch it sits in.
    """
    quantum = max(context // (4 * factor), 1) * factor
    quanta = -((context - 1 - length) // quantum)
    return quanta * quantum * (quanta > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of one attention layer, a row for each key position; with a window a ring of its newest rows.

    A key's row is its place among all keys modulo R, which matters where there are fewer rows than keys.

    keys, values: [B, H, R, K], the keys already turned where positions are rotary.
    relative: [P, H, R, K], W_r R of the Transformer-XL formula for query slot p; row e is for the key R - 1 - e rows
        before the newest.
    stride: tokens a row.
    """

    keys: jax.Array
    values: jax.Array
    relative: jax.Array | None
    stride: int = field(metadata={"static": True})
    rotary: bool = field(metadata={"static": True})

    def write(self, keys: jax.Array, values: jax.Array, row: jax.Array | int) -> KeyValueCache:
        """Puts keys and values [B, n, H, K] at the places row .. row + n - 1; more than R only from row 0 on."""
        n_rows, n = self.keys.shape[2], keys.shape[1]

        def put(rows: jax.Array, new: jax.Array) -> jax.Array:
            new = new.swapaxes(1, 2).astype(rows.dtype)
            if n > n_rows:
                return jnp.roll(new[:, :, n - n_rows :], n % n_rows, axis=2)
            return lax.dynamic_update_slice_in_dim(rows, new, row % n_rows, axis=2)

        return replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def lags(self, newest: jax.Array) -> jax.Array:
        """int [R]: how long before the newest key that of each row comes; of a row yet to be filled, more than all."""
        n_rows = self.keys.shape[2]
        lags = newest % n_rows - jnp.arange(n_rows)
        return jnp.where(lags < 0, lags + n_rows, lags)

    def filled_from(self, smaller: KeyValueCache) -> KeyValueCache:
        def fill(ours: jax.Array, theirs: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(ours, theirs, (0, 0, 0, 0))

        return replace(self, keys=fill(self.keys, smaller.keys), values=fill(self.values, smaller.values))

    def drop(self, tokens: jax.Array) -> KeyValueCache:
        """Forgets the oldest tokens; the others move to the front, with positions counted from there."""
        keys, values = (jnp.roll(rows, -(tokens // self.stride), axis=2) for rows in (self.keys, self.values))
        if self.rotary:
            keys = rotate(keys, -tokens)
        return replace(self, keys=keys, values=values)


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

    def filled_from(self, smaller: Cache) -> Cache:
        """This cache, larger and empty, with what the smaller one holds."""

        def fill(ours: Any, theirs: Any) -> Any:
            return ours.filled_from(theirs) if isinstance(ours, KeyValueCache) else theirs

        return replace(self, clock=smaller.clock, levels=map_levels(fill, self.levels, smaller.levels))

    def drop(self, tokens: jax.Array) -> Cache:
        """Makes room: removes the oldest `tokens`, a multiple of K which no row still sees, at every level."""
        clock = jax.tree.map(lambda times: times - tokens, self.clock)

        def drop(leaf: Any) -> Any:
            return leaf.drop(tokens) if isinstance(leaf, KeyValueCache) else leaf

        return replace(self, clock=clock, levels=map_levels(drop, self.levels))


def map_levels(function: Callable[..., Any], *levels: dict[str, Any]) -> dict[str, Any]:
    """`jax.tree.map` with every KeyValueCache as one leaf."""
    return jax.tree.map(function, *levels, is_leaf=lambda leaf: isinstance(leaf, KeyValueCache))
