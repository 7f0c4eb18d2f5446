"""Who sees whom, and what every implementation of attention is given.

A query of group g sees the keys of the groups `lowest` .. g, whole: padding and a window only move what is lowest.
Where it is not causal, it sees all keys that count.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hourglass_jax.nn.layers import at_least_float32


class Inputs(NamedTuple):
    """Of G groups with P query slots and S key slots each, of which a query sees the groups up to its own.

    q: [B, H, G P, K], scaled.
    k, v: [B, H, G S, K].
    q_position: as q, with the other bias of the Transformer-XL formula; None without relative positions.
    r: [P, H, N S, K], W_r R for each query slot; its groups of S rows are for lags of N - 1 groups, the largest lag
        there is, down to 0; or, not causal, for lags of G - 1 down to 1 - G.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_position: jax.Array | None = None
    r: jax.Array | None = None

    def nearest(self, n: int) -> jax.Array | None:
        """The last n rows of r; where there are fewer, with zeros in front: for lags that are hidden."""
        if self.r is None:
            return None
        n_rows = self.r.shape[2]
        return jnp.pad(self.r[:, :, max(n_rows - n, 0) :], [(0, 0), (0, 0), (max(n - n_rows, 0), 0), (0, 0)])


class Pattern(NamedTuple):
    """What is fixed when a program is compiled.

    query_slots, key_slots: P and S, of a group.
    dropout: probability by which a weight is zeroed.
    window: groups that a query sees, its own included; 0: all.
    causal: whether it sees no group after its own.

    What is `padding` where it is given: the groups before int [B]; not causal, the keys but those of bool [B, G S].
    """

    query_slots: int
    key_slots: int
    dropout: float = 0.0
    window: int = 0
    causal: bool = True

    def lowest(self, groups: jax.Array, first: jax.Array | int) -> jax.Array:
        """The lowest group that queries of `groups` see; those before `first` are padding, seen by themselves alone."""
        lowest = jnp.maximum(first, groups - self.window + 1) if self.window else first
        return jnp.minimum(lowest, groups)

    def visible(self, queries: jax.Array, keys: jax.Array, padding: jax.Array | None) -> jax.Array:
        """bool [B or 1, 1, n or 1, m or 1], for the groups of queries [n] and keys [m].

        In a row of nothing but padding, which nobody reads, all is seen, so that its numbers are finite.
        """
        if not self.causal:
            if padding is None:
                return jnp.ones((1, 1, 1, 1), bool)
            return (padding | ~padding.any(axis=1, keepdims=True))[:, None, None]
        queries, keys = queries[None, None, :, None], keys[None, None, None]
        visible = keys <= queries
        if padding is None and not self.window:
            return visible
        return visible & (keys >= self.lowest(queries, 0 if padding is None else padding[:, None, None, None]))


def float32_at_least(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))
