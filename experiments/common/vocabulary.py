"""Characters that a vocabulary lacks."""

from __future__ import annotations

from collections import Counter

from absl import logging

from hourglass_jax import UsageError
from hourglass_jax.tokenizers import CharTokenizer, TextTokenizer, clean

MAX_UNKNOWN = 0.1  # share of a text; beyond it, a model learns or tells nothing about the text
N_SHOWN = 5


def check_characters(text: str, tokenizer: TextTokenizer, name: str, *, allow_unknown: bool = False) -> int:
    """The number of characters in `text` that count as <UNK>; warns of them by their share and the most frequent.

    Raises UsageError where they are more than a tenth, unless they are allowed. `name` is what messages call the text.
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
        f"count as <UNK>: {shown}{', ...' if len(counts) > N_SHOWN else ''}"
    )
    if share > MAX_UNKNOWN and not allow_unknown:
        raise UsageError(
            f"{message}; give a text in the vocabulary's characters, fine-tune with --extend_vocabulary, or pass "
            "--allow_unknown"
        )
    logging.warning("%s", message)
    return counts.total()
