"""A table of an ablation: rows of configurations with the published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNITS = {"bpc": "bits per character", "bpd": "bits/dim", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    name: the value of the varied option.
    options: of HourglassConfig, which override those of the setup; None for models of other papers.
    paper: the paper's figures by name; 'bpc', 'bpd' or 'accuracy' first, if any.
    factors: shorten factors drawn in training (section 4.1), each with a figure, e.g. 'bpc at k=2'.
    optimizer: of OptimizerConfig, which override those of the setup.
    """

    name: str
    options: Mapping[str, Any] | None
    paper: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[int, ...] = ()
    optimizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One table, or its column for one data set.

    metric: a key of UNITS.
    baseline: name of the row that is trained with several seeds.
    model, warmup_steps, steps: overrides of the paper's setup for this table.
    seeds: minimum number of seeds of every row.
    published: figures of other papers by column, then by row, also of rows that this table lacks.
    """

    number: str
    dataset: str
    title: str
    varied: str
    metric: str
    rows: tuple[Row, ...]
    baseline: str
    note: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    steps: int = 0
    seeds: int = 1
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def resampling(shortening: str = "attention_average", upsampling: str = "attention_repeat") -> dict[str, str]:
    return {"shortening": shortening, "upsampling": upsampling}


TEXT = resampling()  # Table 1's parameter counts fit these two
