"""A model at a glance: what each level has and costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.costs import forward_flops, head_flops, level_lengths
from hourglass_jax.model import HourglassLM, n_parameters
from hourglass_jax.nn.attention.choice import describe
from hourglass_jax.ranges import check_range


class Row(NamedTuple):
    """A line of the table; a level has a factor and its layers before + after the levels within."""

    name: str
    factor: str
    layers: str
    length: int
    parameters: int
    flops: float

    def cells(self) -> tuple[str, ...]:
        figures = f"{self.length:,}", f"{self.parameters:,}", f"{self.flops / 1e6:,.1f}"
        return self.name, self.factor, self.layers, *figures


HEADER = ("", "factor", "layers", "length", "parameters", "forward MFLOPs")


def summary(model: HourglassLM | HourglassConfig, length: int | None = None) -> str:
    """A model, or a configuration without building it, as a table of its levels (section 2 of the paper).

    Before the table: how attention is computed on this platform.

    For each level: its factor in tokens a position, its layers, before + after the levels within, its positions for a
    sequence of `length` tokens (default: `max_length`; of groups of any length all there is room for), its parameters,
    and the millions of floating-point operations of a forward pass over that sequence, those of matrix products; see
    `costs.forward_flops`. A resampling's parameters count with the level that it leads to. The total has all there is.

    Raises UsageError for a length below 1 or beyond learned positions.
    """
    if isinstance(model, HourglassConfig):
        config = model
        model = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    length = model.config.max_length if length is None else length
    check_range("length", length, 1, model.config.position_limit)
    lines = [HEADER, *(row.cells() for row in summary_rows(model, length))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([repr(model), describe(model.config), *table])


def summary_rows(model: HourglassLM, length: int) -> Iterator[Row]:
    """The embedding, the levels from the tokens inwards, the head and the total."""
    config = model.config
    flops = forward_flops(config, length)
    total = Row("total", "", "", length, n_parameters(model), sum(flops.values()))
    head = Row("head", "", "", length, n_parameters(model.head) + n_parameters(model.norm), length * head_flops(config))
    flops[1] -= head.flops
    embedded = total.parameters - n_parameters(model.hourglass) - head.parameters
    yield Row("embedding", "", "", length, embedded, 0)
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
