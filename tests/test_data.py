"""Laws of the corpora and of the batches cut from them."""

from importlib import resources

import numpy as np
import pytest

from hourglass_jax import CharTokenizer, DataConfig, UsageError
from hourglass_jax.data.corpora import (
    builtin_text,
    load_text,
    make_tokenizer,
    read_text,
    split_tokens,
)
from hourglass_jax.data.haiku import is_haiku, load_haiku, make_examples, parse_haiku, usable_haiku
from hourglass_jax.data.pipeline import (
    consecutive_windows,
    pack_examples,
    random_windows,
    shuffled_examples,
    stream,
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


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 30), (13, 40), (5, 5)])
def test_stream_yields_the_batches_of_its_steps_in_order(start, stop):
    batch_at = random_windows(TEXT, 8, 2, seed=0)
    streamed = list(stream(batch_at, start, stop))
    assert len(streamed) == stop - start
    for step, batch in zip(range(start, stop), streamed, strict=True):
        assert same(batch, batch_at(step))


def test_text_file_comes_back_with_plain_line_ends(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("naïve\r\nsecond\rthird\n\n日本".encode())
    assert read_text(path) == load_text(str(path)) == "naïve\nsecond\nthird\n\n日本"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "no text"),
        (b" \n\t\r\n", "no text"),
        (b"good\nline\nab\xffc", "byte 12 (line 3: byte 0xff)"),
        ("end cut: é".encode()[:-1], "byte 9 (line 1: byte 0xc3)"),
    ],
)
def test_unreadable_text_file_is_refused(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_text(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_directory_is_no_text_file(tmp_path):
    with pytest.raises(UsageError):
        read_text(tmp_path)


def test_builtin_text_is_long_english():
    text = load_text("")
    assert text == builtin_text()
    assert len(text) > 400_000
    assert text.lower().count(" the ") > 1000


def test_tokenizer_follows_the_configuration():
    assert make_tokenizer("Ab", DataConfig(tokenizer="byte")).kind == "byte"
    assert make_tokenizer("Ab", DataConfig()).characters == ["A", "b"]
    assert make_tokenizer("Ab", DataConfig(clean=True)).characters == ["a", "b"]


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_split_cuts_the_text_in_two(fraction):
    train, valid = split_tokens(TEXT, DataConfig(block_size=16, train_fraction=fraction))
    assert np.concatenate([train, valid]).tolist() == TEXT.tolist()
    assert len(train) == fraction * len(TEXT)


@pytest.mark.parametrize(("length", "enough"), [(0, False), (32, False), (33, False), (34, True), (1000, True)])
def test_split_needs_one_block_to_train_on(length, enough):
    config = DataConfig(block_size=16, train_fraction=0.5)
    if enough:
        assert len(split_tokens(TEXT[:length], config)[0]) >= 17
    else:
        with pytest.raises(UsageError, match="block_size=16"):
            split_tokens(TEXT[:length], config)


def test_split_needs_a_token_to_validate_on():
    with pytest.raises(UsageError):
        split_tokens(TEXT[:100], DataConfig(block_size=16, train_fraction=0.99))


@pytest.mark.parametrize("text", ["a\nb\nc\nd\ne\nf", "a\nb\nc\n\nd\ne\nf\n", "\n\n a \nb\n c\n \n\nd\ne\nf\n\n"])
def test_haiku_are_three_lines_each(text):
    assert parse_haiku(text, "it") == ["a\nb\nc", "d\ne\nf"]


@pytest.mark.parametrize("text", ["", "\n \n", "a\nb", "a\nb\nc\n\nd\ne", "a\nb\n\nc\nd\ne\nf"])
def test_other_than_three_lines_are_no_haiku(text):
    with pytest.raises(UsageError, match="poems\\.txt"):
        parse_haiku(text, "poems.txt")


def test_packaged_haiku_are_many_different_and_whole():
    haiku = load_haiku("")
    assert len(haiku) >= 300
    assert len(set(haiku)) == len(haiku)
    assert all(len(poem.split("\n")) == 3 and all(poem.split("\n")) for poem in haiku)
    assert all(map(is_haiku, haiku))
    raw = (resources.files("hourglass_jax.data") / "haiku.txt").read_text(encoding="utf-8")
    blocks = raw.strip().split("\n\n")
    assert len(blocks) == 1 or blocks == haiku


@pytest.mark.parametrize("text", ["", "a\nb", "a\nb\nc\n", "a\n \nc", "a\nb\nc\nd"])
def test_malformed_haiku_are_told(text):
    assert not is_haiku(text)


def test_haiku_that_do_not_fit_or_are_empty_once_cleaned_are_left_out():
    tokenizer = CharTokenizer.from_text("abc def", clean=True)
    haiku = ["a\nb\nc", "a\n123\nc", "abc\ndef\n" + "a" * 20]
    assert usable_haiku(haiku, tokenizer, block_size=16) == haiku[:1]
    assert usable_haiku(haiku[2:], tokenizer, block_size=29) == haiku[2:]  # 30 tokens with BOS and EOS


def test_examples_end_at_their_eos_and_prompts_carry_no_loss():
    tokenizer = CharTokenizer.from_text("ab\n")
    haiku = ["a\nb\nab", "ab\nab\nab"]
    for form, first in (("haiku", [1, 1]), ("prompt", [3, 4])):
        tokens, weights = make_examples(haiku, tokenizer, form)
        assert tokens.shape == (2, 10) and tokens[0, 0] == tokenizer.bos_id
        counted = [np.flatnonzero(row) + 1 for row in weights]
        assert [c[0] for c in counted] == first
        assert [row[c[-1]] for row, c in zip(tokens, counted, strict=True)] == [tokenizer.eos_id] * 2
        assert [c[-1] for c in counted] == [7, 9]
