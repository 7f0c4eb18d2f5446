"""Three-line haiku: parsing, encoding as training examples, recognition in samples."""

from __future__ import annotations

import re
from importlib import resources
from typing import TypeVar

import numpy as np
from absl import logging

from hourglass_jax.data.corpora import read_text
from hourglass_jax.data.files import warn_once
from hourglass_jax.data.pipeline import Batch, pack_examples
from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import TextTokenizer

Item = TypeVar("Item")


def parse_haiku(text: str, source: str) -> list[str]:
    """Parse haiku of three lines each, with or without blank lines between them. Errors name `source`."""
    blocks = [[line.strip() for line in block.split("\n")] for block in re.split(r"\n\s*\n", text.strip())]
    if len(blocks) == 1:
        [lines] = blocks
        blocks = [lines[i : i + 3] for i in range(0, len(lines), 3)]
    for i, block in enumerate(blocks, 1):
        if len(block) != 3 or not all(block):
            raise UsageError(f"{source}: haiku {i} ({block[0]!r}) has {len(block)} lines; give haiku of three lines")
    return ["\n".join(block) for block in blocks]


def load_haiku(path: str) -> list[str]:
    """Read the haiku in the file at `path`; an empty `path` gives the built-in ones."""
    if path:
        return parse_haiku(read_text(path), path)
    packaged = resources.files("hourglass_jax.data") / "haiku.txt"
    return parse_haiku(packaged.read_text(encoding="utf-8"), "the built-in haiku")


def encode_haiku(haiku: str, tokenizer: TextTokenizer, form: str = "haiku") -> tuple[np.ndarray, int]:
    """Encode BOS, three lines and EOS. Return also the index of the first token with loss.

    form: haiku (loss on all tokens after BOS) | prompt (loss from the second line).
    """
    first_line = tokenizer.encode(haiku.split("\n")[0] + "\n")
    tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(haiku), [tokenizer.eos_id]])
    return tokens, 1 + len(first_line) if form == "prompt" else 1


def usable_haiku(haiku: list[str], tokenizer: TextTokenizer, block_size: int) -> list[str]:
    """Return the haiku that fit a block and have no empty line after cleaning; log the number of others."""
    kept = [
        poem
        for poem in haiku
        if len(encode_haiku(poem, tokenizer)[0]) <= block_size + 1
        and all(len(tokenizer.encode(line)) for line in poem.split("\n"))
    ]
    if len(kept) < len(haiku):
        logging.warning("%d of %d haiku excluded: too long, or with an empty line", len(haiku) - len(kept), len(haiku))
    return kept


def without_held_out(train: list[Item], valid: list[Item], name: str = "haiku") -> list[Item]:
    """Return the training items that are not in `valid`; log how many are. Raises UsageError if none is left.

    name: of the items, for messages.
    """
    held_out = set(valid)
    kept = [item for item in train if item not in held_out]
    if train and not kept:
        raise UsageError(
            f"all training {name} are also for validation; give different ones for training and validation"
        )
    if len(kept) < len(train):
        warn_once(f"{len(train) - len(kept)} of {len(train)} training {name} excluded, used for validation")
    return kept


def make_examples(haiku: list[str], tokenizer: TextTokenizer, form: str) -> Batch:
    sequences, loss_from = zip(*(encode_haiku(poem, tokenizer, form) for poem in haiku), strict=True)
    return pack_examples(sequences, loss_from, tokenizer.eos_id)


def is_haiku(text: str, n_lines: int = 3) -> bool:
    """Return whether `text` consists of exactly `n_lines` non-empty lines."""
    lines = text.split("\n")
    return len(lines) == n_lines and all(map(str.strip, lines))
