"""Batches as functions of (seed, step), so that a resumed run needs nothing but its step.

A batch is a pair: tokens int32 [B, L + 1] and weights float32 [B, L], the weight of predicting token t + 1
at position t. Grain prefetches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

Batch = tuple[np.ndarray, np.ndarray]
BatchAt = Callable[[int], Batch]


def random_windows(tokens: np.ndarray, block_size: int, batch_size: int, seed: int) -> BatchAt:
    """Windows of block_size + 1 tokens that start anywhere."""

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, len(tokens) - block_size, batch_size)
        windows = tokens[starts[:, None] + np.arange(block_size + 1)]
        return windows, np.ones((batch_size, block_size), np.float32)

    return batch_at


def shuffled_examples(examples: Batch, batch_size: int, seed: int) -> BatchAt:
    """Rows of `examples`, each once an epoch, every epoch in another order."""
    tokens, weights = examples

    def batch_at(step: int) -> Batch:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        rows = np.empty(batch_size, int)
        for epoch in np.unique(positions // len(tokens)):
            order = np.random.default_rng((seed, int(epoch))).permutation(len(tokens))
            in_epoch = positions // len(tokens) == epoch
            rows[in_epoch] = order[positions[in_epoch] % len(tokens)]
        return tokens[rows], weights[rows]

    return batch_at


def pack_examples(sequences: Sequence[np.ndarray], loss_from: Sequence[int], pad_id: int) -> Batch:
    """Pads sequences on the right to one batch; the loss counts from token `loss_from[i]` to the sequence's end.

    Padding carries no loss, and later positions cannot reach earlier ones, so it changes nothing.
    """
    length = max(map(len, sequences))
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    weights = np.zeros((len(sequences), length - 1), np.float32)
    for i, (sequence, start) in enumerate(zip(sequences, loss_from, strict=True)):
        tokens[i, : len(sequence)] = sequence
        weights[i, max(start, 1) - 1 : len(sequence) - 1] = 1
    return tokens, weights


def consecutive_windows(tokens: np.ndarray, block_size: int, batch_size: int) -> list[Batch]:
    """The whole text once, in windows of at most block_size predictions without context before them."""
    n_windows = -(-(len(tokens) - 1) // block_size)
    windows = [tokens[i * block_size : (i + 1) * block_size + 1] for i in range(n_windows)]
    padded = np.zeros((-(-n_windows // batch_size) * batch_size, block_size + 1), np.int32)
    weights = np.zeros((len(padded), block_size), np.float32)
    for i, window in enumerate(windows):
        padded[i, : len(window)] = window
        weights[i, : len(window) - 1] = 1
    return [(padded[i : i + batch_size], weights[i : i + batch_size]) for i in range(0, len(padded), batch_size)]


def stream(batch_at: BatchAt, start: int, stop: int) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1, prepared ahead in a background thread."""
    steps = grain.MapDataset.range(start, stop).map(batch_at)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
