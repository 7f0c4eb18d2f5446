"""Where a model ends its groups, and how many."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import Array, check_tokens
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM


class GroupCounts(NamedTuple):
    """Tokens, groups of the first shortening, and how many there would be without a limit."""

    tokens: int
    groups: int
    wanted: int

    @property
    def length(self) -> float:
        """Mean tokens of a group."""
        return self.tokens / self.groups

    @property
    def suppressed(self) -> float:
        """The share of the events that did not fire, for lack of room."""
        return 1 - self.groups / self.wanted


@jax.jit
def _groups(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> list[tuple[jax.Array, ...]]:
    model = nnx.merge(graph, params)
    every = model.hourglass.forward(model.embed(tokens), tokens=tokens)[1]
    return [tuple(jnp.broadcast_to(x, (len(tokens), *x.shape[1:])) for x in (g.when, g.count, g.wanted)) for g in every]


def group_ends(model: HourglassLM, tokens: Array) -> np.ndarray:
    """Return where each shortening ends a group: int [L] -> bool [S, L], outermost first.

    At such a token the deeper level computes one vector, which serves from there on. Raises UsageError for tokens
    outside the vocabulary.
    """
    tokens = check_tokens("tokens", tokens, model.config.vocab_size, "L")
    return boundaries_of_rows(model, np.asarray(tokens)[None])[0]


def boundaries_of_rows(model: HourglassLM, tokens: Array) -> np.ndarray:
    """As `group_ends`, each row by itself: int [B, L] -> bool [B, S, L]."""
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "B, L"))
    every = [(np.asarray(when), np.asarray(count)) for when, count, _ in _groups(*nnx.split(model), tokens)]
    ends = np.zeros((len(tokens), len(every), tokens.shape[1]), bool)
    for row, of_row in enumerate(ends):
        places = np.arange(tokens.shape[1])
        for level, (when, count) in enumerate(every):
            first = when[row, : count[row]]
            places = places[first[first < len(places)]]  # beyond, there is room for more
            of_row[level, places] = True
    return ends


def count_groups(model: HourglassLM, tokens: Array) -> GroupCounts:
    """Of the first shortening, for rows of tokens int [B, L]. Raises UsageError for a model that shortens nowhere."""
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "B, L"))
    first, *_ = _groups(*nnx.split(model), tokens) or [None]
    if first is None:
        raise UsageError(f"hierarchy='{model.config.hierarchy}' shortens nowhere; there are no groups to count")
    return GroupCounts(tokens.size, int(first[1].sum()), int(first[2].sum()))
