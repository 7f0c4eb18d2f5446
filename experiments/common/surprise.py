"""The surprise of a model at each character of a text, as a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from hourglass_jax import Evaluation, HourglassLM, score
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.files import whole_file
from hourglass_jax.tokenizers import CharTokenizer, TextTokenizer

HEADER = "position\tcharacter\tnats\tbits\n"


def write_surprise(path: Path, model: HourglassLM, batches: Sequence[Batch], tokenizer: TextTokenizer) -> Evaluation:
    """A line for each prediction in `batches`, tab-separated, and their mean.

    Positions count from 1, since nothing predicts the first character of a text. Characters are escaped as in Python,
    bytes too.
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


def token_names(tokenizer: TextTokenizer) -> list[str]:
    """What the file calls each token."""
    if isinstance(tokenizer, CharTokenizer):
        return [*tokenizer.SPECIALS, *(repr(character)[1:-1] for character in tokenizer.characters)]
    specials = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"}
    return [specials.get(i) or repr(bytes([i]))[2:-1] for i in range(tokenizer.vocab_size)]
