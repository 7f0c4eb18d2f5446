"""Laws of the corpora: reading, encoding, splitting, fingerprints; and of the haiku."""

from importlib import resources

import numpy as np
import pytest

from hourglass_jax import CharTokenizer, DataConfig, UsageError
from hourglass_jax.data.corpora import (
    builtin_text,
    load_text,
    load_tokens,
    make_tokenizer,
    map_bytes,
    read_text,
    split_tokens,
)
from hourglass_jax.data.haiku import is_haiku, load_haiku, make_examples, parse_haiku, usable_haiku
from hourglass_jax.tokenizers import ByteTokenizer
from hourglass_jax.training.identity import N_PIECES, PIECE, fingerprint

TEXT = np.arange(1000, dtype=np.int32)


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


def test_bytes_of_a_file_are_its_tokens_as_they_stand(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\xff")
    for config, given in (
        (DataConfig(path=str(path), tokenizer="byte"), None),
        (DataConfig(path=str(path)), ByteTokenizer()),
    ):
        tokens, tokenizer = load_tokens(config, given)
        assert bytes(tokens) == path.read_bytes() and tokenizer.kind == "byte"


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), (b"", "the file is empty")])
def test_missing_or_empty_bytes_are_refused(tmp_path, content, words):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        load_tokens(DataConfig(path=str(path), tokenizer="byte"))
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("n_characters", "dtype"),
    [(3, np.uint8), (253, np.uint8), (254, np.uint16), (65_533, np.uint16), (65_534, np.int32)],
)
def test_characters_are_stored_in_the_smallest_type(tmp_path, n_characters, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + n_characters)))
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8")
    tokens, tokenizer = load_tokens(DataConfig(path=str(path)))
    assert tokens.dtype == dtype and tokenizer.decode(tokens) == text
    assert load_tokens(DataConfig(path=str(path)), tokenizer)[0].tolist() == tokens.tolist()


def test_builtin_text_has_tokens_of_either_kind():
    tokens, tokenizer = load_tokens(DataConfig())
    assert tokens.dtype == np.uint8 and tokenizer.decode(tokens) == builtin_text()
    tokens, _ = load_tokens(DataConfig(tokenizer="byte"))
    assert tokens.dtype == np.uint8 and bytes(tokens).decode() == builtin_text()


def test_enwik8_has_its_standard_split(tmp_path):
    path = tmp_path / "enwik8"
    with path.open("wb") as file:
        file.truncate(100_000_000)
        for start, mark in ((0, b"a"), (89_999_999, b"bc"), (94_999_999, b"de"), (99_999_999, b"f")):
            file.seek(start)
            file.write(mark)
    config = DataConfig(path=str(path), tokenizer="byte", split="enwik8")
    splits = split_tokens(load_tokens(config)[0], config)
    assert [len(part) for part in splits] == [90_000_000, 5_000_000, 5_000_000]
    assert [bytes(part[[0, -1]]) for part in splits] == [b"ab", b"cd", b"ef"]
    assert splits.valid is splits[1] and splits.test is splits[2]


@pytest.mark.parametrize("size", [1000, 99_999_999, 100_000_001])
def test_another_size_is_not_enwik8(size):
    with pytest.raises(UsageError) as error:
        split_tokens(np.broadcast_to(np.uint8(0), size), DataConfig(split="enwik8"))
    assert "100,000,000" in str(error.value) and f"{size:,}" in str(error.value) and "\n" not in str(error.value)


LONG = N_PIECES * PIECE + 1000


@pytest.mark.parametrize("length", [0, 1, 1000, N_PIECES * PIECE, LONG])
def test_a_fingerprint_is_of_the_text_whatever_its_type(length):
    text = np.random.default_rng(0).integers(0, 256, length, np.uint8)
    assert len({fingerprint(text.astype(dtype)) for dtype in (np.uint8, np.uint16, np.int32, np.int64)}) == 1


@pytest.mark.parametrize("changed", [0, PIECE - 1, LONG - PIECE, LONG - 1, 10 * (LONG - PIECE) // (N_PIECES - 1)])
@pytest.mark.parametrize("length", [1000, LONG])
def test_a_fingerprint_tells_texts_apart(length, changed):
    text = np.zeros(length, np.uint8)
    other = text.copy()
    other[changed % length] = 1
    assert len({fingerprint(some) for some in (text, other, text[:-1], np.zeros(length + 1, np.uint8))}) == 4


def test_a_fingerprint_of_examples_is_of_all_rows():
    tokens = np.arange(80).reshape(20, 4)
    assert fingerprint(tokens) == fingerprint(tokens.reshape(-1)) != fingerprint(tokens[::-1])


def test_a_fingerprint_reads_little_of_a_huge_file(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(20 * 10**9)
    empty = fingerprint(map_bytes(path))
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"a")
    assert fingerprint(map_bytes(path)) != empty


@pytest.mark.parametrize("name", ["order", "split"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(UsageError, match=f"{name}='other'"):
        DataConfig(**{name: "other"})


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_split_cuts_the_text_in_two(fraction):
    train, valid, test = split_tokens(TEXT, DataConfig(block_size=16, train_fraction=fraction))
    assert np.concatenate([train, valid]).tolist() == TEXT.tolist() and len(test) == 0
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
