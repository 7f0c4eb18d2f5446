"""What a model that sees both sides shows of itself: a text with gaps, filled in."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from hourglass_jax import HourglassLM
from hourglass_jax.masking import corrupt
from hourglass_jax.tokenizers import TextTokenizer

GAP = "_"


def make_filler(tokenizer: TextTokenizer, text: np.ndarray, seed: int) -> tuple[str, Callable[[HourglassLM], str]]:
    """Of `text` int [L]: a heading, which has it with gaps, and the function that lets a model fill them in."""
    mask_token = tokenizer.vocab_size
    [chosen] = np.asarray(corrupt(text[None], jax.random.key(seed), mask_token)[1])
    read = np.where(chosen, mask_token, text)[None]

    def fill(model: HourglassLM) -> str:
        [logits] = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, read))
        return tokenizer.decode(np.where(chosen, logits[:, :mask_token].argmax(-1), text))

    first, *others = np.split(text, np.flatnonzero(chosen))  # each of the others begins with a gap
    gapped = GAP.join([tokenizer.decode(first), *(tokenizer.decode(piece[1:]) for piece in others)])
    return f"{gapped!r} is filled in:\n", fill
