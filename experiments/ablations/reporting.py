"""Report of a table: a JSON record of its runs, and Markdown and a figure rendered from the record."""

from __future__ import annotations

import bz2
import functools
import itertools
import lzma
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.ablations.costs import COST
from experiments.ablations.pictures import PLAIN, Cost, draw, flops, kind, memory_bytes, step_seconds
from experiments.ablations.rows import RESULT, make_job
from experiments.ablations.scales import Setup, for_table
from experiments.ablations.table import UNITS, Row, Table
from experiments.common.reports import markdown_table, page, provenance, publish, read_record, report_file
from hourglass_jax import DataConfig, Hierarchy
from hourglass_jax.costs import count_parameters
from hourglass_jax.data.corpora import map_bytes, split_tokens
from hourglass_jax.training.identity import identity

Record = dict[str, Any]
N_WORST = 6  # listed pairs of rows that contradict the paper's order


def report(table: Table, setup: Setup, directory: Path, path: Path, comment: str | None) -> str:
    """Update PATH.json from the runs in `directory`, render PATH.md and PATH.png, and return the path of PATH.md."""
    trained = any(directory.glob(f"*/*/{RESULT}"))
    setup = for_table(setup, table)
    record = collect(table, setup, directory, path.parent) if trained else read_record(report_file(path, ".json"))
    record = record if record and any(row["runs"] for row in record["rows"]) else None
    return publish(path, record, render, draw, comment)


def collect(table: Table, setup: Setup, directory: Path, results: Path) -> Record:
    """Return the record of a table from the runs in `directory` and the records in `results` of the same setup.

    Stored runs are kept after they are gone from `directory`, also those that another table's record shares.
    """
    facts = setup.facts()
    records = [read_record(path) for path in sorted(results.glob("table*.json"))]
    records = [
        each for each in records if each["data"] == directory.name and identity(each["setup"]) == identity(facts)
    ]
    own = next((record for record in records if record["table"] == table.number), {"rows": []})
    costs = {row["directory"]: row["cost"] for row in own["rows"] if row.get("cost")}
    runs: dict[str, list[Record]] = {}
    for row in itertools.chain.from_iterable(record["rows"] for record in records):
        runs.setdefault(row.get("directory", ""), []).extend(row["runs"])

    def collect_row(row: Row) -> Record:
        found = {"name": row.name, "paper": dict(row.paper), "runs": []}
        if row.options is None:
            return found
        first = make_job(table, row, setup, directory, seed=0)
        place, config = first.directory.parent, first.config
        seeds = {run["seed"]: run for run in runs.get(place.name, [])}
        for path in place.glob(f"seed*/{RESULT}"):
            seed = int(path.parent.name.removeprefix("seed"))
            seeds[seed] = make_job(table, row, setup, directory, seed).result()
        found["directory"] = place.name
        if not seeds:
            return found
        return found | {
            "hierarchy": config.hierarchy,
            "shortening": config.shortening,
            "upsampling": config.upsampling,
            "parameters": count_parameters(config),
            "optimizer": dict(row.optimizer),
            "step_flops": first.step_flops(),
            "cost": read_record(place / COST) or costs.get(place.name),
            "runs": [seeds[seed] for seed in sorted(seeds)],
        }

    return {
        "table": table.number,
        "title": table.title,
        "data": directory.name,
        "varied": table.varied,
        "metric": table.metric,
        "baseline": table.baseline,
        "note": table.note,
        "published": {column: dict(known) for column, known in table.published.items()},
        "scaled": setup.scaled,
        "setup": facts,
        "anchors": next((record["anchors"] for record in records if record["anchors"]), None) or anchors(setup.data),
        "rows": [collect_row(row) for row in table.rows],
        "comment": own.get("comment", ""),
        **provenance(),
    }


@functools.cache
def anchors(data: DataConfig) -> dict[str, float] | None:
    """Return bits per character of general compressors on the validation text; None without a text."""
    if data.dataset != "text" or not Path(data.path).is_file():
        return None
    text = split_tokens(map_bytes(data.path), data).valid.tobytes()
    packed = {"xz -9": lzma.compress(text, preset=9), "bzip2 -9": bz2.compress(text, 9)}
    return {name: 8 * len(part) / len(text) for name, part in packed.items()}


def figures(row: Record, name: str) -> list[float]:
    """Return the figure of each seed."""
    return [run["figures"][name] for run in row["runs"] if name in run["figures"]]


def metrics(record: Record) -> list[str]:
    """Return the names of the rows' figures: one, or one for each shorten factor."""
    return list(dict.fromkeys(name for row in record["rows"] for run in row["runs"] for name in run["figures"]))


def render(record: Record) -> str:
    """Return a record as Markdown."""
    waiting = [row["name"] for row in record["rows"] if "directory" in row and not row["runs"]]
    in_paper = [name for name in metrics(record) if any(name in row["paper"] for row in record["rows"])]
    others = record.get("published", {})  # older records have none
    return page(
        f"Table {record['table']}: {record['title']}, {record['data']}",
        "the table as a picture",
        f"table{record['table']}-{record['data']}.png",
        results_table(record),
        f"Not trained yet: {'; '.join(waiting)}." if waiting else "",
        *(agreement(record, name) for name in in_paper),
        *(("What others report:", published_table(record)) if others else ()),
        *(agreement(record, record["metric"], known, column) for column, known in others.items()),
        anchor_line(record) if record["anchors"] else "",
        record["comment"],
        setup_line(record),
        record["note"],
    )


def results_table(record: Record) -> str:
    """Return a line for each row, with a column for each figure and cost."""
    plain = plain_rows(record)
    columns: list[tuple[str, Callable[[Record], Any]]] = [
        (record["varied"], lambda row: f"**{row['name']}**" if row["name"] == record["baseline"] else row["name"])
    ]
    for name in metrics(record):
        header = name.upper() if name == record["metric"] else name
        columns.append((header, lambda row, name=name: spread(figures(row, name))))
        if any(name in row["paper"] for row in record["rows"]):
            columns.append(("paper", lambda row, name=name: number(row["paper"].get(name))))
    for header, cost in (("plain, equal FLOPs", flops), ("plain, equal time", step_seconds)) if plain else ():
        columns.append((header, lambda row, cost=cost: number(equal_cost(row, plain, cost, record["metric"]))))
    if any("groups" in run for row in record["rows"] for run in row["runs"]):
        columns += [("tokens a group", group_length), ("waited", waited)]
    columns += [
        ("seeds", lambda row: len(row["runs"]) or "-"),
        ("parameters", lambda row: number(row.get("parameters"), ".2f", 1e6, "M")),
        ("GFLOPs a step", lambda row: number(flops(row), ".1f", 1e9)),
        ("memory MB", lambda row: number(memory_bytes(row), ",.0f", 1e6)),
        ("s a step", lambda row: number(step_seconds(row))),
    ]
    return markdown_table(
        [header for header, _ in columns], [[cell(row) for _, cell in columns] for row in record["rows"]]
    )


def group_length(row: Record) -> str:
    """Return tokens per group, averaged over seeds."""
    lengths = [run["groups"]["length"] for run in row["runs"] if "groups" in run]
    if lengths:
        return f"{statistics.mean(lengths):.2f}"
    factor = Hierarchy.parse(row["hierarchy"]).total_factor if row["runs"] else 1
    return str(factor) if factor > 1 else "-"


def waited(row: Record) -> str:
    """Return the share of suppressed boundaries, averaged over seeds."""
    shares = [run["groups"]["suppressed"] for run in row["runs"] if "groups" in run]
    return f"{statistics.mean(shares):.2%}" if shares else "-"


def published_table(record: Record) -> str:
    """Return the figures of other papers as Markdown, our rows first."""
    columns, ours = record["published"], [row["name"] for row in record["rows"]]
    names = dict.fromkeys([*ours, *(name for known in columns.values() for name in known)])
    lines = [[name, *(number(known.get(name)) for known in columns.values())] for name in names]
    return markdown_table([record["varied"], *columns], lines)


def number(value: float | None, spec: str = ".3f", unit: float = 1, suffix: str = "") -> str:
    return "-" if value is None else f"{value / unit:{spec}}{suffix}"


def spread(values: list[float]) -> str:
    """Return the mean, and half the range of several values."""
    if len(values) < 2:
        return number(values[0] if values else None)
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def is_plain(row: Record) -> bool:
    return bool(row["runs"]) and kind(row["hierarchy"]) == PLAIN


def plain_rows(record: Record) -> list[Record]:
    """Return the trained plain transformers if there are at least two."""
    plain = [row for row in record["rows"] if is_plain(row) and figures(row, record["metric"])]
    return plain if len(plain) > 1 else []


def equal_cost(row: Record, plain: list[Record], cost: Cost, metric: str) -> float | None:
    """Return the figure of a plain transformer of the same cost, interpolated linearly in log cost."""
    if not row["runs"] or is_plain(row) or any(cost(each) is None for each in (row, *plain)):
        return None
    costs, reached = zip(*sorted((cost(each), mean_figure(each, metric)) for each in plain), strict=True)
    if not costs[0] <= cost(row) <= costs[-1]:
        return None
    return float(np.interp(math.log(cost(row)), np.log(costs), reached))


def mean_figure(row: Record, name: str) -> float:
    return statistics.mean(figures(row, name))


def agreement(record: Record, name: str, known: Mapping[str, float] | None = None, source: str = "the paper") -> str:
    """Compare the order of the rows with the paper's, or with that of `source`, whose figures are `known`."""
    if known is None:
        known = {row["name"]: row["paper"][name] for row in record["rows"] if name in row["paper"]}
    rows = [row for row in record["rows"] if row["name"] in known and figures(row, name)]
    if len(rows) < 3:
        return f"{name}: too few rows to compare their order with {source}'s."
    theirs, ours = [known[row["name"]] for row in rows], [mean_figure(row, name) for row in rows]
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        return f"{name}: all figures are equal, so there is no order to compare."
    pairs = list(itertools.combinations(range(len(rows)), 2))
    against = [(abs(ours[i] - ours[j]), i, j) for i, j in pairs if (theirs[i] - theirs[j]) * (ours[i] - ours[j]) < 0]
    text = f"{name}: Spearman's rank correlation with {source} {spearmanr(theirs, ours).statistic:.2f}"
    text += f"; {len(against)} of {len(pairs)} pairs of rows are in the other order"
    worst = sorted(((difference, f"{rows[j]['name']} and {rows[i]['name']}") for difference, i, j in against))[::-1]
    shown = "; ".join(f"{names} ({difference:.3f})" for difference, names in worst[:N_WORST])
    return f"{text}, by most: {shown}." if against else f"{text}."


def anchor_line(record: Record) -> str:
    trained = [row for row in record["rows"] if row["runs"]]
    worst = [max(mean_figure(row, metric) for metric in row["runs"][0]["figures"]) for row in trained]
    parts = [
        f"{name} {bpc:.2f} (beaten by {sum(figure < bpc for figure in worst)} of {len(worst)} rows)"
        for name, bpc in record["anchors"].items()
    ]
    return f"Bits per character of general compressors on the same validation text: {', '.join(parts)}."


def setup_line(record: Record) -> str:
    setup = record["setup"]
    predictions = next(run["n_predictions"] for row in record["rows"] for run in row["runs"])
    model = ", ".join(f"{name} {value}" for name, value in setup["model"].items())
    optimizer = setup["optimizer"]
    shared = optimizer.get("optimizer", "adamw")  # older records have none
    used = {row.get("optimizer", {}).get("optimizer", shared) for row in record["rows"] if row["runs"]}
    optimizers = " or ".join(name for key, name in {"adamw": "AdamW", "muon": "Muon"}.items() if key in used)
    scaled = f" Scaled from the paper's set-up: {record['scaled']}." if record["scaled"] else ""
    machines = {run["trained"]["machine"] for row in record["rows"] for run in row["runs"] if "trained" in run}
    trained = f" Trained on {', '.join(sorted(machines))}." if machines else ""
    which = "evenly spaced over the validation data" if setup["n_valid"] else "all of the validation data"
    return (
        f"Set-up: {model}; {setup['steps']:,} steps of {setup['data']['batch_size']} sequences; {optimizers}, "
        f"{optimizer['schedule']} from {optimizer['learning_rate']:g} after {optimizer['warmup_steps']} steps. "
        f"{UNITS[record['metric']].capitalize()} over {predictions:,} predictions, sequences without context before "
        f"them, {which}, by the checkpoint that was best on a part of them. Time and memory are those of a compiled "
        f"training step that keeps all activations.{scaled}{trained}"
    )
