"""The L#L task of the paper's appendix A.1, which tests the layers before and after shortening."""

from __future__ import annotations

import string

import numpy as np

from hourglass_jax.data.pipeline import Batch, BatchAt, Rows
from hourglass_jax.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer(["#", *string.ascii_uppercase])


def letter_batches(n_chunks: int, batch_size: int, seed: int) -> BatchAt:
    """Return batches of rows int32 [B, 3 * n_chunks + 1]: <BOS>, then chunks "L#L" with a random letter L each.

    With shorten factor 3, groups match chunks. The first letter of a chunk is unpredictable, so the best accuracy
    is 2/3.
    """
    separator, first, *_ = TOKENIZER.encode("#A").tolist()

    def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
        rng = np.random.default_rng((seed, step))
        letters = first + rng.integers(0, len(string.ascii_uppercase), (batch_size, n_chunks, 1))[rows]
        chunks = np.concatenate([letters, np.full_like(letters, separator), letters], axis=2)
        tokens = np.pad(chunks.reshape(len(letters), -1), [(0, 0), (1, 0)], constant_values=TOKENIZER.bos_id)
        return tokens.astype(np.int32), np.ones((len(letters), 3 * n_chunks), np.float32)

    return batch_at
