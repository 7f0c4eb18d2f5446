"""Readers of text: UTF-8 files, any files as bytes, the built-in corpus; and how a text is split."""

from __future__ import annotations

import dataclasses
import glob
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hourglass_jax.data.listing import each_once, files_of_kind
from hourglass_jax.data.mapped import MappedBytes
from hourglass_jax.data.overlap import warn_of_repeats, without_copies
from hourglass_jax.errors import UsageError
from hourglass_jax.run_config import DataConfig
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, TextTokenizer

ENWIK8_SPLIT = (90_000_000, 5_000_000, 5_000_000)  # of enwik8 and text8, as in the literature; one token a byte
MIN_VALID = 2  # tokens: one prediction
LONGER = "give a longer text or a smaller block_size"


class Splits(NamedTuple):
    """The parts of a text, tokens [N] each; `test` may be empty."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def decode_text(raw: bytes, source: object) -> str:
    """UTF-8 with line ends as "\\n"; raises UsageError, which names the source, where it is not UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{source}: not UTF-8 at byte {error.start} (line {line}: byte 0x{raw[error.start]:02x}); convert it first"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, line ends as "\\n". Raises UsageError where it is missing, empty or not UTF-8."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a UTF-8 text file")
    text = decode_text(path.read_bytes(), path)
    if not text.strip():
        raise UsageError(f"{path}: the file holds no text; give a UTF-8 text file")
    return text


def builtin_text() -> str:
    """Python's own language reference, about 0.46 MB of English that ships with every CPython."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def text_files(path: str | Path, held_out: str = "") -> list[Path]:
    """The files that `path` names, as `DataConfig.path` says, sorted, each once whatever links lead to it.

    held_out: a path whose files, and copies of them, are left out; empty: none.

    Raises UsageError where a part names none, or none is left.
    """
    files = named_files(path)
    return without_copies(files, named_files(held_out), path) if held_out else files


def named_files(path: str | Path) -> list[Path]:
    """As `text_files`."""
    path = os.path.expanduser(path)
    if os.path.isfile(path):  # whatever its name
        return [Path(path)]
    files: list[Path] = []
    parts = [path] if os.path.isdir(path) else [part.strip() for part in path.split(",")]
    for part in map(os.path.expanduser, parts):
        found = [file for file in named_by(part) if file.is_file()]
        if not found:
            problem = "the directory holds no .txt file" if os.path.isdir(part) else "no such file"
            raise UsageError(
                f"{part or path}: {problem}; give a file, a directory of .txt files, a pattern, or several with "
                "commas between"
            )
        files += found
    return each_once(files)


def named_by(part: str) -> list[Path]:
    """What a directory, a file whatever its name, or a pattern names."""
    if os.path.isdir(part):
        return files_of_kind(part, (".txt",))
    return [Path(name) for name in ([part] if os.path.isfile(part) else glob.glob(part, recursive=True))]


def load_text(path: str, held_out: str = "") -> str:
    """The text of `text_files`, a line end between files, or the built-in corpus where `path` is empty."""
    return "\n".join(map(read_text, text_files(path, held_out))) if path else builtin_text()


def make_tokenizer(text: str, config: DataConfig) -> TextTokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    return CharTokenizer.from_text(text, clean=config.clean)


def map_bytes(path: str | Path) -> MappedBytes:
    """A file's bytes as uint8 [N], untouched and left on disk. Raises UsageError where it is missing or empty.

    The file may be replaced by rename; changed in place, it can no longer be read: see `MappedBytes`.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a file to read as bytes")
    if not path.stat().st_size:
        raise UsageError(f"{path}: the file is empty; give a file with text")
    return MappedBytes(path)


def load_bytes(path: str | Path, held_out: str = "") -> np.ndarray:
    """The bytes of `text_files`, a line end between files: left on disk where it is one file."""
    first, *others = map(map_bytes, text_files(path, held_out))
    line_end = np.frombuffer(b"\n", np.uint8)
    return np.concatenate([first, *(part for other in others for part in (line_end, other))]) if others else first


def load_tokens(config: DataConfig, tokenizer: TextTokenizer | None = None) -> tuple[np.ndarray, TextTokenizer]:
    """The text of `config` as tokens [N], and its tokenizer: the one given, or the one that `config` asks for.

    Files for validation at `config.valid_path`, and copies of them, are left out.
    A file read as bytes is memory-mapped: it starts at once whatever its size, and line ends stay as they are.
    Other tokens come in the smallest of uint8, uint16 and int32 that holds the vocabulary. Raises UsageError where
    cleaning leaves nothing.
    """
    kind = config.tokenizer if tokenizer is None else tokenizer.kind
    if config.path and kind == "byte":
        return load_bytes(config.path, config.valid_path), tokenizer or ByteTokenizer()
    text = load_text(config.path, config.valid_path)
    if tokenizer is None:
        tokenizer = make_tokenizer(text, config)
    tokens = tokenizer.encode(text)
    if not len(tokens):
        raise UsageError(
            f"{config.path}: cleaning leaves none of its {len(text):,} characters; give a text in the letters a to z, "
            "or a vocabulary with clean=False"
        )
    highest = 255 if tokenizer.kind == "byte" else tokenizer.vocab_size - 1
    smallest = next((t for t in (np.uint8, np.uint16) if highest <= np.iinfo(t).max), np.int32)
    return tokens.astype(smallest), tokenizer


def load_splits(config: DataConfig, tokenizer: TextTokenizer | None = None) -> tuple[np.ndarray, Splits, TextTokenizer]:
    """The text at `config.path`, its parts, as tokens each, and the tokenizer; see `load_tokens`.

    Logs a warning where the validation text repeats the training text.
    """
    tokens, tokenizer = load_tokens(config, tokenizer)
    if config.valid_path:
        valid, _ = load_tokens(dataclasses.replace(config, path=config.valid_path, valid_path=""), tokenizer)
        splits = Splits(tokens, valid, tokens[:0])
        if problem := shortage(splits, config):
            raise UsageError(f"of the texts' tokens {problem}; {LONGER}")
    else:
        splits = split_tokens(tokens, config)
    warn_of_repeats(splits.train, splits.valid, config.valid_path or config.path or "the built-in text")
    return tokens, splits, tokenizer


def split_tokens(tokens: np.ndarray, config: DataConfig) -> Splits:
    """By `config.split`: the first `train_fraction` to train on, the rest for validation; or enwik8's 90 / 5 / 5 M.

    A text of one character a token is cut at the same places.
    """
    n_tokens = len(tokens)
    if config.split == "enwik8":
        if n_tokens != sum(ENWIK8_SPLIT):
            raise UsageError(
                f"split='enwik8' takes exactly {sum(ENWIK8_SPLIT):,} tokens, one a byte of enwik8 or text8, and this "
                f"text has {n_tokens:,}; give that file with tokenizer='byte', or use split='fraction'"
            )
        n_train, n_valid, _ = ENWIK8_SPLIT
    else:
        n_train = int(n_tokens * config.train_fraction)
        n_valid = n_tokens - n_train
    splits = Splits(tokens[:n_train], tokens[n_train : n_train + n_valid], tokens[n_train + n_valid :])
    if problem := shortage(splits, config):
        if config.split == "fraction" and n_tokens >= config.block_size + 1 + MIN_VALID:  # another fraction would do
            wrong = "large" if n_valid < MIN_VALID else "small"
            raise UsageError(f"train_fraction={config.train_fraction} is too {wrong}: of {n_tokens:,} tokens {problem}")
        cleaned = " once cleaned" if config.clean else ""
        raise UsageError(f"of the text's {n_tokens:,} tokens{cleaned} {problem}; {LONGER}")
    return splits


def shortage(splits: Splits, config: DataConfig) -> str:
    """Which part has too few tokens; empty where all have enough."""
    needed = config.block_size + 1
    if len(splits.train) < needed:
        return (
            f"{len(splits.train):,} are for training, but one block takes {needed} "
            f"(block_size={config.block_size} and the next)"
        )
    if len(splits.valid) < MIN_VALID:
        return f"{len(splits.valid)} are for validation, which takes at least {MIN_VALID}"
    return ""
