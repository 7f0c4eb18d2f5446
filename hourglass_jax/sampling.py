"""From logits to tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hourglass_jax.nn.layers import threefry
from hourglass_jax.ranges import check_range


@dataclass(frozen=True)
class Sampler:
    """temperature: 0 is greedy, infinity makes all tokens equal.
    top_k, top_p: cut the tempered distribution to its likeliest tokens.

    Raises UsageError for options out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0)
        if self.top_k is not None:
            check_range("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_range("top_p", self.top_p, 0.0, 1, open_low=True)

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """logits [B, V], keys [B] -> int [B]; row b draws from keys[b] alone."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, self.filter(logits)).astype(jnp.int32)

    def filter(self, logits: jax.Array) -> jax.Array:
        """Logits [..., V] of the distribution to sample from: cut to top_k, tempered, then cut to top_p."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        # A banned token stays so at an infinite temperature, too, where all others are as likely.
        logits = jnp.where(jnp.isneginf(logits), -jnp.inf, logits / max(self.temperature, 1e-6))
        if self.top_p is not None and self.top_p < 1:
            ordered = -jnp.sort(-logits, axis=-1)
            # A token stays while those before it hold less than top_p; the likeliest one does, however small that is.
            probabilities = jax.nn.softmax(ordered, axis=-1)
            stays = (jnp.cumsum(probabilities, axis=-1) - probabilities < self.top_p).at[..., 0].set(True)
            lowest = jnp.where(stays, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        return logits


def row_keys(key: jax.Array, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """A key for each row [B]: it depends on `key`, on the prompt, and on how many earlier rows have the same one.

    So a row's sample is the same whatever batch it sits in, equal prompts still get different samples, and rows with
    different prompts do not come to write the same text, as they would if they drew the same numbers.
    """
    seen: dict[tuple[int, ...], int] = {}
    parts = []
    for prompt in map(tuple, prompts):
        parts.append((zlib.crc32(np.asarray(prompt, np.int32).tobytes()), seen.get(prompt, 0)))
        seen[prompt] = parts[-1][1] + 1
    return _fold_in_parts(threefry(key), jax.device_put(np.array(parts, np.uint32)))


@jax.jit
@partial(jax.vmap, in_axes=(None, 0))
def _fold_in_parts(key: jax.Array, part: jax.Array) -> jax.Array:
    """key, uint32 [B, 2] -> keys [B]."""
    return jax.random.fold_in(jax.random.fold_in(key, part[0]), part[1])
