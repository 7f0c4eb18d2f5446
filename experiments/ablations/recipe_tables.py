"""Tables M1 and M2, which are not in the paper: what each change of the modern recipe gives, and hierarchies under it.

All rows have the rate of the scale's setup. Plain transformers and Hourglasses have the same n-gram tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.ablations.table import TEXT, Row, Table, resampling
from hourglass_jax.recipes import RECIPES, Recipe

MODERN = RECIPES["modern"]
LIGHT = resampling("average", "repeat")
PLAIN, HOURGLASS = TEXT | {"hierarchy": "6@1"}, LIGHT | {"hierarchy": "2@1 4@4 2@1"}
CHANGES = {name: Recipe({name: value}, {}) for name, value in MODERN.model.items()}
CHANGES |= {value: Recipe({}, {name: value}) for name, value in MODERN.optimizer.items()}


def modern_row(name: str, options: Mapping[str, Any]) -> Row:
    return Row(name, {**options, **MODERN.model}, optimizer=MODERN.optimizer)


def rows_of_changes(options: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a model with the paper's recipe, with each change alone, with all, and with all but each."""
    hierarchy = options["hierarchy"]
    yield Row(f"{hierarchy}, paper", options)
    for name, change in CHANGES.items():
        yield Row(f"{hierarchy}, {name}", {**options, **change.model}, optimizer=change.optimizer)
    yield modern_row(f"{hierarchy}, modern", options)
    for name, change in CHANGES.items():
        model = {option: value for option, value in MODERN.model.items() if option not in change.model}
        optimizer = {option: value for option, value in MODERN.optimizer.items() if option not in change.optimizer}
        yield Row(f"{hierarchy}, modern without {name}", {**options, **model}, optimizer=optimizer)


def table_m1() -> Table:
    rows = (*rows_of_changes(PLAIN), *rows_of_changes(HOURGLASS))
    note = "All rows have the same learning rate, batches and number of steps; the Hourglass averages and repeats."
    return Table("M1", "enwik8", "Changes of the modern recipe", "change", "bpc", rows, "6@1, modern", note)


def table_m2() -> Table:
    wide = {"d_model": (64, 96), "n_heads": (2, 3), "d_ff": (256, 384)}
    wider = {"d_model": (64, 128), "n_heads": (2, 4), "d_ff": (256, 512)}
    router = resampling("select", "smooth") | {"boundaries": "router"}  # as in H-Net
    hierarchies = {
        "2@1 2@4 2@1 light": LIGHT | {"hierarchy": "2@1 2@4 2@1"},
        "2@1 4@4 2@1 light": HOURGLASS,
        "2@1 4@3 2@1 light": LIGHT | {"hierarchy": "2@1 4@3 2@1"},
        "2@1 4@3 2@1 attention": TEXT | {"hierarchy": "2@1 4@3 2@1"},
        "2@1 4@6 2@1 whitespace": LIGHT | {"hierarchy": "2@1 4@6 2@1", "boundaries": "whitespace"},
        "2@1 4@6 2@1 router": router | {"hierarchy": "2@1 4@6 2@1"},
        "2@1 4@4 2@1 light, 64/96": HOURGLASS | wide,
        "2@1 4@4 2@1 light, 64/128": HOURGLASS | wider,
    }
    plain = [modern_row(name, TEXT | {"hierarchy": name}) for name in ("4@1", "6@1", "8@1", "10@1")]
    rows = (*plain, *(modern_row(name, options) for name, options in hierarchies.items()))
    note = (
        "All rows have the modern recipe. 'plain, equal FLOPs' is what a plain transformer of that cost reaches, "
        "between the two depths around it in the logarithm of the cost. 64/96 are the widths of the two levels. Table "
        "1 has the paper's recipe."
    )
    return Table("M2", "enwik8", "Plain transformers and hierarchies", "model", "bpc", rows, "6@1", note)
