"""Pre-norm transformer blocks, and stacks of them that compile as one body whatever the depth."""

from __future__ import annotations

import jax
from flax import nnx
from jax import lax

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.attention import Attention
from hourglass_jax.nn.layers import Dropout, layer_norm, linear, split_key


class FeedForward(nnx.Module):
    """Position-wise d_model -> d_ff -> d_model."""

    def __init__(self, config: HourglassConfig, *, rngs: nnx.Rngs):
        self.up = linear(config, config.d_model, config.d_ff, rngs=rngs)
        self.down = linear(config, config.d_ff, config.d_model, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.up(x)
        x = jax.nn.gelu(x, approximate=True) if self.activation == "gelu" else jax.nn.relu(x)
        return self.down(x)


class Block(nnx.Module):
    """Attention and feed-forward, each behind a norm and beside a residual.

    With `cross=True` the keys and values are another sequence with a norm of its own: the block inside
    attention shortening and upsampling.
    """

    def __init__(self, config: HourglassConfig, *, cross: bool = False, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(config, rngs=rngs)
        self.memory_norm = layer_norm(config, rngs=rngs) if cross else None
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = layer_norm(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self, x: jax.Array, memory: jax.Array | None = None, *, unit: int, key: jax.Array | None = None
    ) -> jax.Array:
        """x [B, G, P, D], memory [B, G, S, D] (none: x itself) -> [B, G, P, D]; see `nn.attention`."""
        attention_key, residual_key, feed_forward_key = split_key(key, 3)
        queries = self.attention_norm(x)
        keys = queries if memory is None else self.memory_norm(memory)
        y = self.attention(queries, keys, unit=unit, key=attention_key)
        x = x + self.dropout(y, residual_key)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + self.dropout(y, feed_forward_key)


class Stack(nnx.Module):
    """`n_layers` blocks at one level, then (norm='stack') a norm, also where there is no layer."""

    def __init__(self, config: HourglassConfig, n_layers: int, unit: int, *, rngs: nnx.Rngs):
        self.n_layers = n_layers
        self.unit = unit
        self.unrolled = n_layers <= config.max_unrolled_layers
        make_layers = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
        self.layers = make_layers(rngs.fork(split=n_layers)) if n_layers else None
        self.norm = layer_norm(config, rngs=rngs) if config.norm == "stack" else None

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        if self.layers is not None:
            x = self.run_layers(x[:, :, None], key)[:, :, 0]
        return x if self.norm is None else self.norm(x)

    def run_layers(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        graph, state = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.n_layers)

        def layer(x, inputs):
            state, key = inputs
            return nnx.merge(graph, state)(x, unit=self.unit, key=key), None

        if self.unrolled:
            for i in range(self.n_layers):
                x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], (state, keys)))
            return x
        # The body is rematerialised: the gradient through a plain scan takes 1.7 times as long on a CPU.
        return lax.scan(jax.checkpoint(layer), x, (state, keys))[0]
