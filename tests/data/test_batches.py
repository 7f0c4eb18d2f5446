"""Laws of the batches cut from a text or from examples."""

import dataclasses
import os

import numpy as np
import pytest

from hourglass_jax import DataConfig
from hourglass_jax.data.corpora import load_tokens, map_bytes, split_tokens
from hourglass_jax.data.files import FileChanged
from hourglass_jax.data.pipeline import (
    LazyBatches,
    consecutive_windows,
    evenly_spaced,
    pack_examples,
    random_windows,
    shuffled_examples,
    shuffled_order,
    shuffled_windows,
    stream,
    training_batches,
)

TEXT = np.arange(1000, dtype=np.int32)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def rows_seen(batch_at, start, stop):
    """The row numbers of steps start .. stop - 1, for examples whose tokens hold their row number."""
    return np.concatenate([batch_at(step)[0][:, 0] for step in range(start, stop)])


def numbered_examples(n_rows):
    tokens = np.repeat(np.arange(n_rows, dtype=np.int32)[:, None], 4, axis=1)
    return tokens, tokens[:, 1:].astype(np.float32)


def test_random_windows_are_a_function_of_seed_and_step():
    batch_at, again = (random_windows(TEXT, 16, 8, seed=3) for _ in range(2))
    later = batch_at(7)
    batch_at(2)
    assert same(batch_at(7), later) and same(again(7), later)
    assert not same(batch_at(8), later)
    assert not same(random_windows(TEXT, 16, 8, seed=4)(7), later)


def test_random_windows_are_slices_of_the_text():
    tokens, weights = random_windows(TEXT, 16, 8, seed=0)(0)
    assert tokens.shape == (8, 17) and weights.shape == (8, 16)
    assert (np.diff(tokens) == 1).all()
    assert (weights == 1).all()


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_random_windows_start_everywhere_and_never_run_over(extra):
    block_size = 16
    batch_at = random_windows(TEXT[: block_size + extra], block_size, 8, seed=0)
    starts = rows_seen(batch_at, 0, 50)
    assert set(starts.tolist()) == set(range(extra))


@pytest.mark.parametrize(("n_rows", "batch_size"), [(6, 3), (7, 3), (5, 5), (3, 7), (1, 2)])
def test_each_epoch_shows_each_row_once(n_rows, batch_size):
    batch_at = shuffled_examples(numbered_examples(n_rows), batch_size, seed=1)
    rows = rows_seen(batch_at, 0, 4 * n_rows)
    for epoch in range(len(rows) // n_rows):
        assert sorted(rows[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_every_epoch_has_another_order():
    rows = rows_seen(shuffled_examples(numbered_examples(20), 10, seed=0), 0, 10).reshape(5, 20)
    assert len({tuple(order) for order in rows.tolist()}) == 5


def test_shuffled_examples_are_a_function_of_seed_and_step():
    batch_at, again = (shuffled_examples(numbered_examples(20), 6, seed=3) for _ in range(2))
    later = batch_at(9)
    batch_at(0)
    assert same(batch_at(9), later) and same(again(9), later)
    assert not same(shuffled_examples(numbered_examples(20), 6, seed=4)(9), later)


def test_shuffled_examples_keep_tokens_and_weights_together():
    tokens, weights = shuffled_examples(numbered_examples(20), 6, seed=0)(3)
    assert (tokens[:, 1:] == weights).all()


BATCHES = {
    "random": random_windows(TEXT, 16, 8, seed=3),
    "epochs": shuffled_windows(TEXT, 16, 8, seed=3),
    "examples": shuffled_examples(numbered_examples(20), 8, seed=3),
}
ROWS = [slice(0, 4), slice(4, 8), slice(1, None, 3), slice(0, 0), np.array([6, 0, 6]), np.array([], int)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_rows_of_a_batch_are_those_of_the_whole_batch(name, rows):
    for step in (0, 7, 1000):
        whole = BATCHES[name](step)
        assert same(BATCHES[name](step, rows), [part[rows] for part in whole])


@pytest.mark.parametrize("batch_at", [random_windows, shuffled_windows])
def test_only_the_asked_rows_are_read(batch_at):
    class Text:
        read = 0

        def __len__(self):
            return len(TEXT)

        def __getitem__(self, index):
            self.read += index.size
            return TEXT[index]

    text = Text()
    batch_at(text, 16, 8, seed=0)(5, slice(2, 4))
    assert text.read == 2 * 17


def test_hosts_stream_their_own_rows():
    whole = list(stream(BATCHES["epochs"], 3, 9))
    halves = [list(stream(BATCHES["epochs"], 3, 9, rows)) for rows in (slice(0, 4), slice(4, 8))]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert same(batch, [np.concatenate(part) for part in zip(*parts, strict=True)])


@pytest.mark.parametrize(("length", "block_size"), [(17, 16), (1000, 16), (1000, 999), (81, 16), (82, 16), (80, 16)])
def test_each_epoch_shows_each_window_once(length, block_size):
    n_windows = (length - 1) // block_size
    batch_at = shuffled_windows(TEXT[:length], block_size, batch_size=4, seed=1)
    batches = [batch_at(step) for step in range(n_windows)]
    tokens = np.concatenate([tokens for tokens, _ in batches])
    assert all(t.shape == (4, block_size + 1) and (w == np.ones((4, block_size))).all() for t, w in batches)
    assert (np.diff(tokens) == 1).all()
    for epoch in tokens[:, 0].reshape(4, n_windows):
        assert sorted(epoch) == list(range(0, n_windows * block_size, block_size))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63])
def test_no_two_epochs_and_no_two_seeds_share_an_order(seed):
    orders = [shuffled_order(20, s)(np.arange(200)).reshape(10, 20) for s in (seed, seed + 1)]
    assert all(sorted(order) == list(range(20)) for order in np.concatenate(orders))
    assert len({tuple(order) for order in np.concatenate(orders).tolist()}) == 20


@pytest.mark.parametrize("n_items", [1, 2, 7, 64, 1000])
def test_an_order_is_random_access(n_items):
    positions = np.random.default_rng(0).integers(0, 5 * n_items, 50)
    order = shuffled_order(n_items, seed=2)
    assert order(positions).tolist() == shuffled_order(n_items, seed=2)(np.arange(5 * n_items))[positions].tolist()


def test_an_order_of_more_items_than_memory_holds():
    n_items = 10**11
    for start in (0, n_items - 500, 7 * n_items):
        items = shuffled_order(n_items, seed=0)(start + np.arange(1000))
        assert len(set(items.tolist())) == 1000
        assert 0 <= items.min() < n_items // 10 and n_items * 9 // 10 < items.max() < n_items


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_training_batches_follow_the_configuration(order):
    config = DataConfig(block_size=16, batch_size=8, order=order)
    assert same(training_batches(TEXT, config, seed=3)(5), BATCHES[order](5))


@pytest.mark.parametrize("cut", [slice(None), slice(1000, 3000), slice(7, 60)])
def test_bytes_on_disk_give_the_batches_of_bytes_in_memory(tmp_path, cut):
    path = tmp_path / "bytes"
    content = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    path.write_bytes(content.tobytes())
    mapped, memory = map_bytes(path)[cut], content[cut].astype(np.int32)
    for windows in (random_windows, shuffled_windows):
        first, second = (windows(text, 16, 8, seed=0)(9) for text in (mapped, memory))
        assert same(first, second) and first[0].dtype == np.int32 and type(first[0]) is np.ndarray
    for first, second in zip(*(consecutive_windows(text, 16, 8) for text in (mapped, memory)), strict=True):
        assert same(first, second) and first[0].dtype == np.int32 and type(first[0]) is np.ndarray


@pytest.mark.parametrize("change", ["shortened", "overwritten", "extended"])
def test_a_file_on_disk_that_is_changed_in_place_is_no_longer_read(tmp_path, change):
    """Reading what a file was cut off would kill the process."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 1000)
    os.utime(path, (0, 0))
    tokens = map_bytes(path)[1000:]
    readers = random_windows(tokens, 16, 8, 0), consecutive_windows(tokens, 16, 8).__getitem__
    for read in readers:
        read(1)
    in_memory = tokens.astype(np.int32)
    if change == "shortened":
        os.truncate(path, 500)
    else:
        with path.open("r+b") as file:
            file.seek(0, 2 if change == "extended" else 0)
            file.write(b"other")
    for read in readers:
        with pytest.raises(FileChanged, match=r"bytes: was changed in place .* rename a new file"):
            read(1)
    assert in_memory[:3].tolist() == [1000 % 256, 1001 % 256, 1002 % 256]


def test_a_file_on_disk_that_is_replaced_by_rename_is_read_as_it_was(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 1000)
    read = random_windows(map_bytes(path), 16, 8, 0)
    before = read(0)
    (tmp_path / "new").write_bytes(b"other")
    os.replace(tmp_path / "new", path)
    assert same(read(0), before)


def test_a_huge_file_stays_on_disk(tmp_path):
    path, size = tmp_path / "huge", 20 * 10**9
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - 17)
        file.write(bytes(range(17)))
    config = DataConfig(path=str(path), tokenizer="byte", block_size=16, batch_size=8)
    tokens, _ = load_tokens(config)
    train, valid, _ = split_tokens(tokens, config)
    assert all(isinstance(part, np.memmap) and part.dtype == np.uint8 for part in (tokens, train, valid))
    for order in ("random", "epochs"):
        batch, _ = training_batches(train, dataclasses.replace(config, order=order), seed=0)(10**9)
        assert batch.shape == (8, 17) and not batch.any()
    batches = consecutive_windows(valid, 16, 8)
    assert len(batches) == 2 * 10**9 // 128
    assert batches[len(batches) - 1][0][-1].tolist() == [*range(1, 17), 0]


def test_packed_weights_count_from_the_start_of_the_loss_to_the_end():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(5, 50, length) for length in (2, 9, 5, 7, 9)]
    loss_from, pad_id = [1, 4, 0, 6, 8], 0
    tokens, weights = pack_examples(sequences, loss_from, pad_id)
    assert tokens.shape == (5, 9) and weights.shape == (5, 8)
    for i, (sequence, start) in enumerate(zip(sequences, loss_from, strict=True)):
        for t in range(9):
            assert tokens[i, t] == (sequence[t] if t < len(sequence) else pad_id)
        for predicted in range(1, 9):
            assert weights[i, predicted - 1] == (start <= predicted < len(sequence))


def test_the_last_token_of_a_packed_sequence_is_predicted_even_where_it_is_the_padding():
    _, weights = pack_examples([np.array([2, 5, 6, 0]), np.array([2, 5, 6, 7, 8, 0])], [1, 1], pad_id=0)
    assert weights.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 8, 9, 12, 13, 14, 15, 16, 28, 29, 30, 57])
def test_consecutive_windows_predict_every_token_once(length, block_size):
    text = TEXT[100 : 100 + length]
    batches = consecutive_windows(text, block_size, batch_size=2)
    tokens, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    counted = weights == 1
    assert all(t.shape == (2, block_size + 1) and w.shape == (2, block_size) for t, w in batches)
    assert np.isin(weights, (0, 1)).all()
    assert tokens[:, 1:][counted].tolist() == text[1:].tolist()
    assert tokens[:, :-1][counted].tolist() == text[:-1].tolist()


def windows_in_memory(tokens, block_size, batch_size):
    n_windows = -(-(len(tokens) - 1) // block_size)
    padded = np.zeros((-(-n_windows // batch_size) * batch_size, block_size + 1), np.int32)
    weights = np.zeros((len(padded), block_size), np.float32)
    for i in range(n_windows):
        window = tokens[i * block_size : (i + 1) * block_size + 1]
        padded[i, : len(window)] = window
        weights[i, : len(window) - 1] = 1
    return [(padded[i : i + batch_size], weights[i : i + batch_size]) for i in range(0, len(padded), batch_size)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 14, 15, 16, 28, 29, 30, 57])
def test_consecutive_windows_are_a_sequence_made_when_asked_for(length, block_size, batch_size):
    text = TEXT[100 : 100 + length]
    batches = consecutive_windows(text, block_size, batch_size)
    expected = windows_in_memory(text, block_size, batch_size)
    n = len(expected)
    assert len(batches) == n
    for part in (slice(None), slice(2), slice(1, None), slice(None, None, -2), slice(n + 5)):
        assert len(batches[part]) == len(expected[part])
        assert all(same(*pair) for pair in zip(batches[part], expected[part], strict=True))
    assert all(same(batches[i], expected[i]) for i in range(-n, n))
    with pytest.raises(IndexError):
        batches[n]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 30), (13, 40), (5, 5)])
def test_stream_yields_the_batches_of_its_steps_in_order(start, stop):
    batch_at = random_windows(TEXT, 8, 2, seed=0)
    streamed = list(stream(batch_at, start, stop))
    assert len(streamed) == stop - start
    for step, batch in zip(range(start, stop), streamed, strict=True):
        assert same(batch, batch_at(step))


@pytest.mark.parametrize("n_batches", [1, 2, 7, 25, 45, 4883])
@pytest.mark.parametrize("n", [1, 2, 3, 20, 128])
def test_evenly_spaced_batches_stand_for_equal_stretches_from_the_first_to_the_last(n_batches, n):
    chosen = list(evenly_spaced(range(n_batches), n))
    assert len(chosen) == min(n, n_batches)
    stretch = n_batches / len(chosen)
    assert all(index <= (i + 0.5) * stretch < index + 1 for i, index in enumerate(chosen))
    assert abs(np.mean(chosen) - (n_batches - 1) / 2) <= 0.5  # the first 20 of 25 would be 2.5 too early
    assert set(np.diff(chosen)) <= {int(stretch), int(stretch) + 1}


def test_evenly_spaced_batches_of_nothing_are_none():
    assert list(evenly_spaced([], 3)) == []


def test_evenly_spaced_batches_are_made_when_they_are_asked_for():
    made = []
    batches = LazyBatches(lambda step: made.append(step) or step, range(10))
    chosen = evenly_spaced(batches, 5)
    assert len(chosen) == 5 and not made
    assert list(chosen[:2]) == [1, 3] == made
