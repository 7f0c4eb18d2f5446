"""Where a model's groups end in a text: a file of them, their mean length, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from experiments.common.characters import token_names
from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.files import whole_file
from hourglass_jax.inspection import boundaries_of_rows, count_groups
from hourglass_jax.nn.learned import LearnedBoundaries
from hourglass_jax.tokenizers import TextTokenizer
from hourglass_jax.training.hooks import MAX_SUPPRESSED

HEADER = "position\tcharacter\tlevels\n"


def write_boundaries(path: Path, model: HourglassLM, batches: Sequence[Batch], tokenizer: TextTokenizer) -> None:
    """Write a tab-separated line for each input character of `batches`: position from 0, character, levels.

    levels: the number of shortenings, outermost first, that end a group there; all of them at a window's start.
    Raises UsageError for a model without shortening.
    """
    if model.config.parsed_hierarchy.total_factor == 1:
        raise UsageError(
            f"--boundaries: hierarchy='{model.config.hierarchy}' has no shortening; leave --boundaries out"
        )
    names, position = token_names(tokenizer), 0
    with whole_file(path) as file:
        file.write(HEADER.encode())
        for tokens, weights in batches:
            levels, counted = boundaries_of_rows(model, tokens[:, :-1]).sum(axis=1), weights > 0
            for token, n in zip(tokens[:, :-1][counted].tolist(), levels[counted].tolist(), strict=True):
                file.write(f"{position}\t{names[token]}\t{n}\n".encode())
                position += 1


def describe_groups(model: HourglassLM, tokens: np.ndarray, weights: np.ndarray) -> str:
    """Return the mean group length over a batch's complete rows; empty for fixed groups."""
    rows = tokens[weights.all(axis=1), :-1]
    if not model.config.event_levels or not len(rows):
        return ""
    return f", groups of {count_groups(model, rows).length:.1f} tokens"


def check_groups(model: HourglassLM, tokens: np.ndarray, weights: np.ndarray) -> None:
    """Warn if more than MAX_SUPPRESSED of the boundaries are suppressed. Raises UsageError if there are none.

    Learned boundaries are skipped: `fit` warns during training.
    """
    config, rows = model.config, tokens[weights.all(axis=1), :-1]
    if not config.event_levels or not len(rows) or isinstance(model.hourglass.boundaries, LearnedBoundaries):
        return
    counts = count_groups(model, rows)
    if counts.groups <= len(rows):  # the first token of each row always ends a group
        raise UsageError(
            f"boundaries={config.boundaries!r} end no group in {counts.tokens} tokens of the text; choose other "
            "boundaries, or 'fixed'"
        )
    if counts.suppressed > MAX_SUPPRESSED:
        logging.warning(
            "%.1f %% of the boundaries are suppressed for lack of room; groups have %.1f tokens, so choose a smaller "
            "factor than that of hierarchy='%s', or a larger boundary_slack",
            100 * counts.suppressed,
            counts.length,
            config.hierarchy,
        )
