"""Where a model ends its groups over a text: as a file, in words, and whether that can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from experiments.common.surprise import token_names
from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.cuts import boundaries_of_rows, count_groups
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.files import whole_file
from hourglass_jax.nn.learned import LearnedBoundaries
from hourglass_jax.tokenizers import TextTokenizer
from hourglass_jax.training.trainer import MOST_SUPPRESSED

HEADER = "position\tcharacter\tlevels\n"


def write_boundaries(path: Path, model: HourglassLM, batches: Sequence[Batch], tokenizer: TextTokenizer) -> None:
    """A line for each character that the predictions in `batches` are made at, tab-separated.

    Positions count from 0; levels: how many shortenings, outermost first, end a group there. A window begins anew, so
    its first character ends one of each. Raises UsageError for a model that shortens nowhere.
    """
    if model.config.parsed_hierarchy.total_factor == 1:
        raise UsageError(f"--boundaries: hierarchy='{model.config.hierarchy}' shortens nowhere; leave it out")
    names, position = token_names(tokenizer), 0
    with whole_file(path) as file:
        file.write(HEADER.encode())
        for tokens, weights in batches:
            levels, counted = boundaries_of_rows(model, tokens[:, :-1]).sum(axis=1), weights > 0
            for token, n in zip(tokens[:, :-1][counted].tolist(), levels[counted].tolist(), strict=True):
                file.write(f"{position}\t{names[token]}\t{n}\n".encode())
                position += 1


def describe_groups(model: HourglassLM, tokens: np.ndarray, weights: np.ndarray) -> str:
    """How long the groups are that a batch's whole rows make, where events end them; empty otherwise."""
    rows = tokens[weights.all(axis=1), :-1]
    if not model.config.event_levels or not len(rows):
        return ""
    return f", groups of {count_groups(model, rows).length:.1f} tokens"


def check_groups(model: HourglassLM, tokens: np.ndarray, weights: np.ndarray) -> None:
    """Warns where more than one event in a hundred has to wait; raises UsageError where the text has none.

    Of learned boundaries training has yet to decide: `fit` warns.
    """
    config, rows = model.config, tokens[weights.all(axis=1), :-1]
    if not config.event_levels or not len(rows) or isinstance(model.hourglass.boundaries, LearnedBoundaries):
        return
    counts = count_groups(model, rows)
    if counts.groups <= len(rows):  # the first token of each row always ends one
        raise UsageError(
            f"boundaries={config.boundaries!r} end no group in {counts.tokens} tokens of the text; choose others, or "
            "fixed"
        )
    if counts.suppressed > MOST_SUPPRESSED:
        logging.warning(
            "%.1f %% of the groups' ends find no room and wait for the next; groups have %.1f tokens, so choose a "
            "smaller factor than that of hierarchy='%s', or a larger boundary_slack",
            100 * counts.suppressed,
            counts.length,
            config.hierarchy,
        )
