"""Tokens of a store: indexed like one array, in windows that begin with documents, and without weight as targets."""

import json

import numpy as np
import pytest

from hourglass_jax import ByteTokenizer, DataConfig, UsageError
from hourglass_jax.data.pipeline import (
    consecutive_windows,
    document_windows,
    plan_documents,
    random_windows,
    training_batches,
    without_targets,
)
from hourglass_jax.data.prepare import PrepareConfig, prepare


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of documents of 1 to 200 characters, in several shards."""
    home = tmp_path_factory.mktemp("store")
    lengths = np.random.default_rng(0).integers(1, 200, 60)
    lines = [json.dumps({"text": f"{i} ".ljust(n, "x")}) + "\n" for i, n in enumerate(lengths)]
    (home / "a.jsonl").write_text("".join(lines))
    config = PrepareConfig(valid_fraction=0.2, test_fraction=0.1)
    return prepare([str(home / "a.jsonl")], home / "store", config, shard_bytes=500)


@pytest.mark.parametrize("block_size", [1, 20, 64, 300, 5000])
@pytest.mark.parametrize("planned", [7, 2**20])
def test_windows_begin_with_documents_and_lose_only_the_ends_of_long_ones(store, monkeypatch, block_size, planned):
    monkeypatch.setattr("hourglass_jax.data.pipeline.PLANNED", planned)
    plan_documents.cache_clear()
    tokens, length = store.train, block_size + 1
    begins = np.array([0, *tokens.ends[:-1]])
    starts, n_lost, n_repeated = plan_documents(tokens, block_size)
    assert set(starts) <= set(begins) and (np.diff(starts) > 0).all()
    covered = np.zeros(len(tokens) + length, int)
    for start in starts:
        covered[start : start + length] += 1
    covered = covered[: len(tokens)]
    assert ((covered == 0).sum(), (covered > 1).sum()) == (n_lost, n_repeated) and covered.max() <= 2
    assert n_lost == np.maximum(tokens.ends - begins - length, 0).sum()
    for begin, end in zip(begins, tokens.ends, strict=True):
        assert end - begin > length or any(start <= begin and end <= start + length for start in starts)


def test_document_windows_are_a_function_of_seed_and_step(store):
    tokens = store.train
    batch_at = document_windows(tokens, 40, 4, seed=1)
    n_windows = len(plan_documents(tokens, 40).starts)
    assert n_windows % 4 == 0 or n_windows > 4
    rows = np.concatenate([batch_at(step)[0] for step in range(n_windows)])[:n_windows]
    assert (rows[:, 0] == ByteTokenizer().bos_id).all() and len(np.unique(rows, axis=0)) == n_windows
    np.testing.assert_array_equal(batch_at(2, slice(1, 3))[0], batch_at(2)[0][1:3])
    again = training_batches(tokens, DataConfig(block_size=40, batch_size=4, order="documents"), 1)
    np.testing.assert_array_equal(again(5)[0], batch_at(5)[0])
    last, weights = document_windows(tokens, len(tokens), 1, seed=0)(0)
    assert weights.sum() == len(tokens) - 1 and (last[0, : len(tokens)] == tokens[:]).all()
    with pytest.raises(UsageError, match="order='documents' requires a token store"):
        training_batches(tokens[:], DataConfig(order="documents"), 0)


def test_excluded_targets_have_no_weight(store):
    tokens = store.valid
    batches = without_targets(consecutive_windows(tokens, 30, 4), (256, 257))
    predicted = np.concatenate([tokens[:, 1:][weights > 0] for tokens, weights in batches])
    np.testing.assert_array_equal(predicted, tokens[1:][tokens[1:] < 256])


def test_stored_tokens_index_like_one_array(store):
    tokens = store.train
    whole = np.concatenate([np.fromfile(path, "<u2") for path in sorted(store.directory.glob("train-*"))])
    assert len(tokens) == len(whole) == tokens.shape[0] and len(tokens._shards) > 3
    np.testing.assert_array_equal(tokens, whole)
    for index in (slice(None), slice(3, 900), slice(249, 251), slice(250, 500), slice(-7, None), slice(9, 3), 5, -1):
        np.testing.assert_array_equal(tokens[index], whole[index])
    for index in (
        slice(None, None, 7),
        slice(90, 3, -1),
        np.random.default_rng(1).integers(-len(whole), len(whole), (5, 40)),
        [],
        [[1]],
    ):
        index = index if isinstance(index, slice) else np.array(index, np.int64)
        np.testing.assert_array_equal(tokens[index], whole[index])
    with pytest.raises(IndexError):
        tokens[np.array([len(whole)])]
    for order in ("random", "epochs"):
        config = DataConfig(block_size=32, batch_size=4, order=order)
        stored, plain = (training_batches(text, config, seed=3) for text in (tokens, whole.astype(np.int32)))
        for step in range(3):
            np.testing.assert_array_equal(stored(step)[0], plain(step)[0])
    assert type(random_windows(tokens, 8, 2, 0)(0)[0]) is np.ndarray
