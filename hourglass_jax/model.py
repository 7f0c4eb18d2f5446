"""The Hourglass (Algorithm 1 of the paper) and the language model around it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Level
from hourglass_jax.nn.layers import NORMAL_STDDEV, Dropout, layer_norm, linear, split_key
from hourglass_jax.nn.resampling import SHORTENINGS, UPSAMPLINGS, to_groups
from hourglass_jax.nn.transformer import Stack


class Hourglass(nnx.Module):
    """Pre stack, shorten, inner Hourglass, upsample, post stack; at the innermost level a stack alone."""

    def __init__(self, config: HourglassConfig, levels: Sequence[Level], *, rngs: nnx.Rngs):
        level, *inner = levels
        self.pre = Stack(config, level.pre_layers, level.factor, rngs=rngs)
        self.inner = Hourglass(config, inner, rngs=rngs) if inner else None
        if inner:
            k = level.shorten_factor
            self.shorten_factor = k
            self.shift = k if config.shift == "original" else k - 1
            self.shorten = SHORTENINGS[config.shortening](config, k, level.factor, rngs=rngs)
            self.upsample = UPSAMPLINGS[config.upsampling](config, k, level.factor, rngs=rngs)
            self.upsample_norm = layer_norm(config, rngs=rngs) if config.norm == "stack" else None
            self.post = Stack(config, level.post_layers, level.factor, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, L, D] -> [B, L, D], for any L; `key` turns dropout on."""
        keys = split_key(key, 5)
        x = self.pre(x, keys[0])
        if self.inner is None:
            return x
        # The shift by k-1 is the smallest that leaks nothing: a group's vector serves all k positions of the
        # group, so it may hold nothing newer than the group's first position.
        short = self.shorten(to_groups(x, self.shorten_factor, self.shift), key=keys[1])
        short = self.inner(short, keys[2])
        up = self.upsample(to_groups(x, self.shorten_factor), short, key=keys[3])
        if self.upsample_norm is not None:
            up = self.upsample_norm(up)
        x = x + up.reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
        return self.post(x, keys[4])


class HourglassLM(nnx.Module):
    """Hourglass language model.

    `logits = model(tokens)`: int [B, L] -> [B, L, vocab_size]; `logits[:, t]` predicts token t + 1 from the
    tokens <= t. `model(tokens, key)` draws dropout from `key`; without a key, or after `model.eval()`, there
    is none. Raises UsageError for more than `max_length` tokens with learned positions.
    """

    def __init__(self, config: HourglassConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(NORMAL_STDDEV)
        self.embedding = nnx.Embed(
            config.vocab_size, config.d_model, embedding_init=init, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        learned = config.positions == "learned"
        table_shape = (config.max_length, config.d_model)
        self.positions = nnx.Param(init(rngs.params(), table_shape)) if learned else None
        self.dropout = Dropout(config.dropout)
        self.hourglass = Hourglass(config, config.parsed_hierarchy.levels, rngs=rngs)
        self.norm = layer_norm(config, rngs=rngs) if config.norm == "final" else None
        self.head = linear(config, config.d_model, config.vocab_size, rngs=rngs)

    def __call__(self, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.from_embeddings(self.embed(tokens), key)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [B, L] -> [B, L, D], learned positions included."""
        x = self.embedding(tokens)
        if self.positions is None:
            return x
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise UsageError(
                f"{length} tokens, but learned positions end at max_length={self.config.max_length}; give fewer "
                "tokens, or train with positions='relative' or 'rotary'"
            )
        return x + self.positions[:length].astype(x.dtype)

    def from_embeddings(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, L, D] -> logits [B, L, V], float32 at least."""
        embedding_key, body_key = split_key(key, 2)
        x = self.hourglass(self.dropout(x, embedding_key), body_key)
        if self.norm is not None:
            x = self.norm(x)
        logits = self.head(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
