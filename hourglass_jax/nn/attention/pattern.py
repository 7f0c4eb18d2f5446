"""Who sees whom, and what every implementation of attention is given.

A query of group g sees the keys of the groups `lowest` .. g, whole: padding only moves what is lowest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """Of G groups with P query slots and S key slots each, of which a query sees the groups up to its own.

    q: [B, H, G P, K], scaled.
    k, v: [B, H, G S, K].
    q_position: as q, with the other bias of the Transformer-XL formula; None without relative positions.
    r: [P, H, G S, K], W_r R for each query slot; its groups of S rows are for lags of G - 1 groups down to 0.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_position: jax.Array | None = None
    r: jax.Array | None = None


class Pattern(NamedTuple):
    """What is fixed when a program is compiled: P, S, and the probability by which a weight is dropped."""

    query_slots: int
    key_slots: int
    dropout: float = 0.0

    def lowest(self, groups: jax.Array, first: jax.Array) -> jax.Array:
        """The lowest group that queries of `groups` see; those before `first` are padding, seen by themselves alone."""
        return jnp.minimum(first, groups)

    def visible(self, queries: jax.Array, keys: jax.Array, first: jax.Array | None) -> jax.Array:
        """bool [B or 1, 1, n, m], for the groups of queries [n] and keys [m]; `first` is [B]."""
        queries = queries[None, None, :, None]
        visible = keys <= queries
        if first is None:
            return visible
        return visible & (keys >= self.lowest(queries, first[:, None, None, None]))


def float32_at_least(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
