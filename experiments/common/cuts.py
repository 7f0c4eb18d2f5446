"""Where a model ends its groups over a text, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common.surprise import token_names
from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.cuts import boundaries_of_rows
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.tokenizers import TextTokenizer

HEADER = "position\tcharacter\tlevels\n"


def write_boundaries(path: Path, model: HourglassLM, batches: Sequence[Batch], tokenizer: TextTokenizer) -> None:
    """A line for each character that the predictions in `batches` are made at, tab-separated.

    Positions count from 0; levels: how many shortenings, outermost first, end a group there. A window begins anew, so
    its first character ends one of each. Raises UsageError for a model that shortens nowhere.
    """
    if model.config.parsed_hierarchy.total_factor == 1:
        raise UsageError(f"--boundaries: hierarchy='{model.config.hierarchy}' shortens nowhere; leave it out")
    names, position = token_names(tokenizer), 0
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(HEADER)
        for tokens, weights in batches:
            levels, counted = boundaries_of_rows(model, tokens[:, :-1]).sum(axis=1), weights > 0
            for token, n in zip(tokens[:, :-1][counted].tolist(), levels[counted].tolist(), strict=True):
                file.write(f"{position}\t{names[token]}\t{n}\n")
                position += 1
