"""What a table of an ablation is: rows of configurations, with the published figures beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNITS = {"bpc": "bits per character", "bpd": "bits/dim", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    name: the value of what the table varies.
    options: of HourglassConfig, over those of the data set's set-up; None for models of other papers.
    paper: the paper's figures by name; 'bpc', 'bpd' or 'accuracy' first, where there is one.
    factors: shorten factors to draw from in training (section 4.1); there is a figure at each, 'bpc at k=2'.
    """

    name: str
    options: Mapping[str, Any] | None
    paper: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table, or one data set's column of it.

    metric: a key of UNITS.
    baseline: the name of the row that is trained with several seeds.
    model, warmup_steps, steps: of the paper's set-up, where this table has another than the others of its data set.
    seeds: of every row; the baseline has at least those that are asked for.
    published: of other papers, by column: figures by row, of rows that are theirs alone too.
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
IMAGE = resampling(upsampling="attention_linear")  # the row that Tables 6, 7 and 8 share on CIFAR-10 (3.012)
