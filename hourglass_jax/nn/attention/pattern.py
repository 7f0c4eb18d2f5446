"""The mask, `Pattern`, and the arrays, `Inputs`, that every implementation of attention receives.

Causal: a query in group g attends to all keys of groups `lowest` .. g. Padding and a window only change `lowest`.
Not causal: a query attends to all keys that are not padding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hourglass_jax.nn.layers import at_least_float32


class Inputs(NamedTuple):
    """Queries, keys and values of G groups with P query slots and S key slots; `plain` has the formula.

    q: q + u with relative positions, otherwise q; divided by sqrt(K).
    q_position: q + v, divided by sqrt(K); None without relative positions.
    r: W_r R for each query slot, with S rows per lag. Lags are in groups and fall from N - 1 to 0; if not causal, from
        G - 1 to 1 - G.
    """

    q: Float[Array, "B H GP K"]
    k: Float[Array, "B H GS K"]
    v: Float[Array, "B H GS K"]
    q_position: Float[Array, "B H GP K"] | None = None
    r: Float[Array, "P H NS K"] | None = None

    def nearest(self, n: int) -> Float[Array, "P H n K"] | None:
        """Return the last n rows of r; rows that r lacks are zero, and the mask hides their lags."""
        if self.r is None:
            return None
        n_rows = self.r.shape[2]
        return jnp.pad(self.r[:, :, max(n_rows - n, 0) :], [(0, 0), (0, 0), (max(n - n_rows, 0), 0), (0, 0)])


class Pattern(NamedTuple):
    """The mask and the dropout rate, static at compile time.

    query_slots, key_slots: P and S.
    dropout: the probability of zeroing a weight.
    window: the number of groups that a query attends to, including its own; 0: no limit.
    causal: whether a query attends only to groups up to its own.

    `padding` in methods and implementations is int [B], the number of padding groups at the start of each row. If not
    causal, it is bool [B, G S], true for keys that are not padding. None: no padding.
    """

    query_slots: int
    key_slots: int
    dropout: float = 0.0
    window: int = 0
    causal: bool = True

    def lowest(self, groups: Int[Array, " ..."], first: Array | int) -> Int[Array, " ..."]:
        """Return the lowest group that queries in `groups` attend to.

        Groups before `first` are padding; each attends to itself only.
        """
        lowest = jnp.maximum(first, groups - self.window + 1) if self.window else first
        return jnp.minimum(lowest, groups)

    def visible(
        self, queries: Int[Array, " n"], keys: Int[Array, " m"], padding: Array | None
    ) -> Bool[Array, "#B 1 #n #m"]:
        """Return the mask for queries and keys, given as their groups.

        If not causal and a row is all padding, all of its keys are visible, so that its unused result is finite.
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


def upcast(x: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """Cast to float32 unless x has a wider type."""
    return x.astype(at_least_float32(x.dtype))
