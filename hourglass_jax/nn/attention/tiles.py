"""The programs of the flash kernels: one block of queries, keys or lags, in a loop over the blocks that it attends to.

A tile has b query groups and one key slot of the b groups that are d blocks earlier. Its relative logits are the
products of q_position with two blocks of r, d and d - 1 blocks from lag 0, side by side: row a starts at column
b - 1 - a (`positions.relative_shift` has a picture). Adjacent tiles share one of the two blocks, so a loop over keys
computes each product once. A TPU shifts the rows by rotation; a GPU cannot move values between columns, and shifts them
through memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton

from hourglass_jax.nn.attention.pattern import Pattern
from hourglass_jax.nn.layers import at_least_float32, hashed

Heads = tuple[jax.Array, ...]  # vectors [n, K] of a head, split along K into the plan's parts
HIDDEN = -1e30  # score of a masked key; -inf would give nan in a row whose tile is all masked


class Arrays(NamedTuple):
    """The kernels' inputs; G is padded to whole blocks.

    q, q_position: [B, H P, G, K], query slots as heads.
    k, v: [B, H, S G, K], slot-major.
    r: [H P, S G, K], slot-major; the last row of a slot has the smallest lag.
    rows: int32 [B, 2], each row's index in the whole batch, and its first group that is not padding.
    seeds: uint32 [2], seeds of dropout.
    logits: relative logits by lag that replace q_position and r, see `stored`; [B, H P, G S, N + b], the last field.
    """

    q: Any
    k: Any
    v: Any
    q_position: Any
    r: Any
    rows: Any
    seeds: Any
    logits: Any = None


class Plan(NamedTuple):
    """Static parameters of the kernels.

    heads, groups: H, and G without padding.
    parts: sizes that add up to K. A GPU's matrix products need powers of two: 96 is 64 + 32.
    block: b, the number of query groups, and of keys, in a block.
    n_blocks: blocks of queries, and of the keys of a slot.
    by_memory: whether relative logits are shifted through memory; otherwise by rotation.
    queries: the first query block to compute, and the block after the last; None: all.
    """

    pattern: Pattern
    platform: str
    heads: int
    groups: int
    parts: tuple[int, ...]
    block: int
    n_blocks: int
    by_memory: bool
    queries: tuple[int, int] | None = None

    @property
    def range(self) -> tuple[int, int]:
        return self.queries or (0, self.n_blocks)

    @property
    def columns(self) -> list[Any]:
        """Return the slice of each part of a head."""
        return [pl.ds(start, n) for start, n in zip(itertools.accumulate((0, *self.parts)), self.parts, strict=False)]

    @property
    def n_tiles(self) -> int:
        """Return how many tiles are computed for each head and key slot."""
        window = self.pattern.window or self.n_blocks * self.block
        return sum(i + 1 - max(i * self.block - window + 1, 0) // self.block for i in range(*self.range))


def divide(x: Any, n: int) -> Any:
    """Return x // n for nonnegative x."""
    return x if n == 1 else lax.div(x, jnp.asarray(n, x.dtype))


class Tile:
    """One program: the arrays of its batch row and head, and operations on their tiles.

    Blocks are given by their index: i of queries, j of keys, d the distance of a query block to a key block.
    """

    def __init__(self, plan: Plan, arrays: Arrays, memory: Any):
        self.plan, self.pattern, self.arrays, self.memory = plan, plan.pattern, arrays, memory
        self.row, self.first = arrays.rows[pl.program_id(0), 0], arrays.rows[pl.program_id(0), 1]
        self.head, self.index = pl.program_id(1), pl.program_id(2)
        self.wide = at_least_float32(arrays.q.dtype)
        self.relative = arrays.r is not None

    def slot_and_block(self) -> tuple[Any, Any]:
        """Return the slot and block of a program for keys or lags."""
        if self.pattern.key_slots == 1:
            return 0, self.index
        slot = divide(self.index, self.plan.n_blocks)
        return slot, self.index - slot * self.plan.n_blocks

    def over_slots(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Loop over key slots: carry = body(slot, carry)."""
        n = self.pattern.key_slots
        return body(0, carry) if n == 1 else lax.fori_loop(0, n, body, carry)

    def load(self, ref: Any, i: Any, slot: Any = 0) -> Heads:
        """Load block i of a slot."""
        rows = pl.ds((slot * self.plan.n_blocks + i) * self.plan.block, self.plan.block)
        return tuple(ref[rows, columns] for columns in self.plan.columns)

    def load_column(self, ref: Any, i: Any) -> jax.Array:
        return ref[pl.ds(i * self.plan.block, self.plan.block), :]

    def load_position(self, i: Any) -> Heads | None:
        return self.load(self.arrays.q_position, i) if self.relative else None

    def load_lags(self, slot: Any, d: Any) -> Heads:
        """Load the block of r that is d blocks from lag 0; for d = -1, whose keys are masked, any block."""
        return self.load(self.arrays.r, self.plan.n_blocks - 1 - jnp.maximum(d, 0), slot)

    def zeros(self, blocks: int = 1) -> Heads:
        return tuple(jnp.zeros((blocks * self.plan.block, n), self.wide) for n in self.plan.parts)

    def product(self, a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
        contracted = (((axis_a,), (axis_b,)), ((), ()))
        return lax.dot_general(a.astype(b.dtype), b, contracted, preferred_element_type=self.wide)

    def logits(self, a: Heads, b: Heads) -> jax.Array:
        """[n, K], [m, K] -> [n, m]."""
        products = [self.product(x, y, 1, 1) for x, y in zip(a, b, strict=True)]
        return functools.reduce(jnp.add, products)

    def weighted(self, weights: jax.Array, x: Heads, axis: int = 1) -> Heads:
        """[n, m], [m, K] -> [n, K]; or with axis 0, [m, n]."""
        return tuple(self.product(weights, part, axis, 0) for part in x)

    def indices(self, columns: int) -> tuple[jax.Array, jax.Array]:
        """Return the row and column indices of an array [b, columns]."""
        shape = self.plan.block, columns
        return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)

    def scores(self, i: Any, slot: Any, d: Any, q: Heads, by_key: jax.Array | None) -> jax.Array:
        """Return the masked scores of query block i and the keys d blocks earlier, including relative logits."""
        scores = self.logits(q, self.load(self.arrays.k, i - d, slot))
        if by_key is not None:
            scores += by_key
        queries, keys = self.indices(self.plan.block)
        queries, keys = queries + i * self.plan.block, keys + (i - d) * self.plan.block
        return jnp.where((keys <= queries) & (keys >= self.pattern.lowest(queries, self.first)), scores, HIDDEN)

    def by_lag(self, slot: Any, d: Any, q_position: Heads | None) -> Any:
        """Compute the relative logits of lags d blocks from 0, and keep them for `by_key`."""
        if q_position is None:
            return None
        return self.keep(0, d, self.logits(q_position, self.load_lags(slot, d)))

    def by_key(self, i: Any, slot: Any, d: Any, far: Any, near: Any) -> jax.Array | None:
        """Return a tile's relative logits: those of lags d (`far`) and d - 1 (`near`) blocks from 0, shifted."""
        block = self.plan.block
        if self.arrays.logits is not None:
            return self.load_logits(i, slot, d)
        if not self.relative:
            return None
        if self.plan.by_memory:
            return self.recall(0, d, block - 1 - self.indices(block)[0])
        return mosaic.roll(jnp.concatenate([far, near], axis=1), block + 1, 1, stride=1, stride_axis=0)[:, :block]

    def load_logits(self, i: Any, slot: Any, d: Any) -> jax.Array:
        """Load a tile of stored logits, whose rows start one column earlier each."""
        place = self.place(self.arrays.logits, (i - self.plan.range[0]) * self.plan.block, slot, d)
        return triton.load(self.arrays.logits.at[place]).astype(self.wide)

    def store_logits(self, slot: Any, d: Any, d_scores: jax.Array) -> None:
        """Store a tile's score gradients over its logits, in the rows of this program."""
        rows, columns = self.place(self.memory, 0, slot, d)
        triton.store(self.memory.at[rows, columns], d_scores.astype(self.memory.dtype), mask=columns >= 0)

    def place(self, logits: Any, first: Any, slot: Any, d: Any) -> tuple[jax.Array, jax.Array]:
        """Return the rows and columns of a tile whose first query is row `first`."""
        rows, keys = self.indices(self.plan.block)
        columns = logits.shape[1] - self.plan.block - 1 - d * self.plan.block + keys - rows
        return (first + rows) * self.pattern.key_slots + slot, columns

    def gradient_by_lag(self, d: Any, far: Any, near: Any, n: int = 1) -> jax.Array:
        """Transpose `by_key`: map the score gradients of two tiles to those of lags d - 1 blocks from 0.

        Row a starts at column a + 1. Columns wrap around the two tiles; n blocks of them are returned.
        """
        block = self.plan.block
        if self.plan.by_memory:
            return self.recall(1, d, self.indices(n * block)[0] + 1)
        x = jnp.concatenate([far, near], axis=1)
        start = self.indices(2 * block)[0] + 1
        for bit in range(block.bit_length()):  # a TPU's strided rotation supports the other direction only
            x = jnp.where((start & (1 << bit)) != 0, mosaic.roll(x, 2 * block - (1 << bit), 1), x)
        return x[:, : n * block]

    def keep(self, ring: int, d: Any, x: jax.Array) -> Any:
        """Return x; if shifts go through memory, store x in the inputs' dtype instead and return None.

        A ring is memory for two blocks: one of an even d and one of an odd d.
        """
        if not self.plan.by_memory:
            return x
        self.barrier()
        self.memory[:, pl.ds((2 * ring + (d & 1)) * self.plan.block, self.plan.block)] = x.astype(self.memory.dtype)
        return None

    def recall(self, ring: int, d: Any, start: jax.Array) -> jax.Array:
        """Read [b, n] from a ring's memory; row a starts at column start[a], relative to block d."""
        size = 2 * self.plan.block  # a power of two
        rows, columns = self.indices(start.shape[1])
        columns = ring * size + (((d & 1) * self.plan.block + start + columns) & (size - 1))
        self.barrier()
        interpreted = self.plan.platform == "cpu"
        x = self.memory[rows, columns] if interpreted else triton.load(self.memory.at[rows, columns])
        return x.astype(self.wide)

    def nothing(self, ring: int, d: Any) -> Any:
        """Keep zeros; None without relative positions."""
        return self.keep(ring, d, jnp.zeros((self.plan.block,) * 2, self.wide)) if self.relative else None

    def barrier(self) -> None:
        if self.plan.platform == "gpu":
            triton.debug_barrier()

    def drop(self, i: Any, slot: Any, d: Any, weights: jax.Array) -> jax.Array:
        """Apply dropout with the mask that `layers.dropped` draws for the whole batch's weights [B, H, G P, G S]."""
        rate = self.pattern.dropout
        if not rate:
            return weights
        slots, key_slots = self.pattern.query_slots, self.pattern.key_slots
        queries, keys = self.indices(self.plan.block)
        head = divide(self.head, slots)
        query = (i * self.plan.block + queries) * slots + self.head - head * slots
        key = ((i - d) * self.plan.block + keys) * key_slots + slot
        above = (self.row * self.plan.heads + head) * (self.plan.groups * slots)  # queries in earlier rows and heads
        index = ((above + query) * (self.plan.groups * key_slots) + key).astype(jnp.uint32) + self.arrays.seeds[0]
        keep = hashed(index, self.arrays.seeds[1]) >= jnp.uint32(rate * 2**32)
        return jnp.where(keep, weights / (1 - rate), 0)

    def n_key_blocks(self, i: Any) -> Any:
        """Return how many blocks of a slot's keys query block i attends to, including its own."""
        if not self.pattern.window:
            return i + 1
        lowest = jnp.maximum(i * self.plan.block - self.pattern.window + 1, 0)
        return i + 1 - divide(lowest, self.plan.block)

    def n_query_blocks(self, j: Any) -> Any:
        """Return how many query blocks attend to key block j, including its own."""
        end: Any = self.plan.range[1]
        if self.pattern.window:
            last = (j + 1) * self.plan.block - 1 + self.pattern.window - 1
            end = jnp.minimum(end, divide(last, self.plan.block) + 1)
        return end - j


def add(totals: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, totals, more)


class Queries(NamedTuple):
    """Arrays that the backward pass loads for one block of queries."""

    q: Heads
    q_position: Heads | None
    d_out: Heads
    log_total: jax.Array
    correction: jax.Array

    @classmethod
    def load(cls, tile: Tile, i: Any, d_out: Any, log_total: Any, correction: Any) -> Queries:
        columns = (tile.load_column(ref, i) for ref in (log_total, correction))
        return cls(tile.load(tile.arrays.q, i), tile.load_position(i), tile.load(d_out, i), *columns)

    def gradients(self, tile: Tile, i: Any, slot: Any, d: Any, far: Any, near: Any) -> tuple[jax.Array, jax.Array]:
        """Return the weights after dropout and the gradient of the scores; `far` and `near` as in `Tile.by_key`."""
        weights = jnp.exp(tile.scores(i, slot, d, self.q, tile.by_key(i, slot, d, far, near)) - self.log_total)
        d_weights = tile.drop(i, slot, d, tile.logits(self.d_out, tile.load(tile.arrays.v, i - d, slot)))
        return tile.drop(i, slot, d, weights), weights * (d_weights - self.correction)


def forward_tile(tile: Tile) -> Any:
    """For a block of queries, return the result of attention and the log-sum-exp of the scores."""
    i = tile.plan.range[0] + tile.index
    q, q_position = tile.load(tile.arrays.q, i), tile.load_position(i)

    def add_slot(slot: Any, carry: Any) -> Any:
        def add_tile(d: Any, carry: Any) -> Any:
            near, largest, total, out = carry
            far = tile.by_lag(slot, d, q_position)
            scores = tile.scores(i, slot, d, q, tile.by_key(i, slot, d, far, near))
            new = jnp.maximum(largest, scores.max(-1, keepdims=True))
            weights, old = jnp.exp(scores - new), jnp.exp(largest - new)
            added = tile.weighted(tile.drop(i, slot, d, weights), tile.load(tile.arrays.v, i - d, slot))
            out = tuple(x * old + y for x, y in zip(out, added, strict=True))
            return far, new, total * old + weights.sum(-1, keepdims=True), out

        return lax.fori_loop(0, tile.n_key_blocks(i), add_tile, (tile.nothing(0, -1), *carry))[1:]

    column = jnp.zeros((tile.plan.block, 1), tile.wide)
    start = column + HIDDEN, column, tile.zeros()
    largest, total, out = tile.over_slots(add_slot, start)
    return tuple(x / total for x in out), largest + jnp.log(total)


def query_tile(tile: Tile, *more: Any) -> Any:
    """For a block of queries, return the gradients of q and, with relative positions, q_position."""
    i = tile.index
    queries = Queries.load(tile, i, *more)

    def of_lags(slot: Any, d: Any, far: Any, near: Any) -> tuple[Heads, ...]:
        if not tile.relative:
            return ()
        return (tile.weighted(tile.gradient_by_lag(d, far, near), tile.load_lags(slot, d - 1)),)

    def add_slot(slot: Any, totals: Any) -> Any:
        def add_tile(d: Any, carry: Any) -> Any:
            near, d_near, totals = carry
            far = tile.by_lag(slot, d, queries.q_position)
            _, d_scores = queries.gradients(tile, i, slot, d, far, near)
            d_far = tile.keep(1, d, d_scores) if tile.relative else None
            of_keys = tile.weighted(d_scores, tile.load(tile.arrays.k, i - d, slot))
            return far, d_far, add(totals, (of_keys, *of_lags(slot, d, d_far, d_near)))

        n = tile.n_key_blocks(i)
        nothing = tile.nothing(0, -1), tile.nothing(1, -1)
        _, d_near, totals = lax.fori_loop(0, n, add_tile, (*nothing, totals))
        # The last tile has no successor to add its kept gradients, so they are added here.
        return totals[:1] + add(totals[1:], of_lags(slot, n, tile.nothing(1, n), d_near))

    return tile.over_slots(add_slot, (tile.zeros(),) * (1 + tile.relative))


def stored_query_tile(tile: Tile, *more: Any) -> Any:
    """For a block of queries, return the gradient of q, and overwrite the logits with theirs."""
    i = tile.plan.range[0] + tile.index
    queries = Queries.load(tile, i, *more)

    def add_slot(slot: Any, total: Any) -> Any:
        def add_tile(d: Any, total: Any) -> Any:
            _, d_scores = queries.gradients(tile, i, slot, d, None, None)
            tile.store_logits(slot, d, d_scores)
            return add(total, tile.weighted(d_scores, tile.load(tile.arrays.k, i - d, slot)))

        n, nothing = tile.n_key_blocks(i), jnp.zeros((tile.plan.block,) * 2, tile.wide)
        end = tile.memory.shape[1] // tile.plan.block  # tiles n .. end - 1 have lags that these queries lack
        lax.fori_loop(n, end, lambda d, _: tile.store_logits(slot, d, nothing), None)
        return lax.fori_loop(0, n, add_tile, total)

    return (tile.over_slots(add_slot, tile.zeros()),)


def key_tile(tile: Tile, *more: Any) -> Any:
    """For a block of keys, return the gradients of k and v."""
    slot, j = tile.slot_and_block()

    def add_tile(d: Any, totals: Any) -> Any:
        queries = Queries.load(tile, j + d, *more)
        near, far = (tile.by_lag(slot, n, queries.q_position) for n in (d - 1, d))
        weights, d_scores = queries.gradients(tile, j + d, slot, d, far, near)
        new = tile.weighted(d_scores, queries.q, axis=0), tile.weighted(weights, queries.d_out, axis=0)
        return add(totals, new)

    start = jnp.maximum(tile.plan.range[0] - j, 0)
    return lax.fori_loop(start, tile.n_query_blocks(j), add_tile, (tile.zeros(),) * 2)


def lag_tile(tile: Tile, *more: Any) -> Any:
    """For a distance of d blocks, return the gradients of the two blocks of r that its tiles read."""
    slot, place = tile.slot_and_block()
    d = tile.plan.n_blocks - 1 - place
    nothing = tile.nothing(1, d)

    def add_tile(i: Any, totals: Any) -> Any:
        queries = Queries.load(tile, i, *more)
        assert queries.q_position is not None
        near, far = (tile.by_lag(slot, n, queries.q_position) for n in (d - 1, d))
        _, d_scores = queries.gradients(tile, i, slot, d, far, near)
        by_lag = tile.gradient_by_lag(d, nothing, tile.keep(1, d - 1, d_scores), 2)
        return add(totals, tile.weighted(by_lag, queries.q_position, axis=0))

    end: Any = tile.plan.n_blocks
    if tile.pattern.window:
        hidden = (d - 1) * tile.plan.block + 1 >= tile.pattern.window
        end = jnp.where(hidden, jnp.zeros_like(d), end)
    return (lax.fori_loop(d, end, add_tile, tile.zeros(2)),)
