"""Vocabularies of other projects: JSON files of characters after <EOS>, <UNK> and mostly <BOS>."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import CLEAN_CHARACTERS, CharTokenizer


def read_vocabulary(path: str | Path) -> list[str]:
    """Tokens in the order of their ids, from a JSON of token to id, id to token, or tokens in order.

    Raises UsageError where it is none of these, or its ids have gaps.
    """
    try:
        ids = _ids(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{path}: not a vocabulary; needed is a JSON of token to id ({error})") from error
    if sorted(ids.values()) != list(range(len(ids))):
        raise UsageError(f"{path}: the ids of a vocabulary must be 0 to {len(ids) - 1}, each once")
    return sorted(ids, key=ids.__getitem__)


def make_tokenizer(tokens: list[str], path: str | Path) -> CharTokenizer:
    """Of tokens <EOS>, <UNK>, <BOS> and characters; raises UsageError where they are others."""
    specials, characters = tuple(tokens[:3]), tokens[3:]
    if specials != CharTokenizer.SPECIALS:
        raise UsageError(f"{path}: the first tokens must be {', '.join(CharTokenizer.SPECIALS)}, not {specials}")
    return CharTokenizer(characters, clean=set(characters) <= set(CLEAN_CHARACTERS))


def _ids(record: Any) -> dict[str, int]:
    if isinstance(record, list):
        return {token: i for i, token in enumerate(record) if isinstance(token, str)}
    if not isinstance(record, dict):
        raise ValueError("it is neither an object nor a list")
    if "vocabulary" in record:  # as this library writes it
        return _ids(record["vocabulary"])
    if all(isinstance(token, str) for token in record.values()):
        return {token: int(i) for i, token in record.items()}
    if not all(isinstance(i, int) for i in record.values()):
        raise ValueError("ids must be integers")
    return record
