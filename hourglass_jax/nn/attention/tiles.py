"""What a program of the flash kernels computes: one block of queries, keys or lags, against all blocks that it meets.

A tile is a block of b query groups against a block of b keys, of which S belong to a group. Its relative logits are
a product with a slab of rows of r, aligned with the keys afterwards: row a of the product moves left by S (b - 1 - a),
by rotation on a TPU, through memory on a GPU, which cannot move numbers between columns otherwise.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton

from hourglass_jax.nn.attention.pattern import Pattern
from hourglass_jax.nn.layers import hashed

Heads = tuple[jax.Array, ...]  # vectors of a head [n, K], in parts of its numbers
HIDDEN = -1e30  # a score; -inf would give nan where all of a row's tile is hidden


class Arrays(NamedTuple):
    """What the kernels read.

    q, q_position: [B, H P, G, K], query slots as heads. k, v: [B, H, G S, K]. r: [H P, N S, K].
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

    heads, groups: H and G, without padding.
    parts: into which K is cut, since a GPU's products have sizes that are powers of two: 96 is 64 + 32.
    block: b, query groups of a block, and keys. n_blocks: of queries.
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
    def slab(self) -> int:
        """Rows of r for the lags of a tile; a power of two."""
        return pl.next_power_of_2((self.block - 1) * self.pattern.key_slots + self.block)

    @property
    def n_lags(self) -> int:
        """Blocks of lags, as many as of keys: the slab of tile (i, j) begins at block n_lags - S (i + 1) + j."""
        return self.n_blocks * self.pattern.key_slots

    @property
    def n_tiles(self) -> int:
        """That are computed, of a head."""
        slots, window = self.pattern.key_slots, self.pattern.window or self.n_blocks * self.block
        lowest = [max(i * self.block - window + 1, 0) * slots // self.block for i in range(self.n_blocks)]
        return sum((i + 1) * slots - low for i, low in enumerate(lowest))


def divide(x: Any, n: int) -> Any:
    """x // n for what is not negative."""
    return x if n == 1 else lax.div(x, jnp.asarray(n, x.dtype))


class Tile:
    """One program's view: the arrays of its batch row and head, and what it does with a tile of them."""

    def __init__(self, plan: Plan, arrays: Arrays, memory: Any):
        self.plan, self.pattern, self.arrays, self.memory = plan, plan.pattern, arrays, memory
        self.row, self.first = arrays.rows[pl.program_id(0), 0], arrays.rows[pl.program_id(0), 1]
        self.head, self.index = pl.program_id(1), pl.program_id(2)
        self.wide = jnp.promote_types(arrays.q.dtype, jnp.float32)

    def load(self, ref: Any, i: Any, n: int = 1) -> Heads:
        """n blocks of rows, from the i-th on."""
        rows = pl.ds(i * self.plan.block, n * self.plan.block)
        return tuple(ref[rows, columns] for columns in self.plan.columns)

    def load_column(self, ref: Any, i: Any) -> jax.Array:
        return ref[pl.ds(i * self.plan.block, self.plan.block), :]

    def load_position(self, i: Any) -> Heads | None:
        return None if self.arrays.q_position is None else self.load(self.arrays.q_position, i)

    def slab(self, i: Any, j: Any) -> Heads:
        start = self.plan.n_lags - self.pattern.key_slots * (i + 1) + j
        return self.load(self.arrays.r, start, self.plan.slab // self.plan.block)

    def zeros(self, rows: int) -> Heads:
        return tuple(jnp.zeros((rows, n), self.wide) for n in self.plan.parts)

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

    def scores(self, i: Any, j: Any, q: Heads, q_position: Heads | None) -> jax.Array:
        """Of query block i and key block j."""
        scores = self.logits(q, self.load(self.arrays.k, j))
        if q_position is not None:
            scores += self.by_key(self.logits(q_position, self.slab(i, j)))
        queries, keys = self.places(self.plan.block)
        queries, keys = queries + i * self.plan.block, keys + j * self.plan.block
        groups = divide(keys, self.pattern.key_slots)
        return jnp.where((groups <= queries) & (groups >= self.pattern.lowest(queries, self.first)), scores, HIDDEN)

    def by_key(self, by_lag: jax.Array) -> jax.Array:
        """[b, slab] -> [b, b]."""
        block, slots, slab = self.plan.block, self.pattern.key_slots, self.plan.slab
        if not self.plan.by_memory and slots == 1:
            return mosaic.roll(by_lag, slab - block + 1, 1, stride=1, stride_axis=0)[:, :block]
        if not self.plan.by_memory:
            return self.rotated(by_lag, -1)[:, :block]
        rows, columns = self.places(block)
        return self.through_memory(by_lag, rows, columns + slots * (block - 1 - rows))

    def by_lag(self, by_key: jax.Array) -> jax.Array:
        """[b, b] -> [b, slab], with zeros for the lags that a row does not meet: the transpose of `by_key`."""
        block, slots, slab = self.plan.block, self.pattern.key_slots, self.plan.slab
        rows, columns = self.places(slab)
        if not self.plan.by_memory:
            return self.rotated(jnp.concatenate([by_key, jnp.zeros((block, slab - block), by_key.dtype)], axis=1), 1)
        columns -= slots * (block - 1 - rows)
        met = (columns >= 0) & (columns < block)
        return jnp.where(met, self.through_memory(by_key, rows, jnp.clip(columns, 0, block - 1)), 0)

    def rotated(self, x: jax.Array, direction: int) -> jax.Array:
        """Row a of x, [b, slab], moved by S (b - 1 - a) columns.

        Bit by bit: a TPU's rotation with a stride could do it for S = 1 alone, and to the left.
        """
        block, slots = self.plan.block, self.pattern.key_slots
        distances = block - 1 - self.places(x.shape[1])[0]
        for bit in range((block - 1).bit_length()):
            shift = (direction * slots << bit) % x.shape[1]
            x = jnp.where((distances & (1 << bit)) != 0, mosaic.roll(x, shift, 1), x)
        return x

    def through_memory(self, x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """x[rows, columns], rounded to the inputs' type."""
        interpreted = self.plan.platform == "cpu"
        memory = self.memory.at[:, pl.ds(0, x.shape[1])]
        if not interpreted:
            triton.debug_barrier()
        memory[...] = x.astype(memory.dtype)
        if not interpreted:
            triton.debug_barrier()
        moved = self.memory[rows, columns] if interpreted else triton.load(self.memory.at[rows, columns])
        return moved.astype(x.dtype)

    def drop(self, i: Any, j: Any, weights: jax.Array) -> jax.Array:
        """As `layers.dropped` would on the weights of the whole batch, [B, H, G P, G S]."""
        rate = self.pattern.dropout
        if not rate:
            return weights
        slots, n_keys = self.pattern.query_slots, self.plan.groups * self.pattern.key_slots
        queries, keys = self.places(self.plan.block)
        head = divide(self.head, slots)
        query = (i * self.plan.block + queries) * slots + self.head - head * slots
        above = (self.row * self.plan.heads + head) * (self.plan.groups * slots)  # queries of heads before
        index = ((above + query) * n_keys + keys + j * self.plan.block).astype(jnp.uint32) + self.arrays.seeds[0]
        keep = hashed(index, self.arrays.seeds[1]) >= jnp.uint32(rate * 2**32)
        return jnp.where(keep, weights / (1 - rate), 0)

    def key_blocks(self, i: Any) -> tuple[Any, Any]:
        """From which to before which block of keys block i of queries meets."""
        slots = self.pattern.key_slots
        if not self.pattern.window:
            return 0, (i + 1) * slots
        lowest = jnp.maximum(i * self.plan.block - self.pattern.window + 1, 0)
        return divide(lowest * slots, self.plan.block), (i + 1) * slots

    def query_blocks(self, j: Any) -> tuple[Any, Any]:
        """From which to before which block of queries block j of keys meets."""
        slots = self.pattern.key_slots
        end: Any = self.plan.n_blocks
        if self.pattern.window:
            last = divide((j + 1) * self.plan.block - 1, slots) + self.pattern.window - 1
            end = jnp.minimum(end, divide(last, self.plan.block) + 1)
        return divide(j, slots), end


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

    def gradients(self, tile: Tile, i: Any, j: Any) -> tuple[jax.Array, jax.Array]:
        """The weights after dropout, and the gradient of the scores."""
        weights = jnp.exp(tile.scores(i, j, self.q, self.q_position) - self.log_total)
        d_weights = tile.drop(i, j, tile.logits(self.d_out, tile.load(tile.arrays.v, j)))
        return tile.drop(i, j, weights), weights * (d_weights - self.correction)


def forward_tile(tile: Tile) -> Any:
    """Of a block of queries: what attention returns, and the logarithm of the sum over keys."""
    i = tile.index
    q = tile.load(tile.arrays.q, i)
    q_position = tile.load_position(i)

    def meet(j: Any, carry: Any) -> Any:
        largest, total, out = carry
        scores = tile.scores(i, j, q, q_position)
        new = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights, old = jnp.exp(scores - new), jnp.exp(largest - new)
        added = tile.weighted(tile.drop(i, j, weights), tile.load(tile.arrays.v, j))
        out = tuple(x * old + y for x, y in zip(out, added, strict=True))
        return new, total * old + weights.sum(-1, keepdims=True), out

    column = jnp.zeros((tile.plan.block, 1), tile.wide)
    start = column + HIDDEN, column, tile.zeros(tile.plan.block)
    largest, total, out = lax.fori_loop(*tile.key_blocks(i), meet, start)
    return tuple(x / total for x in out), largest + jnp.log(total)


def query_tile(tile: Tile, *more: Any) -> Any:
    """Of a block of queries: the gradients of q and, with relative positions, q_position."""
    i, relative = tile.index, tile.arrays.r is not None
    queries = Queries.load(tile, i, *more)

    def meet(j: Any, totals: Any) -> Any:
        _, d_scores = queries.gradients(tile, i, j)
        new = [tile.weighted(d_scores, tile.load(tile.arrays.k, j))]
        if relative:
            new.append(tile.weighted(tile.by_lag(d_scores), tile.slab(i, j)))
        return jax.tree.map(jnp.add, totals, tuple(new))

    return lax.fori_loop(*tile.key_blocks(i), meet, (tile.zeros(tile.plan.block),) * (1 + relative))


def key_tile(tile: Tile, *more: Any) -> Any:
    """Of a block of keys: the gradients of k and v."""
    j = tile.index

    def meet(i: Any, totals: Any) -> Any:
        queries = Queries.load(tile, i, *more)
        weights, d_scores = queries.gradients(tile, i, j)
        new = tile.weighted(d_scores, queries.q, axis=0), tile.weighted(weights, queries.d_out, axis=0)
        return jax.tree.map(jnp.add, totals, new)

    return lax.fori_loop(*tile.query_blocks(j), meet, (tile.zeros(tile.plan.block),) * 2)


def lag_tile(tile: Tile, *more: Any) -> Any:
    """Of a slab of r, in all tiles (i, j) that have it: its gradient."""
    slots = tile.pattern.key_slots
    lag = tile.plan.n_lags - 1 - tile.index  # in blocks: S i - j + S - 1

    def meet(i: Any, total: Any) -> Any:
        queries = Queries.load(tile, i, *more)
        _, d_scores = queries.gradients(tile, i, slots * (i + 1) - 1 - lag)
        assert queries.q_position is not None
        return jax.tree.map(jnp.add, total, tile.weighted(tile.by_lag(d_scores), queries.q_position, axis=0))

    end: Any = tile.plan.n_blocks
    if tile.pattern.window:
        hidden = (lag - slots + 1) * tile.plan.block - tile.plan.block + 1 >= tile.pattern.window * slots
        end = jnp.where(hidden, jnp.zeros_like(lag), end)
    return (lax.fori_loop(divide(lag, slots), end, meet, tile.zeros(tile.plan.slab)),)
