"""Prompts of different lengths, aligned so that all rows of a batch end their groups at the same steps."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from hourglass_jax.nn.cache import forgotten
from hourglass_jax.nn.layers import threefry


@dataclass(frozen=True)
class AlignedPrompts:
    """Prompts of different lengths, each split into a prefix of complete groups and a tail.

    prefix: [B, M], tokens for one prefill pass; M is a multiple of the shared factor K. Row b starts at start[b].
    start: [B].
    origin: [B], start[b] minus the number of tokens that were dropped because they exceed the context.
    tail: [B, K], the last 1 to K tokens of each prompt, for the decoding loop.
    lengths: [B], tokens of each prompt.
    """

    prefix: np.ndarray
    start: np.ndarray
    origin: np.ndarray
    tail: np.ndarray
    lengths: np.ndarray

    @classmethod
    def align(cls, prompts: Sequence[np.ndarray], factor: int, context: int) -> AlignedPrompts:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        ends = (lengths - 1) // factor * factor
        dropped = forgotten(ends, context, factor)
        longest = int((ends - dropped).max())
        width = min(size_bucket(longest, factor), context) if longest else 0
        prefix = np.zeros((len(prompts), width), np.int32)
        tail = np.zeros((len(prompts), factor), np.int32)
        start = (width - (ends - dropped)).astype(np.int32)
        for i, prompt in enumerate(prompts):
            prefix[i, start[i] :] = prompt[dropped[i] : ends[i]]
            tail[i, : len(prompt) - ends[i]] = prompt[ends[i] :]
        return cls(prefix, start, start - dropped, tail, lengths)

    @property
    def tail_lengths(self) -> np.ndarray:
        factor = self.tail.shape[1]
        return self.lengths - (self.lengths - 1) // factor * factor


def row_keys(key: jax.Array, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Return a key for each row [B], derived from `key`, the prompt and the number of earlier rows with that prompt.

    So a row's sample is the same in any batch, and equal prompts get different samples. Different prompts do not share
    random numbers, which would make their texts converge.
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
    """Return key b with both parts of row b folded in: key, uint32 [B, 2] -> keys [B]."""
    return jax.random.fold_in(jax.random.fold_in(key, part[0]), part[1])


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def size_bucket(n: int, smallest: int) -> int:
    """Return the first of smallest * (1, 1.5, 2, 3, 4, 6, ...) that is at least n; few sizes mean few compilations."""
    while smallest < n:
        if smallest + smallest // 2 >= n:
            return smallest + smallest // 2
        smallest *= 2
    return smallest
