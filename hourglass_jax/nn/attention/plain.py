"""Attention computed directly from its formula in jnp: the reference for the other implementations.

With relative positions (Transformer-XL, Dai et al. 2019, section 3.3) the score of query i and key j <= i is

    ((q_i + u) . k_j + (q_i + v) . W_r R_(i-j)) / sqrt(K)

where R holds the sinusoids of the distance i - j, and u, v are learned biases. `Inputs` has q_i + u as `q`, q_i + v as
`q_position` and W_r R as `r`; `positions.relative_shift` aligns the second term, computed by lag, to keys.

Memory grows with the square of the length. Supports every transformation of JAX, such as `jax.jvp`, Hessian-vector
products and `jax.vmap(jax.grad(...))`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hourglass_jax.nn.attention.pattern import Inputs, Pattern, upcast
from hourglass_jax.nn.layers import dropped
from hourglass_jax.nn.positions import relative_shift


def plain_attention(
    pattern: Pattern, inputs: Inputs, padding: Array | None = None, key: Array | None = None
) -> Float[Array, "B H GP K"]:
    """Compute attention; `Pattern` describes `padding`. `key` turns dropout on."""
    q, k, v, q_position, _ = inputs
    batch, heads, n_queries, size = q.shape
    groups = n_queries // pattern.query_slots
    lags = groups if pattern.causal else 2 * groups - 1
    r = inputs.nearest(lags * pattern.key_slots)
    scores = jnp.einsum("bhqk,bhmk->bhqm", q, k)
    if r is not None and q_position is not None:
        q_position = q_position.reshape(batch, heads, groups, pattern.query_slots, size)
        by_lag = jnp.einsum("bhgpk,phmk->bhpgm", q_position, r)
        by_key = relative_shift(by_lag.reshape(*by_lag.shape[:-1], lags, pattern.key_slots))[..., :groups, :]
        scores += by_key.reshape(*by_lag.shape[:-1], -1).swapaxes(2, 3).reshape(scores.shape)
    query_groups = jnp.arange(n_queries, dtype=jnp.int32) // pattern.query_slots
    key_groups = jnp.arange(k.shape[2], dtype=jnp.int32) // pattern.key_slots
    visible = pattern.visible(query_groups, key_groups, padding)
    weights = jax.nn.softmax(jnp.where(visible, upcast(scores), -jnp.inf))
    if key is not None:
        weights = dropped(weights, pattern.dropout, key)
    return jnp.einsum("bhqm,bhmk->bhqk", weights.astype(v.dtype), v)
