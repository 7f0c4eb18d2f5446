"""The formula as it stands, in jnp alone: memory grows with the square of the length, and any transformation applies.

Such are `jax.jvp`, Hessian-vector products and `jax.vmap(jax.grad(...))`. The other implementations are tested on it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hourglass_jax.nn.attention.pattern import Inputs, Pattern, float32_at_least
from hourglass_jax.nn.layers import dropped
from hourglass_jax.nn.positions import align_lags


def plain_attention(
    pattern: Pattern, inputs: Inputs, padding: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """-> [B, H, G P, K]. For `padding` see `Pattern`; `key` turns dropout on."""
    q, k, v, q_position, _ = inputs
    batch, heads, n_queries, size = q.shape
    groups = n_queries // pattern.query_slots
    lags = groups if pattern.causal else 2 * groups - 1
    r = inputs.nearest(lags * pattern.key_slots)
    scores = jnp.einsum("bhqk,bhmk->bhqm", q, k)
    if r is not None and q_position is not None:
        q_position = q_position.reshape(batch, heads, groups, pattern.query_slots, size)
        by_lag = jnp.einsum("bhgpk,phmk->bhpgm", q_position, r)
        by_key = align_lags(by_lag.reshape(*by_lag.shape[:-1], lags, pattern.key_slots))[..., :groups, :]
        scores += by_key.reshape(*by_lag.shape[:-1], -1).swapaxes(2, 3).reshape(scores.shape)
    visible = pattern.visible(
        jnp.arange(n_queries) // pattern.query_slots, jnp.arange(k.shape[2]) // pattern.key_slots, padding
    )
    weights = jax.nn.softmax(jnp.where(visible, float32_at_least(scores), -jnp.inf))
    if key is not None:
        weights = dropped(weights, pattern.dropout, key)
    return jnp.einsum("bhqm,bhmk->bhqk", weights.astype(v.dtype), v)
