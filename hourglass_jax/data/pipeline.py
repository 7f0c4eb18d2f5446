"""Batches as pure functions of (seed, step), so that resuming requires only the step.

A batch is a pair: tokens int32 [B, L + 1] and weights float32 [B, L], the loss weight of predicting token t + 1 at
position t. A text is an array [N] of any integer type; a batch reads only its own tokens from a memory-mapped
file. Grain prefetches the batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, overload

import grain
import numpy as np

from hourglass_jax.data.store import StoredTokens
from hourglass_jax.errors import UsageError
from hourglass_jax.ranges import check_range
from hourglass_jax.run_config import DataConfig

Batch = tuple[np.ndarray, np.ndarray]
Tokens = np.ndarray | StoredTokens  # of a text, [N]
Rows = slice | np.ndarray  # of a global batch: a slice, or row indices int [R]
PLANNED = 2**20  # documents whose windows are planned at once


class BatchAt(Protocol):
    """A function from a step to its batch."""

    def __call__(self, step: int, rows: Rows = slice(None)) -> Batch:
        """Return rows of the batch of `step`. Other rows are not read, so each host reads only its own."""


def training_batches(tokens: Tokens, config: DataConfig, seed: int) -> BatchAt:
    """Return batches of windows of a text, in the order `config.order`.

    Raises UsageError for order="documents" unless the text is a part of a token store.
    """
    if config.order == "documents":
        if not isinstance(tokens, StoredTokens):
            raise UsageError("order='documents' requires a token store; write one with experiments/prepare.py")
        return document_windows(tokens, config.block_size, config.batch_size, seed)
    windows = {"random": random_windows, "epochs": shuffled_windows}[config.order]
    return windows(tokens, config.block_size, config.batch_size, seed)


def random_windows(tokens: Tokens, block_size: int, batch_size: int, seed: int) -> BatchAt:
    """Return batches of windows of block_size + 1 tokens, which start at random positions."""

    def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, len(tokens) - block_size, batch_size)
        return _full_windows(tokens, starts[rows], block_size)

    return batch_at


def shuffled_windows(tokens: Tokens, block_size: int, batch_size: int, seed: int) -> BatchAt:
    """Return batches of consecutive windows of block_size predictions, reshuffled each epoch.

    An incomplete window at the end of the text is dropped.
    """
    order = shuffled_order((len(tokens) - 1) // block_size, seed)

    def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
        windows = order(step * batch_size + np.arange(batch_size)[rows])
        return _full_windows(tokens, windows * block_size, block_size)

    return batch_at


def document_windows(tokens: StoredTokens, block_size: int, batch_size: int, seed: int) -> BatchAt:
    """Return batches of windows that begin with a document, reshuffled each epoch; see `plan_documents`."""
    starts = plan_documents(tokens, block_size).starts
    order = shuffled_order(len(starts), seed)

    def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
        chosen = starts[order(step * batch_size + np.arange(batch_size)[rows])]
        positions = chosen[:, None] + np.arange(block_size + 1)
        inside = positions < len(tokens)
        windows = np.where(inside, tokens[np.minimum(positions, len(tokens) - 1)], 0)
        return windows.astype(np.int32), inside[:, 1:].astype(np.float32)

    return batch_at


class DocumentPlan(NamedTuple):
    """Where windows start, int64 [R]; tokens in no window; tokens in two windows."""

    starts: np.ndarray
    n_lost: int
    n_repeated: int


@functools.lru_cache(maxsize=2)
def plan_documents(tokens: StoredTokens, block_size: int) -> DocumentPlan:
    """Choose windows of block_size + 1 tokens so that each begins with a document and no token is lost needlessly.

    A window contains documents one after the other. The document that its end cuts begins the next window, unless it is
    longer than a window: then its end is lost.
    """
    length, ends, doc = block_size + 1, tokens.ends, 0
    starts: list[int] = []
    n_lost = 0
    for first in range(0, len(ends), PLANNED):
        stops = np.asarray(ends[first : first + PLANNED])
        begins = np.concatenate([ends[first - 1 : first] if first else [0], stops[:-1]])
        following = np.searchsorted(ends, begins + length, "right")  # the first document that is not whole
        following = np.maximum(following, first + np.arange(1, len(stops) + 1))
        n_lost += int(np.maximum(stops - begins - length, 0).sum())
        listed_begins, listed_following = begins.tolist(), following.tolist()
        while doc < first + len(stops):
            starts.append(listed_begins[doc - first])
            doc = listed_following[doc - first]
    found = np.array(starts, np.int64)
    n_covered = int(np.minimum(length, len(tokens) - found).sum())
    return DocumentPlan(found, n_lost, n_covered - (len(tokens) - n_lost))


def shuffled_examples(examples: Batch, batch_size: int, seed: int) -> BatchAt:
    """Return batches of rows of `examples`, reshuffled each epoch."""
    tokens, weights = examples
    order = shuffled_order(len(tokens), seed)

    def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
        chosen = order(step * batch_size + np.arange(batch_size)[rows])
        return tokens[chosen], weights[chosen]

    return batch_at


def shuffled_order(n_items: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from positions int [R] to item indices; each epoch of n_items positions is a permutation.

    Permutations are computed, not stored: time and memory do not depend on n_items.
    """
    # Grain shuffles epoch e with seed + e. Unhashed, seeds 0 and 1 would share all orders but one.
    [hashed] = np.random.SeedSequence(seed).generate_state(1).tolist()
    order = grain.MapDataset.range(n_items).shuffle(seed=hashed).repeat()
    return lambda positions: np.fromiter((order[i] for i in positions.tolist()), np.int64, len(positions))


def _full_windows(tokens: Tokens, starts: np.ndarray, block_size: int) -> Batch:
    windows = np.asarray(tokens[starts[:, None] + np.arange(block_size + 1)], np.int32)
    return windows, np.ones((len(starts), block_size), np.float32)


def pack_examples(sequences: Sequence[np.ndarray], loss_from: Sequence[int], pad_id: int) -> Batch:
    """Pad sequences on the right to one batch. The loss covers token `loss_from[i]` to the end of sequence i.

    In a causal model padding on the right does not affect other positions.
    """
    length = max(map(len, sequences))
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    weights = np.zeros((len(sequences), length - 1), np.float32)
    for i, (sequence, start) in enumerate(zip(sequences, loss_from, strict=True)):
        tokens[i, : len(sequence)] = sequence
        weights[i, max(start, 1) - 1 : len(sequence) - 1] = 1
    return tokens, weights


class LazyBatches(Sequence[Batch]):
    """A sequence of batches, each computed on access; slices are lazy, too."""

    def __init__(self, batch_at: Callable[[int], Batch], steps: Sequence[int]):
        self._batch_at = batch_at
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> LazyBatches: ...
    def __getitem__(self, index: int | slice) -> Batch | LazyBatches:
        if isinstance(index, slice):
            return LazyBatches(self._batch_at, self._steps[index])
        return self._batch_at(self._steps[index])


def all_examples(examples: Batch, batch_size: int) -> LazyBatches:
    """Return all rows of `examples` once, in order; the last batch may be smaller."""

    def batch_at(step: int) -> Batch:
        tokens, weights = (part[step * batch_size : (step + 1) * batch_size] for part in examples)
        return tokens, weights

    return LazyBatches(batch_at, range(-(-len(examples[0]) // batch_size)))


def evenly_spaced(batches: Sequence[Batch], n: int) -> LazyBatches:
    """Return `n` of the batches, from the middle of `n` equal parts; all of them if there are fewer."""
    n = min(n, len(batches))
    return LazyBatches(batches.__getitem__, [(2 * i + 1) * len(batches) // (2 * n) for i in range(n)])


def without_targets(batches: Sequence[Batch], excluded: Sequence[int]) -> LazyBatches:
    """Return the batches with weight 0 for predictions of the excluded tokens, such as BOS and EOS."""

    def batch_at(index: int) -> Batch:
        tokens, weights = batches[index]
        return tokens, np.where(np.isin(tokens[:, 1:], excluded), np.float32(0), weights)

    return LazyBatches(batch_at, range(len(batches)))


def consecutive_windows(tokens: Tokens, block_size: int, batch_size: int) -> LazyBatches:
    """Return the whole text once, in windows of at most block_size predictions without earlier context."""
    return sliding_windows(tokens, block_size, block_size, batch_size)


def sliding_windows(tokens: Tokens, window: int, step: int, batch_size: int) -> LazyBatches:
    """Return the whole text in windows of at most `window` predictions, which start every `step` tokens.

    Each prediction has weight 1 in the first window that contains it, and 0 in later ones. So predictions after the
    first window have at least `window - step` tokens of context.

    Raises UsageError if the step is larger than the window.
    """
    check_range("window", window, 1)
    check_range("step", step, 1, window)
    n_windows = (len(tokens) > 1) + max(-(-(len(tokens) - 1 - window) // step), 0)

    def batch_at(index: int) -> Batch:
        number = index * batch_size + np.arange(batch_size)[:, None]
        positions = number * step + np.arange(window + 1)
        inside = (positions < len(tokens)) & (number < n_windows)
        windows = np.where(inside, tokens[np.minimum(positions, len(tokens) - 1)], 0)
        fresh = (number == 0) | (np.arange(window) >= window - step)
        return windows.astype(np.int32), (inside[:, 1:] & fresh).astype(np.float32)

    return LazyBatches(batch_at, range(-(-n_windows // batch_size)))


def stream(batch_at: BatchAt, start: int, stop: int, rows: Rows = slice(None)) -> Iterator[Batch]:
    """Iterate over the batches of steps start .. stop - 1, limited to `rows` and prefetched in background threads."""
    steps = grain.MapDataset.range(start, stop).map(lambda step: batch_at(step, rows))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
