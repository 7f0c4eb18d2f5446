"""Pre-norm transformer blocks, and stacks of blocks; deep stacks scan over layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hourglass_jax.config import HourglassConfig, LevelConfig
from hourglass_jax.nn import cpu
from hourglass_jax.nn.attention import Attention
from hourglass_jax.nn.attention.lsh import LSHAttention
from hourglass_jax.nn.cache import Clock, KeyValueCache
from hourglass_jax.nn.layers import Dropout, linear, normalization, residual_linear, split_key
from hourglass_jax.nn.platform import platform

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,  # of the gate
}
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class FeedForward(nnx.Module):
    """Position-wise feed-forward network: d_model -> d_ff -> d_model.

    With activation='swiglu' a gate multiplies the hidden layer (arXiv:2002.05202), which then has 2/3 d_ff units.
    """

    def __init__(self, config: LevelConfig, *, rngs: nnx.Rngs):
        gated = config.activation == "swiglu"
        d_hidden = round(2 * config.d_ff / 3) if gated else config.d_ff
        self.up = linear(config, config.d_model, d_hidden, rngs=rngs)
        self.gate = linear(config, config.d_model, d_hidden, rngs=rngs) if gated else None
        self.down = residual_linear(config, d_hidden, config.d_model, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return cpu.on_matrix(self.on_rows, x)

    def on_rows(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activation(self.up(x)))
        return self.down(activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and a feed-forward network, each with a norm before it and a residual connection.

    With `cross=True` keys and values come from another sequence with its own norm, as in attention shortening and
    upsampling.
    """

    def __init__(
        self,
        config: LevelConfig,
        tokens_per_position: int,
        *,
        cross: bool = False,
        query_slots: int = 1,
        key_slots: int = 1,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = normalization(config, rngs=rngs)
        self.memory_norm = normalization(config, rngs=rngs) if cross else None
        self.attention: Any
        if config.token_attention == "lsh" and tokens_per_position == 1 and not cross:
            self.attention = LSHAttention(config, rngs=rngs)
        else:
            self.attention = Attention(
                config,
                tokens_per_position,
                query_slots=query_slots,
                key_slots=key_slots,
                window=0 if cross else config.window,
                rngs=rngs,
            )
        self.feed_forward_norm = normalization(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.dropout = Dropout(config.dropout)
        mixes = config.input_residual and not cross
        self.input_scales = nnx.Param(jnp.array([1.0, 0.0], jnp.float32)) if mixes else None

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Attend from x [B, G, P, D] to memory [B, G, S, D] (default: x) -> [B, G, P, D]; see `nn.attention`."""
        attention_key, *residual_keys = split_key(key, 3)
        y = self.attention(*self.normalize(x, memory), mask=mask, key=attention_key)
        return self.residual(x, y, *residual_keys)

    def attend_from(
        self,
        x: jax.Array,
        memory: jax.Array,
        places: jax.Array,
        first: Any = 0,
        *,
        cache: KeyValueCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Attend from x [B, N, D] at `places` [B, N] of memory [B, M, D]; see `Attention`. Fills `cache`, if given."""
        attention_key, *residual_keys = split_key(key, 3)
        y, k, v = self.attention.attend_from(*self.normalize(x, memory), places, first, key=attention_key)
        return self.residual(x, y, *residual_keys), None if cache is None else cache.write(k, v, row=0)

    def prefill(
        self, x: jax.Array, memory: jax.Array | None = None, *, cache: KeyValueCache, start: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """Process rows that begin at token `start` [B], and fill the cache."""
        y, cache = self.attention.prefill(*self.normalize(x, memory), cache, start)
        return self.residual(x, y), cache

    def step(
        self, x: jax.Array, memory: jax.Array | None = None, *, cache: KeyValueCache, clock: Clock
    ) -> tuple[jax.Array, KeyValueCache]:
        """Decode one position x [B, D]; `memory` [B, S, D] holds new keys of its group, if any."""
        y, cache = self.attention.step(*self.normalize(x, memory), cache, clock)
        return self.residual(x, y), cache

    def write(self, memory: jax.Array, cache: KeyValueCache, clock: Clock) -> KeyValueCache:
        """Cache the keys and values of new memory [B, S, D] without attending to it."""
        assert self.memory_norm is not None
        return self.attention.write(self.memory_norm(memory), cache, clock)

    def mix_input(self, x: jax.Array, level_input: jax.Array) -> jax.Array:
        """Return a x + b x0 with learned scalars, where x0 is the input of the level; x without `input_residual`."""
        if self.input_scales is None:
            return x
        a, b = self.input_scales[...].astype(x.dtype)
        return a * x + b * level_input

    def normalize(self, x: jax.Array, memory: jax.Array | None) -> tuple[jax.Array, Any]:
        """Return the normalized queries and keys; None for a step without new keys."""
        queries = self.attention_norm(x)
        if self.memory_norm is None:
            return queries, queries
        return queries, None if memory is None else self.memory_norm(memory)

    def residual(
        self, x: jax.Array, y: jax.Array, attention_key: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Add attention's result y and the feed-forward network's to the residual stream x."""
        x = x + self.dropout(y, attention_key)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)), key)


def is_unrolled(config: HourglassConfig, n_layers: int) -> bool:
    """Return whether a stack's layers are compiled one by one instead of scanned.

    The limit is twice as high on a GPU: a scan copies the residuals of the backward pass, and kernels compile fast.
    """
    return n_layers <= config.max_unrolled_layers * (2 if platform() == "gpu" else 1)


class Stack(nnx.Module):
    """`n_layers` blocks at one level, then a norm if norm='stack', even without layers.

    `level_input`, in all methods, is x0 of `Block.mix_input`; default: the stack's own input.
    """

    def __init__(self, config: LevelConfig, n_layers: int, tokens_per_position: int, *, rngs: nnx.Rngs):
        self.config, self.n_layers = config, n_layers
        make_layers = nnx.vmap(lambda rngs: Block(config, tokens_per_position, rngs=rngs))
        self.layers: Any = make_layers(rngs.split(n_layers)) if n_layers else None
        self.norm = normalization(config, rngs=rngs) if config.norm == "stack" else None

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None = None,
        mask: jax.Array | None = None,
        level_input: jax.Array | None = None,
    ) -> jax.Array:
        """[B, L, D] -> [B, L, D]; `mask` [B, L] marks positions that are not padding, if not causal."""
        if self.layers is not None:
            level_input = x if level_input is None else level_input
            x = self.run_layers(x[:, :, None], level_input[:, :, None], key, mask)[:, :, 0]
        return self.normalize(x)

    def normalize(self, x: jax.Array) -> jax.Array:
        return x if self.norm is None else self.norm(x)

    def run_layers(
        self, x: jax.Array, level_input: jax.Array, key: jax.Array | None, mask: jax.Array | None
    ) -> jax.Array:
        graph, state = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.n_layers)

        def layer(x, inputs):
            state, key = inputs
            block = nnx.merge(graph, state)
            return block(block.mix_input(x, level_input), mask=mask, key=key), None

        unrolled = is_unrolled(self.config, self.n_layers)
        remat = self.config.remat_of(unrolled=unrolled)
        if remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat])
        if unrolled:
            for i in range(self.n_layers):
                x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], (state, keys)))
            return x
        return lax.scan(layer, x, (state, keys))[0]

    def blocks(self) -> Sequence[Block]:
        """Return the layers as a list, for decoding: a scan would copy every layer's cache at every step."""
        if self.layers is None:
            return []
        if isinstance(self.layers, nnx.List):
            return self.layers
        graph, state = nnx.split(self.layers)
        return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(self.n_layers)]

    def unstack(self) -> None:
        """Store the layers as a list, so that a loop of decoding steps does not slice them at every step."""
        if self.layers is not None:
            self.layers = nnx.data(nnx.List(self.blocks()))

    def init_cache(self, batch: int, max_length: int) -> list[KeyValueCache]:
        """Return one empty cache for each layer; `max_length` in tokens."""
        return [block.attention.init_cache(batch, max_length) for block in self.blocks()]

    def prefill(
        self, x: jax.Array, cache: list[KeyValueCache], start: jax.Array, level_input: jax.Array | None = None
    ) -> tuple[jax.Array, list[KeyValueCache]]:
        """Process rows [B, L, D] that begin at token `start` [B], and fill the cache."""
        level_input = (x if level_input is None else level_input)[:, :, None]
        x, filled = x[:, :, None], []
        for block, layer_cache in zip(self.blocks(), cache, strict=True):
            x, layer_cache = block.prefill(block.mix_input(x, level_input), cache=layer_cache, start=start)
            filled.append(layer_cache)
        return self.normalize(x[:, :, 0]), filled

    def step(
        self, x: jax.Array, cache: list[KeyValueCache], clock: Clock, level_input: jax.Array | None = None
    ) -> tuple[jax.Array, list[KeyValueCache]]:
        """Decode one position, [B, D] -> [B, D]."""
        advanced, level_input = [], x if level_input is None else level_input
        for block, layer_cache in zip(self.blocks(), cache, strict=True):
            x, layer_cache = block.step(block.mix_input(x, level_input), cache=layer_cache, clock=clock)
            advanced.append(layer_cache)
        return self.normalize(x), advanced
