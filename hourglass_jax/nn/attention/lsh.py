"""LSH attention (Reformer, arXiv:2001.04451; the paper's section 3.3): a query meets the keys that hash near it.

Queries and keys share a projection. Of each round, the positions are sorted by bucket and time and cut into chunks; a
chunk sees itself and the one before it. So the cost is linear in length, and the attention NOT CAUSAL in the strict
sense: how many later positions hash before a key decides whether it falls into a query's chunk. Later tokens are never
attended to, and every derivative with respect to them is zero; but a prediction may change with them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.attention.pattern import float32_at_least
from hourglass_jax.nn.layers import Dropout, dropped, linear, split_key
from hourglass_jax.nn.positions import rotate

LATER, ITSELF = -1e30, -1e5  # scores of a later position, and of the own one: only where there is nothing else
EVALUATION_SEED = 0  # of the hash where there is no key


class LSHAttention(nnx.Module):
    """Multi-head LSH self-attention among tokens, with rotary positions or none of its own."""

    def __init__(self, config: HourglassConfig, *, rngs: nnx.Rngs):
        d_model, d_heads, bias = config.d_model, config.n_heads * config.head_dim, config.qkv_bias
        self.n_heads, self.chunk, self.n_hashes = config.n_heads, config.lsh_chunk, config.lsh_hashes
        self.rotary = config.positions == "rotary"
        self.query = linear(config, d_model, d_heads, bias=bias, rngs=rngs)  # and key
        self.value = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.out = linear(config, d_heads, d_model, rngs=rngs)
        self.dropout = Dropout(config.dropout)

    def __call__(self, x: jax.Array, _: jax.Array, *, mask: None = None, key: jax.Array | None = None) -> jax.Array:
        """[B, L, 1, D] -> [B, L, 1, D], without a mask; `key` draws the hash anew, and turns dropout on."""
        qk, v = (f(x[:, :, 0]).reshape(*x.shape[:2], self.n_heads, -1) for f in (self.query, self.value))
        if self.rotary:
            qk = rotate(qk, jnp.arange(x.shape[1]))
        hash_key, dropout_key = split_key(key, 2)
        if hash_key is None or self.dropout.deterministic:
            hash_key = jax.random.key(EVALUATION_SEED)
        shape = (qk.shape[-1], self.n_hashes, max(1, x.shape[1] // self.chunk))
        rotations = jax.random.normal(hash_key, shape, jnp.float32)
        out = lsh_attention(qk, v, rotations, self.chunk, self.dropout.rate, self.dropout.used(dropout_key))
        return self.out(out.reshape(*x.shape[:3], -1))


def lsh_attention(
    qk: jax.Array,
    v: jax.Array,
    rotations: jax.Array,
    chunk: int,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """qk, v [B, L, H, K], rotations [K, R, N] of R rounds into 2 N buckets -> [B, L, H, K]."""
    length, (size, _, n_pairs) = qk.shape[1], rotations.shape
    padding = -length % chunk
    projected = jnp.einsum("blhk,krn->bhrln", float32_at_least(qk), rotations.astype(float32_at_least(qk).dtype))
    buckets = jnp.concatenate([projected, -projected], axis=-1).argmax(-1)
    buckets = jnp.pad(buckets, [(0, 0)] * 3 + [(0, padding)], constant_values=2 * n_pairs)  # padding comes last
    order = jnp.argsort(buckets, stable=True)  # [B, H, R, L]: by time within a bucket
    place = jnp.argsort(order)

    def sorted_chunks(x: jax.Array) -> jax.Array:
        """[B, L, H, K] -> [B, H, chunks of all rounds, C, K]."""
        x = jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)]).swapaxes(1, 2)[:, :, None]
        x = jnp.take_along_axis(x, order[..., None], axis=3)
        return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])

    def and_previous(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.roll(x, 1, axis=2)], axis=3)

    q, values = sorted_chunks(qk), and_previous(sorted_chunks(v))
    keys = and_previous(q) * jax.lax.rsqrt(jnp.square(and_previous(q)).mean(-1, keepdims=True) + 1e-6) * size**-0.5
    time = order.reshape(*order.shape[:2], -1, chunk, 1)
    lag = time - and_previous(time).swapaxes(3, 4)
    scores = float32_at_least(jnp.einsum("bhcik,bhcjk->bhcij", q, keys))
    scores = jnp.where(lag > 0, scores, jnp.where(lag == 0, ITSELF, LATER))
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - total)
    if key is not None:
        weights = dropped(weights, dropout, key)
    out = jnp.einsum("bhcij,bhcjk->bhcik", weights.astype(v.dtype), values)

    def by_time(x: jax.Array) -> jax.Array:
        """[B, H, chunks, C, n] -> [B, H, R, L, n]."""
        return jnp.take_along_axis(x.reshape(*order.shape, -1), place[..., None], axis=3)[:, :, :, :length]

    share = jax.nn.softmax(by_time(total), axis=2).astype(v.dtype)
    return (by_time(out) * share).sum(2).swapaxes(1, 2)


def lsh_pairs(config: HourglassConfig, length: int) -> float:
    """Pairs of a query and a key that it meets, for each query; the hash counts as its products."""
    return config.lsh_hashes * (2 * config.lsh_chunk + max(1, length // config.lsh_chunk) / 2)
