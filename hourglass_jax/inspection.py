"""Inspect a model: a table of its levels, and the ends of its groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import Array, check_tokens
from hourglass_jax.config import HourglassConfig
from hourglass_jax.costs import forward_flops, head_flops, level_lengths
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM, n_parameters
from hourglass_jax.nn.attention.choice import describe
from hourglass_jax.ranges import check_range
from hourglass_jax.run_config import OptimizerConfig
from hourglass_jax.training.optimizer import describe_optimizer

HEADER = ("", "factor", "layers", "length", "parameters", "forward MFLOPs")


class Row(NamedTuple):
    """A row of the table; `layers` counts the layers before + after the deeper levels."""

    name: str
    factor: str
    layers: str
    length: int
    parameters: int
    flops: float

    def cells(self) -> tuple[str, ...]:
        figures = f"{self.length:,}", f"{self.parameters:,}", f"{self.flops / 1e6:,.1f}"
        return self.name, self.factor, self.layers, *figures


def summary(
    model: HourglassLM | HourglassConfig, length: int | None = None, *, optimizer: OptimizerConfig | None = None
) -> str:
    """Return a table of the levels of a model, or of a configuration without building its model (section 2).

    length: sequence length in tokens; default: `max_length`.
    optimizer: adds a line with the FLOPs of its matrix products in a step and the size of its state.

    The lines before the table show the model and its attention implementation on this platform. Columns of a level:
    factor in tokens per position; layers before + after the deeper levels; positions of a sequence (the capacity, for
    variable groups); parameters; millions of FLOPs of a forward pass, see `costs.forward_flops`. Shortening and
    upsampling count with the deeper level.

    Raises UsageError for a length below 1 or beyond learned positions, and for an optimizer that does not fit.
    """
    if isinstance(model, HourglassConfig):
        config = model
        model = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    length = model.config.max_length if length is None else length
    check_range("length", length, 1, model.config.position_limit)
    lines = [HEADER, *(row.cells() for row in summary_rows(model, length))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if optimizer:
        table.append(describe_optimizer(optimizer, nnx.state(model)))
    return "\n".join([repr(model), describe(model.config), *table])


def summary_rows(model: HourglassLM, length: int) -> Iterator[Row]:
    """Yield the rows for the embedding, the levels from the tokens inward, the head and the total."""
    config = model.config
    flops = forward_flops(config, length)
    total = Row("total", "", "", length, n_parameters(model), sum(flops.values()))
    head = Row("head", "", "", length, n_parameters(model.head) + n_parameters(model.norm), length * head_flops(config))
    flops[1] -= head.flops
    n_embedding = total.parameters - n_parameters(model.hourglass) - head.parameters
    yield Row("embedding", "", "", length, n_embedding, 0)
    levels, lengths = config.parsed_hierarchy.levels, level_lengths(config, length)
    hourglass, shorten = model.hourglass, None
    for level, positions in zip(levels, lengths.values(), strict=True):
        parameters = n_parameters(hourglass) + n_parameters(shorten)
        layers = str(level.pre_layers)
        if hourglass.inner is not None:
            layers += f" + {level.post_layers}"
            hourglass, shorten = hourglass.inner, hourglass.shorten
            parameters -= n_parameters(hourglass) + n_parameters(shorten)
        yield Row("level", str(level.factor), layers, positions, parameters, flops[level.factor])
    yield head
    yield total


class GroupCounts(NamedTuple):
    """Number of tokens, of groups of the first shortening, and of groups without the limit of `boundary_slack`."""

    tokens: int
    groups: int
    wanted: int

    @property
    def length(self) -> float:
        """Mean group length in tokens."""
        return self.tokens / self.groups

    @property
    def suppressed(self) -> float:
        """Share of boundaries dropped because of the limit."""
        return 1 - self.groups / self.wanted


@jax.jit
def _groups(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> list[tuple[jax.Array, ...]]:
    model = nnx.merge(graph, params)
    every = model.hourglass.forward(model.embed(tokens), tokens=tokens)[1]
    return [tuple(jnp.broadcast_to(x, (len(tokens), *x.shape[1:])) for x in (g.when, g.count, g.wanted)) for g in every]


def group_ends(model: HourglassLM, tokens: Array) -> np.ndarray:
    """Return where each shortening ends a group: int [L] -> bool [S, L], outermost first.

    At such a token the deeper level computes one vector, which is used until the next group ends. Raises UsageError for
    tokens outside the vocabulary.
    """
    tokens = check_tokens("tokens", tokens, model.config.vocab_size, "L")
    return boundaries_of_rows(model, np.asarray(tokens)[None])[0]


def boundaries_of_rows(model: HourglassLM, tokens: Array) -> np.ndarray:
    """Apply `group_ends` to each row: int [B, L] -> bool [B, S, L]."""
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "B, L"))
    every = [(np.asarray(when), np.asarray(count)) for when, count, _ in _groups(*nnx.split(model), tokens)]
    ends = np.zeros((len(tokens), len(every), tokens.shape[1]), bool)
    for row, row_ends in enumerate(ends):
        positions = np.arange(tokens.shape[1])
        for level, (when, count) in enumerate(every):
            events = when[row, : count[row]]
            positions = positions[events[events < len(positions)]]  # unused capacity lies beyond the end
            row_ends[level, positions] = True
    return ends


def count_groups(model: HourglassLM, tokens: Array) -> GroupCounts:
    """Count the groups of the first shortening in tokens int [B, L]. Raises UsageError if there is no shortening."""
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "B, L"))
    first, *_ = _groups(*nnx.split(model), tokens) or [None]
    if first is None:
        raise UsageError(f"hierarchy='{model.config.hierarchy}' has no shortening; there are no groups to count")
    return GroupCounts(tokens.size, int(first[1].sum()), int(first[2].sum()))
