"""Readers of text: a UTF-8 file, any file as bytes, the built-in corpus; and how a text is split."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from hourglass_jax.config import DataConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, TextTokenizer

ENWIK8_SPLIT = (90_000_000, 5_000_000, 5_000_000)  # of enwik8 and text8, as in the literature; one token a byte


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
    path = Path(path)
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


def load_text(path: str) -> str:
    """The file at `path`, or the built-in corpus where it is empty."""
    return read_text(path) if path else builtin_text()


def make_tokenizer(text: str, config: DataConfig) -> TextTokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    return CharTokenizer.from_text(text, clean=config.clean)


def map_bytes(path: str | Path) -> np.memmap:
    """A file's bytes as uint8 [N], untouched and left on disk. Raises UsageError where it is missing or empty."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a file to read as bytes")
    if not path.stat().st_size:
        raise UsageError(f"{path}: the file is empty; give a file with text")
    return np.memmap(path, np.uint8, mode="r")


def load_tokens(config: DataConfig, tokenizer: TextTokenizer | None = None) -> tuple[np.ndarray, TextTokenizer]:
    """The text of `config` as tokens [N], and its tokenizer: the one given, or the one that `config` asks for.

    A file read as bytes is memory-mapped: it starts at once whatever its size, and line ends stay as they are.
    Other tokens come in the smallest of uint8, uint16 and int32 that holds the vocabulary.
    """
    kind = config.tokenizer if tokenizer is None else tokenizer.kind
    if config.path and kind == "byte":
        return map_bytes(config.path), tokenizer or ByteTokenizer()
    text = load_text(config.path)
    if tokenizer is None:
        tokenizer = make_tokenizer(text, config)
    smallest = next((t for t in (np.uint8, np.uint16) if tokenizer.vocab_size - 1 <= np.iinfo(t).max), np.int32)
    return tokenizer.encode(text).astype(smallest), tokenizer


def split_tokens(tokens: np.ndarray, config: DataConfig) -> Splits:
    """By `config.split`: the first `train_fraction` to train on, the rest for validation; or enwik8's 90 / 5 / 5 M."""
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
    needed = config.block_size + 1
    if n_train < needed or n_valid < 2:
        raise UsageError(
            f"the text has {n_tokens} tokens, {n_train} of them for training, but one block takes {needed} "
            f"(block_size={config.block_size} and the next); give a longer text or a smaller block_size"
        )
    return splits
