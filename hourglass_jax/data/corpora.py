"""Text corpora: UTF-8 files, files as bytes, the built-in corpus; their tokens and splits."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hourglass_jax.data.files import MappedBytes, files_of_kind, unique_files
from hourglass_jax.data.overlap import warn_of_repeats, without_copies
from hourglass_jax.data.store import is_store
from hourglass_jax.errors import UsageError
from hourglass_jax.run_config import DataConfig
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, TextTokenizer

ENWIK8_SPLIT = (90_000_000, 5_000_000, 5_000_000)  # bytes; the standard split of enwik8 and text8
MIN_VALID = 2  # tokens: one prediction
ADVICE = "give a longer text or a smaller block_size"


class Splits(NamedTuple):
    """Tokens [N] of each part of a text; `test` may be empty."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def decode_text(raw: bytes, source: object) -> str:
    """Decode UTF-8 and convert line ends to "\\n". Raises UsageError for invalid UTF-8; errors name `source`."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{source}: not UTF-8 at byte {error.start} (line {line}: byte 0x{raw[error.start]:02x}); convert it first"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file and convert line ends to "\\n". Raises UsageError if it is missing, blank or not UTF-8."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a UTF-8 text file")
    text = decode_text(path.read_bytes(), path)
    if not text.strip():
        raise UsageError(f"{path}: the file contains no text; give a UTF-8 text file")
    return text


def builtin_text() -> str:
    """Return Python's language reference, 0.46 MB of English that ships with every CPython."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def text_files(path: str | Path, held_out: str = "") -> list[Path]:
    """Return the sorted files that match a path like `DataConfig.path`; several links to one file count once.

    held_out: excludes the files that match this path, and copies of them. Empty: excludes none.

    Raises UsageError if a part of the path matches no file, or no file is left.
    """
    files = matching_files(path)
    return without_copies(files, matching_files(held_out), path) if held_out else files


def matching_files(path: str | Path, suffixes: Collection[str] = (".txt",)) -> list[Path]:
    """Return the sorted files that match a path; of a directory, those with one of the suffixes.

    Raises UsageError if a part of the path matches no file.
    """
    path = os.path.expanduser(path)
    if os.path.isfile(path):  # its name may contain a comma or a star
        return [Path(path)]
    files: list[Path] = []
    parts = [path] if os.path.isdir(path) else [part.strip() for part in path.split(",")]
    for part in map(os.path.expanduser, parts):
        if is_store(part):
            raise UsageError(
                f"{part}: is a token store, which only --data_path of pretrain.py, evaluate.py and finetune.py "
                "--format=text reads, without --extend_vocabulary; give text files"
            )
        found = [file for file in match_part(part, suffixes) if file.is_file()]
        if not found:
            kinds = ", ".join(suffixes)
            problem = f"the directory has no {kinds} file" if os.path.isdir(part) else "no such file"
            raise UsageError(
                f"{part or path}: {problem}; give a file, a directory of {kinds} files, a pattern, or several of these "
                "separated by commas"
            )
        files += found
    return unique_files(files)


def match_part(part: str, suffixes: Collection[str]) -> list[Path]:
    if os.path.isdir(part):
        return files_of_kind(part, suffixes)
    return [Path(name) for name in ([part] if os.path.isfile(part) else glob.glob(part, recursive=True))]


def load_text(path: str, held_out: str = "") -> str:
    """Read `text_files` and join them with line ends. An empty `path` gives the built-in corpus."""
    return "\n".join(map(read_text, text_files(path, held_out))) if path else builtin_text()


def make_tokenizer(text: str, config: DataConfig) -> TextTokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    return CharTokenizer.from_text(text, clean=config.clean)


def map_bytes(path: str | Path) -> MappedBytes:
    """Memory-map a file as `MappedBytes`: uint8 [N]. Raises UsageError if it is missing or empty."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a file to read as bytes")
    if not path.stat().st_size:
        raise UsageError(f"{path}: the file is empty; give a file with text")
    return MappedBytes(path)


def load_bytes(path: str | Path, held_out: str = "") -> np.ndarray:
    """Return the bytes of `text_files`, joined with line ends; a single file is memory-mapped."""
    first, *others = map(map_bytes, text_files(path, held_out))
    line_end = np.frombuffer(b"\n", np.uint8)
    return np.concatenate([first, *(part for other in others for part in (line_end, other))]) if others else first


def load_tokens(config: DataConfig, tokenizer: TextTokenizer | None = None) -> tuple[np.ndarray, TextTokenizer]:
    """Return the tokens [N] of the text at `config.path`, and the given tokenizer or the one of `config`.

    Excludes the validation files at `config.valid_path` and copies of them. Bytes are memory-mapped and keep their line
    ends; other tokens have the smallest type of uint8, uint16 and int32 that fits the vocabulary.

    Raises UsageError if cleaning removes all characters.
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
            f"{config.path}: cleaning removes all {len(text):,} characters; give a text in the letters a to z, or a "
            "vocabulary with clean=False"
        )
    highest = 255 if tokenizer.kind == "byte" else tokenizer.vocab_size - 1
    smallest = next((t for t in (np.uint8, np.uint16) if highest <= np.iinfo(t).max), np.int32)
    return tokens.astype(smallest), tokenizer


def load_splits(config: DataConfig, tokenizer: TextTokenizer | None = None) -> tuple[np.ndarray, Splits, TextTokenizer]:
    """Return the tokens of the text at `config.path`, their splits, and the tokenizer; see `load_tokens`.

    Logs a warning if the validation text repeats the training text.
    """
    tokens, tokenizer = load_tokens(config, tokenizer)
    if config.valid_path:
        valid, _ = load_tokens(dataclasses.replace(config, path=config.valid_path, valid_path=""), tokenizer)
        splits = Splits(tokens, valid, tokens[:0])
        if problem := shortage(splits, config):
            raise UsageError(f"{problem}; {ADVICE}")
    else:
        splits = split_tokens(tokens, config)
    warn_of_repeats(splits.train, splits.valid, config.valid_path or config.path or "the built-in text")
    return tokens, splits, tokenizer


def split_tokens(tokens: np.ndarray, config: DataConfig) -> Splits:
    """Split a text by `config.split`: at `train_fraction` of its tokens, or as enwik8 (90M / 5M / 5M tokens).

    Raises UsageError if a part is too short.
    """
    n_tokens = len(tokens)
    if config.split == "enwik8":
        if n_tokens != sum(ENWIK8_SPLIT):
            raise UsageError(
                f"split='enwik8' requires exactly {sum(ENWIK8_SPLIT):,} tokens, but the text has {n_tokens:,}; give "
                "enwik8 or text8 with tokenizer='byte', or choose split='fraction'"
            )
        n_train, n_valid, _ = ENWIK8_SPLIT
    else:
        n_train = int(n_tokens * config.train_fraction)
        n_valid = n_tokens - n_train
    splits = Splits(tokens[:n_train], tokens[n_train : n_train + n_valid], tokens[n_train + n_valid :])
    if problem := shortage(splits, config):
        another_would_do = n_tokens >= config.block_size + 1 + MIN_VALID
        if config.split == "fraction" and another_would_do:
            wrong = "large" if n_valid < MIN_VALID else "small"
            raise UsageError(
                f"train_fraction={config.train_fraction} is too {wrong} for {n_tokens:,} tokens: {problem}"
            )
        cleaned = " after cleaning" if config.clean else ""
        raise UsageError(f"the text has {n_tokens:,} tokens{cleaned}, and {problem}; {ADVICE}")
    return splits


def shortage(splits: Splits, config: DataConfig) -> str:
    """Return a message that names the part with too few tokens; empty if both parts are long enough."""
    needed = config.block_size + 1
    if len(splits.train) < needed:
        return f"{len(splits.train):,} training tokens are too few (block_size={config.block_size} requires {needed:,})"
    if len(splits.valid) < MIN_VALID:
        return f"{len(splits.valid)} validation tokens are too few (validation requires {MIN_VALID})"
    return ""
