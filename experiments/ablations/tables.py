"""The tables of the ablations: TOML files in definitions/, each with the columns of a table by data set; and M1, M2.

A row gives options of HourglassConfig, over the column's `options`, and the paper's figures. A row without a hierarchy
is a model of another paper. A note states our choices where the paper leaves them open. To add a table, add a file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.ablations.recipe_tables import table_m1, table_m2
from experiments.ablations.table import Row, Table
from hourglass_jax import UsageError
from hourglass_jax.ranges import check_choice
from hourglass_jax.registry import SHORTENINGS, UPSAMPLINGS

DIRECTORY = Path(__file__).with_name("definitions")
BUILT_IN = frozenset(SHORTENINGS) | frozenset(UPSAMPLINGS)


def read_row(name: str, fields: dict[str, Any], shared: Mapping[str, Any]) -> Row:
    paper, factors, optimizer = fields.pop("paper", {}), tuple(fields.pop("factors", ())), fields.pop("optimizer", {})
    return Row(name, {**shared, **fields} if fields else None, paper, factors, optimizer)


def read_tables() -> dict[tuple[str, str], Table]:
    """Return the tables by number and data set."""
    tables = {}
    for path in sorted(DIRECTORY.glob("*.toml")):
        for dataset, fields in tomllib.loads(path.read_text(encoding="utf-8")).items():
            shared = fields.pop("options", {})
            rows = tuple(read_row(name, row, shared) for name, row in fields.pop("rows").items())
            tables[path.stem, dataset] = Table(path.stem, dataset, rows=rows, **fields)
    return tables


TABLES = read_tables() | {(table.number, table.dataset): table for table in (table_m1(), table_m2())}
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
