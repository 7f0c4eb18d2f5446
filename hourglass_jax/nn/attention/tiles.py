"""What a program of the flash kernels computes: one block of queries, keys or lags, against all blocks that it meets.

A tile is a block of b query groups against one key of each of b groups, d blocks before. Row a of its relative logits
lies in a product with two blocks of r, those d and d - 1 blocks from lag 0, from column b - 1 - a on. Tiles beside each
other share one of the blocks: a program that walks over keys computes each once. Rows are moved by rotation on a TPU;
on a GPU, which cannot move numbers between columns otherwise, through memory.
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

Heads = tuple[jax.Array, ...]  # vectors of a head [n, K], in parts of its numbers
HIDDEN = -1e30  # a score; -inf would give nan where all of a row's tile is hidden


class Arrays(NamedTuple):
    """What the kernels read, G groups in whole blocks.

    q, q_position: [B, H P, G, K], query slots as heads.
    k, v: [B, H, S G, K], one key slot after another.
    r: [H P, S G, K], likewise; the last row of a slot is for the smallest lag.
    rows: int32 [B, 2], each row's number in the whole batch and its first group; before that is padding.
    seeds: uint32 [2], of dropout.
    """

    q: Any
    k: Any
    v: Any
    q_position: Any
    r: Any
    rows: Any
    seeds: Any


class Plan(NamedTuple):
    """What is fixed when the kernels are compiled.

    heads, groups: H, and G without what fills up the last block.
    parts: into which K is cut, since a GPU's products have sizes that are powers of two: 96 is 64 + 32.
    block: b, query groups of a block, and keys. n_blocks: of queries, and of the keys of a slot.
    by_memory: how logits are aligned.
    """

    pattern: Pattern
    platform: str
    heads: int
    groups: int
    parts: tuple[int, ...]
    block: int
    n_blocks: int
    by_memory: bool

    @property
    def columns(self) -> list[Any]:
        """Where each part of a head is."""
        return [pl.ds(start, n) for start, n in zip(itertools.accumulate((0, *self.parts)), self.parts, strict=False)]

    @property
    def n_tiles(self) -> int:
        """That are computed, of a head and a key slot."""
        window = self.pattern.window or self.n_blocks * self.block
        return sum(i + 1 - max(i * self.block - window + 1, 0) // self.block for i in range(self.n_blocks))


def divide(x: Any, n: int) -> Any:
    """x // n for what is not negative."""
    return x if n == 1 else lax.div(x, jnp.asarray(n, x.dtype))


class Tile:
    """One program's view: the arrays of its batch row and head, and what it does with a tile of them."""

    def __init__(self, plan: Plan, arrays: Arrays, memory: Any):
        self.plan, self.pattern, self.arrays, self.memory = plan, plan.pattern, arrays, memory
        self.row, self.first = arrays.rows[pl.program_id(0), 0], arrays.rows[pl.program_id(0), 1]
        self.head, self.index = pl.program_id(1), pl.program_id(2)
        self.wide = at_least_float32(arrays.q.dtype)
        self.relative = arrays.r is not None

    def slot_and_block(self) -> tuple[Any, Any]:
        """Of keys or lags, where the program is for such."""
        if self.pattern.key_slots == 1:
            return 0, self.index
        slot = divide(self.index, self.plan.n_blocks)
        return slot, self.index - slot * self.plan.n_blocks

    def over_slots(self, meet: Callable[[Any, Any], Any], carry: Any) -> Any:
        """The last of carry = meet(slot, carry)."""
        n = self.pattern.key_slots
        return meet(0, carry) if n == 1 else lax.fori_loop(0, n, meet, carry)

    def load(self, ref: Any, i: Any, slot: Any = 0) -> Heads:
        """The i-th block of rows of a slot."""
        rows = pl.ds((slot * self.plan.n_blocks + i) * self.plan.block, self.plan.block)
        return tuple(ref[rows, columns] for columns in self.plan.columns)

    def load_column(self, ref: Any, i: Any) -> jax.Array:
        return ref[pl.ds(i * self.plan.block, self.plan.block), :]

    def load_position(self, i: Any) -> Heads | None:
        return self.load(self.arrays.q_position, i) if self.relative else None

    def load_lags(self, slot: Any, d: Any) -> Heads:
        """The block of r that is d blocks from lag 0; any for -1, of keys that are hidden."""
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

    def places(self, columns: int) -> tuple[jax.Array, jax.Array]:
        shape = self.plan.block, columns
        return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)

    def scores(self, i: Any, slot: Any, d: Any, q: Heads, by_key: jax.Array | None) -> jax.Array:
        """Of query block i and the keys d blocks before; relative logits are added."""
        scores = self.logits(q, self.load(self.arrays.k, i - d, slot))
        if by_key is not None:
            scores += by_key
        queries, keys = self.places(self.plan.block)
        queries, keys = queries + i * self.plan.block, keys + (i - d) * self.plan.block
        return jnp.where((keys <= queries) & (keys >= self.pattern.lowest(queries, self.first)), scores, HIDDEN)

    def by_lag(self, slot: Any, d: Any, q_position: Heads | None) -> Any:
        """Relative logits of lags d blocks from 0, kept for `by_key`."""
        if q_position is None:
            return None
        return self.keep(0, d, self.logits(q_position, self.load_lags(slot, d)))

    def by_key(self, d: Any, far: Any, near: Any) -> jax.Array | None:
        """Relative logits of a tile, from those of lags d and d - 1 blocks from 0."""
        block = self.plan.block
        if not self.relative:
            return None
        if self.plan.by_memory:
            return self.recall(0, d, block - 1 - self.places(block)[0])
        return mosaic.roll(jnp.concatenate([far, near], axis=1), block + 1, 1, stride=1, stride_axis=0)[:, :block]

    def gradient_by_lag(self, d: Any, far: Any, near: Any, n: int = 1) -> jax.Array:
        """The transpose of `by_key`: of lags d - 1 blocks from 0, from the scores' gradients, kept, of two tiles.

        Row a begins at column a + 1. The tiles are a circle, of which n blocks are read.
        """
        block = self.plan.block
        if self.plan.by_memory:
            return self.recall(1, d, self.places(n * block)[0] + 1)
        x = jnp.concatenate([far, near], axis=1)
        start = self.places(2 * block)[0] + 1
        for bit in range(block.bit_length()):  # a TPU's rotation with a stride goes the other way alone
            x = jnp.where((start & (1 << bit)) != 0, mosaic.roll(x, 2 * block - (1 << bit), 1), x)
        return x[:, : n * block]

    def keep(self, ring: int, d: Any, x: jax.Array) -> Any:
        """x itself; or None where it is put into memory: one of a ring's two places, rounded to the inputs' type."""
        if not self.plan.by_memory:
            return x
        self.barrier()
        self.memory[:, pl.ds((2 * ring + (d & 1)) * self.plan.block, self.plan.block)] = x.astype(self.memory.dtype)
        return None

    def recall(self, ring: int, d: Any, start: jax.Array) -> jax.Array:
        """[b, n] -> [b, n], what lies in a ring's memory from columns `start` on, counted from that of d."""
        size = 2 * self.plan.block  # a power of two
        rows, columns = self.places(start.shape[1])
        columns = ring * size + (((d & 1) * self.plan.block + start + columns) & (size - 1))
        self.barrier()
        interpreted = self.plan.platform == "cpu"
        x = self.memory[rows, columns] if interpreted else triton.load(self.memory.at[rows, columns])
        return x.astype(self.wide)

    def nothing(self, ring: int, d: Any) -> Any:
        """Zeros, kept; None without relative positions."""
        return self.keep(ring, d, jnp.zeros((self.plan.block,) * 2, self.wide)) if self.relative else None

    def barrier(self) -> None:
        if self.plan.platform == "gpu":
            triton.debug_barrier()

    def drop(self, i: Any, slot: Any, d: Any, weights: jax.Array) -> jax.Array:
        """As `layers.dropped` would on the weights of the whole batch, [B, H, G P, G S]."""
        rate = self.pattern.dropout
        if not rate:
            return weights
        slots, key_slots = self.pattern.query_slots, self.pattern.key_slots
        queries, keys = self.places(self.plan.block)
        head = divide(self.head, slots)
        query = (i * self.plan.block + queries) * slots + self.head - head * slots
        key = ((i - d) * self.plan.block + keys) * key_slots + slot
        above = (self.row * self.plan.heads + head) * (self.plan.groups * slots)  # queries of heads before
        index = ((above + query) * (self.plan.groups * key_slots) + key).astype(jnp.uint32) + self.arrays.seeds[0]
        keep = hashed(index, self.arrays.seeds[1]) >= jnp.uint32(rate * 2**32)
        return jnp.where(keep, weights / (1 - rate), 0)

    def reach(self, i: Any) -> Any:
        """How many blocks of a slot's keys block i of queries meets, its own included."""
        if not self.pattern.window:
            return i + 1
        lowest = jnp.maximum(i * self.plan.block - self.pattern.window + 1, 0)
        return i + 1 - divide(lowest, self.plan.block)

    def reach_back(self, j: Any) -> Any:
        """How many blocks of queries meet block j of keys, its own included."""
        end: Any = self.plan.n_blocks
        if self.pattern.window:
            last = (j + 1) * self.plan.block - 1 + self.pattern.window - 1
            end = jnp.minimum(end, divide(last, self.plan.block) + 1)
        return end - j


def add(totals: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, totals, more)


class Queries(NamedTuple):
    """Of one block: what the backward pass needs of queries."""

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
        """The weights after dropout, and the gradient of the scores; `far` and `near` as in `Tile.by_key`."""
        weights = jnp.exp(tile.scores(i, slot, d, self.q, tile.by_key(d, far, near)) - self.log_total)
        d_weights = tile.drop(i, slot, d, tile.logits(self.d_out, tile.load(tile.arrays.v, i - d, slot)))
        return tile.drop(i, slot, d, weights), weights * (d_weights - self.correction)


def forward_tile(tile: Tile) -> Any:
    """Of a block of queries: what attention returns, and the logarithm of the sum over keys."""
    i = tile.index
    q, q_position = tile.load(tile.arrays.q, i), tile.load_position(i)

    def meet_slot(slot: Any, carry: Any) -> Any:
        def meet(d: Any, carry: Any) -> Any:
            near, largest, total, out = carry
            far = tile.by_lag(slot, d, q_position)
            scores = tile.scores(i, slot, d, q, tile.by_key(d, far, near))
            new = jnp.maximum(largest, scores.max(-1, keepdims=True))
            weights, old = jnp.exp(scores - new), jnp.exp(largest - new)
            added = tile.weighted(tile.drop(i, slot, d, weights), tile.load(tile.arrays.v, i - d, slot))
            out = tuple(x * old + y for x, y in zip(out, added, strict=True))
            return far, new, total * old + weights.sum(-1, keepdims=True), out

        return lax.fori_loop(0, tile.reach(i), meet, (tile.nothing(0, -1), *carry))[1:]

    column = jnp.zeros((tile.plan.block, 1), tile.wide)
    start = column + HIDDEN, column, tile.zeros()
    largest, total, out = tile.over_slots(meet_slot, start)
    return tuple(x / total for x in out), largest + jnp.log(total)


def query_tile(tile: Tile, *more: Any) -> Any:
    """Of a block of queries: the gradients of q and, with relative positions, q_position."""
    i = tile.index
    queries = Queries.load(tile, i, *more)

    def of_lags(slot: Any, d: Any, far: Any, near: Any) -> tuple[Heads, ...]:
        if not tile.relative:
            return ()
        return (tile.weighted(tile.gradient_by_lag(d, far, near), tile.load_lags(slot, d - 1)),)

    def meet_slot(slot: Any, totals: Any) -> Any:
        def meet(d: Any, carry: Any) -> Any:
            near, d_near, totals = carry
            far = tile.by_lag(slot, d, queries.q_position)
            _, d_scores = queries.gradients(tile, i, slot, d, far, near)
            d_far = tile.keep(1, d, d_scores) if tile.relative else None
            of_keys = tile.weighted(d_scores, tile.load(tile.arrays.k, i - d, slot))
            return far, d_far, add(totals, (of_keys, *of_lags(slot, d, d_far, d_near)))

        n = tile.reach(i)
        nothing = tile.nothing(0, -1), tile.nothing(1, -1)
        _, d_near, totals = lax.fori_loop(0, n, meet, (*nothing, totals))
        # The last block of lags has what the last tile left for the next, which is none.
        return totals[:1] + add(totals[1:], of_lags(slot, n, tile.nothing(1, n), d_near))

    return tile.over_slots(meet_slot, (tile.zeros(),) * (1 + tile.relative))


def key_tile(tile: Tile, *more: Any) -> Any:
    """Of a block of keys: the gradients of k and v."""
    slot, j = tile.slot_and_block()

    def meet(d: Any, totals: Any) -> Any:
        queries = Queries.load(tile, j + d, *more)
        near, far = (tile.by_lag(slot, n, queries.q_position) for n in (d - 1, d))
        weights, d_scores = queries.gradients(tile, j + d, slot, d, far, near)
        new = tile.weighted(d_scores, queries.q, axis=0), tile.weighted(weights, queries.d_out, axis=0)
        return add(totals, new)

    return lax.fori_loop(0, tile.reach_back(j), meet, (tile.zeros(),) * 2)


def lag_tile(tile: Tile, *more: Any) -> Any:
    """Of the two blocks of r that the tiles have whose keys are d blocks before: what comes of these tiles."""
    slot, place = tile.slot_and_block()
    d = tile.plan.n_blocks - 1 - place
    nothing = tile.nothing(1, d)

    def meet(i: Any, totals: Any) -> Any:
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
    return (lax.fori_loop(d, end, meet, tile.zeros(2)),)
