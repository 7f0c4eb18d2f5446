"""Unknown characters of a text, and a model's surprise at each character."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx

from hourglass_jax import Evaluation, HourglassLM, UsageError, score
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.files import whole_file
from hourglass_jax.tokenizers import CharTokenizer, TextTokenizer, clean

HEADER = "position\tcharacter\tnats\tbits\n"
MAX_UNKNOWN = 0.1  # share of a text
N_SHOWN = 5


def check_characters(text: str, tokenizer: TextTokenizer, name: str, *, allow_unknown: bool = False) -> int:
    """Return the number of characters in `text` that become <UNK>, and warn of the most frequent ones.

    Raises UsageError if they exceed MAX_UNKNOWN of the text, unless `allow_unknown`. name: of the text, for messages.
    """
    if not isinstance(tokenizer, CharTokenizer) or not (unknown := tokenizer.unknown(text)):
        return 0
    text = clean(text) if tokenizer.clean else text
    counts = Counter(text)
    counts = Counter({character: counts[character] for character in unknown})
    share = counts.total() / len(text)
    shown = ", ".join(f"{character!r} {count:,} times" for character, count in counts.most_common(N_SHOWN))
    message = (
        f"{name}: {counts.total():,} of {len(text):,} characters ({100 * share:.3g} %) are not in the vocabulary and "
        f"become <UNK>: {shown}{', ...' if len(counts) > N_SHOWN else ''}"
    )
    if share > MAX_UNKNOWN and not allow_unknown:
        raise UsageError(f"{message}; give another text, fine-tune with --extend_vocabulary, or pass --allow_unknown")
    logging.warning("%s", message)
    return counts.total()


def write_surprise(path: Path, model: HourglassLM, batches: Sequence[Batch], tokenizer: TextTokenizer) -> Evaluation:
    """Write a tab-separated line for each prediction in `batches`, and return their mean loss.

    Positions start at 1, since the first character is not predicted. Characters and bytes are escaped as in Python.
    """
    names, compiled = token_names(tokenizer), nnx.jit(score)
    position, loss = 0, 0.0
    with whole_file(path) as file:
        file.write(HEADER.encode())
        for tokens, weights in batches:
            counted = weights > 0
            nats = -np.asarray(compiled(model, tokens), np.float64)[counted]
            for token, surprise in zip(tokens[:, 1:][counted].tolist(), nats.tolist(), strict=True):
                position += 1
                line = f"{position}\t{names[token]}\t{surprise:.6f}\t{surprise / math.log(2):.6f}\n"
                file.write(line.encode())
            loss += nats.sum()
    return Evaluation(loss / position, position)


def score_documents(
    model: HourglassLM, batches: Sequence[Batch], tokens: np.ndarray, ends: np.ndarray, excluded: Sequence[int]
) -> tuple[Evaluation, float]:
    """Return the mean loss of all predictions, and the mean over documents of their bits per prediction.

    batches: each of tokens[1:] predicted once, in order. ends: int [D], as of a `StoredTokens`. Predictions of the
    excluded tokens do not count.
    """
    compiled = nnx.jit(score)
    nats = np.concatenate([-np.asarray(compiled(model, windows))[weights > 0] for windows, weights in batches])
    counted = np.flatnonzero(~np.isin(tokens[1:], excluded))
    document = np.searchsorted(ends, counted + 1, "right")
    totals, counts = np.bincount(document, nats[counted]), np.bincount(document)
    means = totals[counts > 0] / counts[counts > 0]
    return Evaluation(float(totals.sum() / counts.sum()), len(counted)), float(means.mean()) / math.log(2)


def token_names(tokenizer: TextTokenizer) -> list[str]:
    """Return the name of each token, escaped as in Python."""
    if isinstance(tokenizer, CharTokenizer):
        return [*tokenizer.SPECIALS, *(repr(character)[1:-1] for character in tokenizer.characters)]
    specials = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"}
    return [specials.get(i) or repr(bytes([i]))[2:-1] for i in range(tokenizer.vocab_size)]
