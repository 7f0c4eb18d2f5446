"""Byte n-gram embeddings: BLT's hash embeddings (arXiv:2412.09871, section 3.2.1).

The n-grams that end at a token depend on no later token. They provide local statistics of the text to the first layer
without FLOPs, but their tables hold most of a small model's parameters.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from hourglass_jax.config import LevelConfig
from hourglass_jax.nn.layers import hashed

BEFORE = -1  # stands for the positions before a row's first token


class NgramEmbedding(nnx.Module):
    """The sum of the embeddings of all n-grams that end at a token, one table per size; zero in a new model."""

    def __init__(self, config: LevelConfig):
        self.sizes, self.buckets = config.ngram_sizes, config.ngram_buckets
        shape = (len(self.sizes) * self.buckets, config.d_model)
        self.embedding = nnx.Param(jnp.zeros(shape, jnp.float32))
        self.dtype = config.dtype

    def __call__(self, tokens: Int[Array, "B L"], history: Int[Array, "B n"] | None = None) -> Float[Array, "B L D"]:
        """Embed the n-grams that end at `tokens`; `history` are the tokens before them, `BEFORE` for padding."""
        n_before = 0 if history is None else history.shape[1]
        if history is not None:
            tokens = jnp.concatenate([history, tokens.astype(jnp.int32)], axis=1)
        first = jnp.arange(len(self.sizes), dtype=jnp.int32)[:, None, None] * self.buckets
        buckets = jnp.stack([hashes(tokens, size)[:, n_before:] % self.buckets for size in self.sizes])
        return self.embedding[...][first + buckets.astype(jnp.int32)].astype(self.dtype).sum(axis=0)


def hashes(tokens: Int[Array, "B N"], size: int) -> UInt32[Array, "B N"]:
    """Return a hash of the `size` tokens that end at each position; positions outside the array count as `BEFORE`.

    Trained tables depend on this function, so it must never change.
    """
    symbols = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (size - 1, 0)), constant_values=BEFORE).astype(jnp.uint32)
    n = tokens.shape[1]
    state = jnp.full(tokens.shape, size, jnp.uint32)
    for i in range(size):
        state = hashed(symbols[:, i : i + n], state)
    return state
