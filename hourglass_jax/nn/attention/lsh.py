"""LSH attention (Reformer, arXiv:2001.04451; the paper's section 3.3): queries attend to keys with similar hashes.

Queries and keys share a projection. Each hash round sorts positions by bucket and time and cuts them into chunks; each
chunk attends to itself and to the previous chunk. The cost is linear in length.

LSH attention is NOT strictly causal. Later tokens are never attended to, and derivatives with respect to them are zero.
But the number of later positions in earlier buckets decides which keys share a query's chunk, so later tokens can
change a prediction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hourglass_jax.config import HourglassConfig, LevelConfig
from hourglass_jax.nn.attention.pattern import upcast
from hourglass_jax.nn.layers import Dropout, dropped, head_norm, linear, residual_linear, split_key
from hourglass_jax.nn.positions import rotate

# Scores of later positions, and of the query's own, to which it attends only without earlier ones.
LATER, ITSELF = -1e30, -1e5
EVALUATION_SEED = 0  # seed of the hash in evaluation


class LSHAttention(nnx.Module):
    """Multi-head LSH self-attention of tokens, with rotary or learned positions."""

    def __init__(self, config: LevelConfig, *, rngs: nnx.Rngs):
        d_model, d_heads, bias = config.d_model, config.n_heads * config.head_dim, config.qkv_bias
        self.n_heads, self.chunk, self.n_hashes = config.n_heads, config.lsh_chunk, config.lsh_hashes
        self.rotary = config.positions == "rotary"
        self.query = linear(config, d_model, d_heads, bias=bias, rngs=rngs)  # shared by keys
        self.value = linear(config, d_model, d_heads, bias=bias, rngs=rngs)
        self.query_norm = head_norm(config, rngs=rngs)
        self.out = residual_linear(config, d_heads, d_model, rngs=rngs)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "B L 1 D"], _: Array, *, mask: None = None, key: Array | None = None
    ) -> Float[Array, "B L 1 D"]:
        """Attend; `key` draws a new hash and turns dropout on. Masks are not supported."""
        qk, v = (f(x[:, :, 0]).reshape(*x.shape[:2], self.n_heads, -1) for f in (self.query, self.value))
        if self.query_norm is not None:
            qk = self.query_norm(qk)
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
    qk: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    rotations: Float[Array, "K R N"],
    chunk: int,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "B L H K"]:
    """Compute LSH attention in R rounds, each with 2 N buckets, in chunks of `chunk` positions."""
    length, (size, _, n_pairs) = qk.shape[1], rotations.shape
    padding = -length % chunk
    projected = jnp.einsum("blhk,krn->bhrln", upcast(qk), rotations.astype(upcast(qk).dtype))
    buckets = jnp.concatenate([projected, -projected], axis=-1).argmax(-1)
    buckets = jnp.pad(buckets, [(0, 0)] * 3 + [(0, padding)], constant_values=2 * n_pairs)  # padding sorts last
    order = jnp.argsort(buckets, stable=True)  # [B, H, R, L]; within a bucket, by time
    place = jnp.argsort(order)

    def sorted_chunks(x: Float[Array, "B L H K"]) -> Float[Array, "B H RN C K"]:
        """Return the chunks of all rounds."""
        x = jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)]).swapaxes(1, 2)[:, :, None]
        x = jnp.take_along_axis(x, order[..., None], axis=3)
        return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])

    def with_previous(x: Float[Array, "B H RN C K"]) -> Float[Array, "B H RN 2C K"]:
        """Append the previous chunk to each chunk."""
        return jnp.concatenate([x, jnp.roll(x, 1, axis=2)], axis=3)

    q, values = sorted_chunks(qk), with_previous(sorted_chunks(v))
    keys = with_previous(q) * jax.lax.rsqrt(jnp.square(with_previous(q)).mean(-1, keepdims=True) + 1e-6) * size**-0.5
    time = order.reshape(*order.shape[:2], -1, chunk, 1)
    lag = time - with_previous(time).swapaxes(3, 4)
    scores = upcast(jnp.einsum("bhcik,bhcjk->bhcij", q, keys))
    scores = jnp.where(lag > 0, scores, jnp.where(lag == 0, ITSELF, LATER))
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - total)
    if key is not None:
        weights = dropped(weights, dropout, key)
    out = jnp.einsum("bhcij,bhcjk->bhcik", weights.astype(v.dtype), values)

    def by_time(x: Float[Array, "B H RN C n"]) -> Float[Array, "B H R L n"]:
        """Undo the sort."""
        return jnp.take_along_axis(x.reshape(*order.shape, -1), place[..., None], axis=3)[:, :, :, :length]

    round_weights = jax.nn.softmax(by_time(total), axis=2).astype(v.dtype)
    return (by_time(out) * round_weights).sum(2).swapaxes(1, 2)


def lsh_pairs(config: HourglassConfig, length: int) -> float:
    """Return the query-key products for each query, for FLOP counts; includes the projections of the hash."""
    return config.lsh_hashes * (2 * config.lsh_chunk + max(1, length // config.lsh_chunk) / 2)
