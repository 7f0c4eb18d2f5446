"""The tables of the ablations: TOML files in definitions/, each with the columns of a table by data set.

A row gives options of HourglassConfig, over the column's `options`, and the paper's figures. A row without a hierarchy
is a model of another paper. A note states our choices where the paper leaves them open. To add a table, add a file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hourglass_jax import UsageError
from hourglass_jax.ranges import check_choice
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS

DIRECTORY = Path(__file__).with_name("definitions")
UNITS = {"bpc": "bits per character", "bpd": "bits/dim", "accuracy": "accuracy"}
BUILT_IN = frozenset(SHORTENINGS) | frozenset(UPSAMPLINGS)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    name: the value of the varied option.
    options: of HourglassConfig, which override those of the setup; None for models of other papers.
    paper: the paper's figures by name; 'bpc', 'bpd' or 'accuracy' first, if any.
    factors: shorten factors drawn in training (section 4.1), each with a figure, e.g. 'bpc at k=2'.
    """

    name: str
    options: Mapping[str, Any] | None
    paper: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[int, ...] = ()


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


def read_row(name: str, fields: dict[str, Any], shared: Mapping[str, Any]) -> Row:
    paper, factors = fields.pop("paper", {}), tuple(fields.pop("factors", ()))
    return Row(name, {**shared, **fields} if fields else None, paper, factors)


def read_tables() -> dict[tuple[str, str], Table]:
    """Return the tables by number and data set."""
    tables = {}
    for path in sorted(DIRECTORY.glob("*.toml")):
        for dataset, fields in tomllib.loads(path.read_text(encoding="utf-8")).items():
            shared = fields.pop("options", {})
            rows = tuple(read_row(name, row, shared) for name, row in fields.pop("rows").items())
            tables[path.stem, dataset] = Table(path.stem, dataset, rows=rows, **fields)
    return tables


TABLES = read_tables()
TABLE_1 = TABLES["1", "enwik8"]


def find_table(number: str, dataset: str) -> Table:
    """Return a table by its number; text8 uses enwik8's. Plugins add rows: upsamplings to Table 7, shortenings to 8.

    Raises UsageError for an unknown number or data set.
    """
    check_choice("table", number, sorted({number for number, _ in TABLES}))
    column = "enwik8" if dataset == "text8" else dataset
    columns = [name for known, name in TABLES if known == number]
    if column not in columns:
        raise UsageError(f"table {number} has no column for dataset={dataset!r}; choose one of {', '.join(columns)}")
    table = TABLES[number, column]
    methods = [method for method in {"7": UPSAMPLINGS, "8": SHORTENINGS}.get(number, ()) if method not in BUILT_IN]
    own = (Row(method, {**(table.rows[0].options or {}), table.varied: method}) for method in methods)
    return replace(table, rows=(*table.rows, *own))
