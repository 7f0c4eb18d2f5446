"""Readers of text: a UTF-8 file, the built-in corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hourglass_jax.config import DataConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, line ends as "\\n". Raises UsageError where it is missing, empty or not UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a UTF-8 text file")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}: not UTF-8 at byte {error.start} (line {line}: byte 0x{raw[error.start]:02x}); convert it first"
        ) from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
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


def make_tokenizer(text: str, config: DataConfig) -> Tokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    return CharTokenizer.from_text(text, clean=config.clean)


def split_tokens(tokens: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The first `train_fraction` of a text for training, the rest for validation."""
    cut = int(len(tokens) * config.train_fraction)
    train, valid = tokens[:cut], tokens[cut:]
    needed = config.block_size + 1
    if len(train) < needed or len(valid) < 2:
        raise UsageError(
            f"the text has {len(tokens)} tokens, {len(train)} of them for training, but one block takes {needed} "
            f"(block_size={config.block_size} and the next); give a longer text or a smaller block_size"
        )
    return train, valid
