"""Laws of the corpora: reading, encoding, splitting, fingerprints."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hourglass_jax import CharTokenizer, DataConfig, OptimizerConfig, RuntimeConfig, UsageError
from hourglass_jax.data import overlap
from hourglass_jax.data.corpora import (
    builtin_text,
    load_splits,
    load_text,
    load_tokens,
    make_tokenizer,
    map_bytes,
    read_text,
    split_tokens,
    text_files,
)
from hourglass_jax.data.files import warn_once
from hourglass_jax.ranges import literals
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


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The working directory, with five texts in two folders and a file that is none."""
    monkeypatch.chdir(tmp_path)
    warn_once.cache_clear()
    for name in ("b.txt", "a.txt", "books/d.txt", "books/old/c.txt", "books/notes.md", "books/E.TXT"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a.txt", "a.txt"),
        ("b.txt, a.txt", "a.txt b.txt"),
        ("a.txt,./a.txt,*.txt", "a.txt b.txt"),
        ("books", "books/E.TXT books/d.txt books/old/c.txt"),
        ("books/", "books/E.TXT books/d.txt books/old/c.txt"),
        ("books/*", "books/E.TXT books/d.txt books/notes.md"),
        ("books/**/*.txt,b.txt", "b.txt books/d.txt books/old/c.txt"),
        (".", "a.txt b.txt books/E.TXT books/d.txt books/old/c.txt"),
        ("~/a.txt,~/books", "a.txt books/E.TXT books/d.txt books/old/c.txt"),
    ],
)
def test_several_texts_are_joined_in_the_order_of_their_names(library, monkeypatch, path, names):
    monkeypatch.setenv("HOME", str(library))
    files = [Path(name) for name in names.split()]
    assert [file.resolve().relative_to(library) for file in text_files(path)] == files
    assert load_text(path) == "\n".join(names.split())
    tokens, _ = load_tokens(DataConfig(path=path, tokenizer="byte"))
    assert bytes(tokens).decode() == load_text(path)


def test_files_passed_over_are_counted_by_kind_in_one_line(library, caplog):
    for name in ("old/more.MD", "old/README", "old/.hidden"):
        (library / "books" / name).write_text(name)
    for _ in range(2):
        text_files("books")
    assert caplog.messages == ["books: ignored 3 of 6 files (2 .md, 1 no suffix)"]


def test_a_text_counts_once_whatever_links_lead_to_it(library):
    directory = Path("linked")
    (directory / "v1").mkdir(parents=True)
    (directory / "v1/a.txt").write_text("one")
    (directory / "latest").symlink_to("v1")
    (directory / "v1/b.txt").hardlink_to(directory / "v1/a.txt")
    (directory / "v1/up").symlink_to("..")
    assert load_text(str(directory)) == load_text(f"linked/v1/a.txt,{directory.absolute()}/v1/a.txt") == "one"


def test_a_file_with_a_comma_or_a_star_in_its_name_is_itself(library):
    for name in ("a,b.txt", "*.txt"):
        (library / name).write_text("itself")
        assert load_text(name) == load_text(f"{library / name}") == "itself"
    (library / "a [1].txt").write_text("among others")
    assert load_text("a [1].txt, b.txt") == "among others\nb.txt"
    (library / "old, new").mkdir()
    (library / "old, new" / "e.txt").write_text("in it")
    assert load_text("old, new") == "in it"


@pytest.mark.parametrize("path", ["nowhere.txt", "a.txt,nowhere.txt", "a.txt,", "*.csv", "books/old/c.txt/"])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_pattern_without_files_raises_an_error(library, path, tokenizer):
    with pytest.raises(UsageError, match=r"no such file|holds no"):
        load_tokens(DataConfig(path=path, tokenizer=tokenizer))


def test_a_text_of_its_own_for_validation(library):
    (library / "a.txt").write_text("abcd" * 10)
    (library / "v.txt").write_text("bad?")
    config = DataConfig(path="a.txt", valid_path="v.txt", block_size=16)
    tokens, (train, valid, test), tokenizer = load_splits(config)
    assert train is tokens
    assert tokenizer.decode(train) == "abcd" * 10 and len(test) == 0
    assert tokenizer.decode(valid) == "bad" and valid[-1] == tokenizer.unk_id  # the vocabulary is that of the training
    for changed, words in (
        ({"path": "v.txt"}, "every training file"),
        ({"block_size": 40}, "training tokens are too few .block_size=40"),
    ):
        with pytest.raises(UsageError, match=words):
            load_splits(dataclasses.replace(config, **changed))
    (library / "v.txt").write_text("?")
    with pytest.raises(UsageError, match="1 validation tokens"):
        load_splits(config)


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
@pytest.mark.parametrize(
    ("path", "valid_path", "kept", "left_out"),
    [
        ("books", "books/d.txt", "books/E.TXT books/old/c.txt", "books/d.txt"),
        ("books", "books/old,b.txt", "books/E.TXT books/d.txt", "books/old/c.txt"),
        ("a.txt,b.txt", "b.txt", "a.txt", "b.txt"),
        ("a.txt,./b.txt", "b.txt", "a.txt", "./b.txt"),
        ("*.txt", "~/b.txt", "a.txt", "b.txt"),
        ("a.txt,link.txt", "b.txt", "a.txt", "link.txt"),
        ("a.txt,hard.txt", "b.txt", "a.txt", "hard.txt"),
        ("a.txt,copy.txt", "books/d.txt,b.txt", "a.txt", "copy.txt"),
    ],
)
def test_a_validation_file_is_left_out_of_training(
    library, monkeypatch, caplog, path, valid_path, kept, left_out, tokenizer
):
    """Named twice, by another name, linked or copied."""
    monkeypatch.setenv("HOME", str(library))
    if "link" in path:
        Path("link.txt").symlink_to("b.txt")
    if "hard" in path:
        Path("hard.txt").hardlink_to("b.txt")
    if "copy" in path:
        shutil.copy("b.txt", "copy.txt")
    tokens, splits, _ = load_splits(DataConfig(path=path, valid_path=valid_path, block_size=1, tokenizer=tokenizer))
    assert splits.train is tokens and len(tokens) == len("\n".join(kept.split()))
    names = [str(Path(name)) for name in kept.split()]
    assert [str(file) for file in text_files(path, valid_path)] == names
    [line] = [message for message in caplog.messages if "excluded" in message]
    assert line.startswith(f"{path}: 1 of ") and line.endswith(f": {Path(left_out)}")


@pytest.mark.parametrize("path", ["b.txt", "b.txt,copy.txt", "link.txt", "copy.txt"])
def test_a_text_used_only_for_validation_raises_an_error(library, path):
    Path("link.txt").symlink_to("b.txt")
    shutil.copy("b.txt", "copy.txt")
    with pytest.raises(UsageError, match=f"{path}: every training file is a validation file or a copy"):
        load_splits(DataConfig(path=path, valid_path="b.txt", block_size=1))


def test_only_files_of_equal_size_are_compared(library, monkeypatch):
    monkeypatch.setattr(overlap, "sha256", None)
    Path("a.txt").write_text("of another size")
    assert text_files("a.txt,b.txt", "b.txt") == text_files("a.txt", "b.txt") == [Path("a.txt")]


@pytest.mark.parametrize("options", [{"split": "enwik8"}, {"dataset": "cifar10"}, {"dataset": "folder"}])
def test_a_text_for_validation_contradicts_another_split(options):
    with pytest.raises(UsageError, match=r"valid_path=.v\.txt."):
        DataConfig(valid_path="v.txt", **options)


@pytest.mark.parametrize("text", ["日本語" * 100, "0123456789" * 100])
def test_cleaning_that_leaves_nothing_raises_an_error(tmp_path, text):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    config = DataConfig(path=str(tmp_path / "text.txt"), clean=True, block_size=16)
    with pytest.raises(UsageError, match=rf"cleaning removes all {len(text):,}"):
        load_splits(config)
    (tmp_path / "text.txt").write_text(f"an old pond {text}", encoding="utf-8")
    with pytest.raises(UsageError, match="12 tokens after cleaning"):
        load_splits(config)


@pytest.mark.parametrize(
    ("fraction", "words"),
    [(0.001, "too small for 1,000 tokens: 1 training"), (0.9999, "too large for 1,000 tokens: 1 validation")],
)
def test_a_fraction_that_leaves_nothing_is_blamed_and_not_the_text(fraction, words):
    with pytest.raises(UsageError, match=f"train_fraction={fraction} is {words}") as error:
        split_tokens(TEXT, DataConfig(block_size=16, train_fraction=fraction))
    assert "longer text" not in str(error.value)
    with pytest.raises(UsageError, match="longer text"):  # where no fraction would do
        split_tokens(TEXT[:18], DataConfig(block_size=16, train_fraction=fraction))


def test_half_a_surrogate_pair_raises_an_error(tmp_path):
    for encode in (ByteTokenizer().encode, CharTokenizer.from_text):
        with pytest.raises(UsageError, match=r"'\\ud83d', half of a surrogate pair"):
            encode("smile \ud83d!")
    vocabulary = {name: i for i, name in enumerate([*CharTokenizer.SPECIALS, "a", "\ud83d"])}
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"clean": False, "vocabulary": vocabulary}))
    with pytest.raises(UsageError, match=r"vocab.json: character 1 of the text is '\\ud83d'"):
        CharTokenizer.load(path)
    assert CharTokenizer.from_text("😀a").encode("a😀\ud83d").tolist() == [3, 4, 1]


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


@pytest.mark.parametrize("config", [DataConfig, OptimizerConfig, RuntimeConfig])
def test_unknown_choices_are_refused_and_the_allowed_ones_documented(config):
    assert literals(config)
    for name, allowed in literals(config).items():
        with pytest.raises(UsageError, match=f"{name}='other' is unknown; choose one of {', '.join(allowed)}"):
            config(**{name: "other"})
        assert all(value in config.__doc__ for value in allowed)


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
