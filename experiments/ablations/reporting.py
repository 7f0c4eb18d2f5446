"""A table's report: a JSON record of what was trained, and Markdown and a picture drawn from the record alone."""

from __future__ import annotations

import bz2
import dataclasses
import json
import lzma
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.ablations.costs import read_cost
from experiments.ablations.pictures import Cost, draw
from experiments.ablations.rows import RESULT, row_config, row_directory
from experiments.reports import markdown_table, provenance, write_report
from experiments.scales import Setup
from experiments.tables import UNITS, Row, Table
from hourglass_jax import UsageError
from hourglass_jax.costs import count_parameters, training_flops
from hourglass_jax.data.corpora import map_bytes, split_tokens

N_WORST = 6  # pairs of rows against the paper's order that a report lists


def report(table: Table, setup: Setup, directory: Path, path: Path, comment: str | None) -> str:
    """Brings PATH.json up to date with the runs in `directory`, if any, and writes PATH.md and PATH.png from it."""
    json_path = path.with_suffix(".json")
    record = json.loads(json_path.read_text()) if json_path.exists() else None
    if any(directory.glob(f"*/*/{RESULT}")):
        record = collect(table, setup, directory, record)
    if record is None or not any(row["runs"] for row in record["rows"]):
        raise UsageError(
            f"{directory}: holds no finished row of table {table.number}; train it first, without --report"
        )
    if comment is not None:
        record["comment"] = comment
    write_report(path, record, render(record))
    draw(record, path.with_suffix(".png"))
    return f"{path}.md"


def collect(table: Table, setup: Setup, directory: Path, stored: dict[str, Any] | None) -> dict[str, Any]:
    """The record of a table. A stored row stays where its runs are gone, as long as the set-up is the same."""
    common = {
        "model": setup.model,
        "data": {name: value for name, value in dataclasses.asdict(setup.data).items() if name != "path"},
        "optimizer": dataclasses.asdict(setup.optimizer),
        "steps": setup.train.steps,
        "n_valid": setup.n_valid,
    }
    common = json.loads(json.dumps(common))
    if stored is None or stored["setup"] != common:
        stored = {"rows": [], "anchors": None, "comment": ""}
    known = {row["name"]: row for row in stored["rows"]}
    return {
        "table": table.number,
        "title": table.title,
        "data": directory.name,
        "varied": table.varied,
        "metric": table.metric,
        "baseline": table.baseline,
        "note": table.note,
        "scaled": setup.scaled,
        "setup": common,
        "anchors": stored["anchors"] or anchors(setup),
        "rows": [collect_row(row, setup, directory) or known.get(row.name) or empty_row(row) for row in table.rows],
        "comment": stored["comment"],
        **provenance(),
    }


def empty_row(row: Row) -> dict[str, Any]:
    return {"name": row.name, "paper": dict(row.paper), "runs": []}


def collect_row(row: Row, setup: Setup, directory: Path) -> dict[str, Any] | None:
    """A row with its finished runs and what they cost; None where nothing is finished."""
    if row.options is None:
        return None
    config = row_config(row, setup)
    place = row_directory(row, config, directory)
    runs = [json.loads(path.read_text()) for path in sorted(place.glob(f"*/{RESULT}"))]
    if not runs:
        return None
    return empty_row(row) | {
        "hierarchy": config.hierarchy,
        "shortening": config.shortening,
        "upsampling": config.upsampling,
        "parameters": count_parameters(config),
        "step_flops": setup.data.batch_size * training_flops(config, setup.data.block_size),
        "cost": read_cost(place),
        "runs": runs,
    }


def anchors(setup: Setup) -> dict[str, float] | None:
    """Bits per character of general compressors on the validation text; None where there is no text."""
    if setup.letters or setup.data.dataset != "text":
        return None
    text = split_tokens(map_bytes(setup.data.path), setup.data).valid.tobytes()
    packed = {"xz -9": lzma.compress(text, preset=9), "bzip2 -9": bz2.compress(text, 9)}
    return {name: 8 * len(part) / len(text) for name, part in packed.items()}


def figures(row: dict[str, Any], name: str) -> list[float]:
    """Of each seed."""
    return [run["figures"][name] for run in row["runs"]]


def metrics(record: dict[str, Any]) -> list[str]:
    """The figures that the rows have: one, or one for each shorten factor."""
    found = [name for row in record["rows"] for run in row["runs"] for name in run["figures"]]
    return list(dict.fromkeys(found))


def render(record: dict[str, Any]) -> str:
    """The Markdown of a record."""
    lines = [f"# Table {record['table']}: {record['title']}, {record['data']}", ""]
    lines += [f"![the table as a picture](table{record['table']}-{record['data']}.png)", ""]
    lines += [results_table(record), ""]
    for name in metrics(record):
        lines += [agreement(record, name), ""]
    if record["anchors"]:
        lines += [anchor_line(record), ""]
    lines += [record["comment"], ""] if record["comment"] else []
    lines += [setup_line(record), ""]
    lines += [record["note"], ""] if record["note"] else []
    return "\n".join(lines)


def results_table(record: dict[str, Any]) -> str:
    names = metrics(record)
    plain = plain_rows(record)
    header = [record["varied"]]
    for name in names:
        header += [name.upper() if name == record["metric"] else name, "paper"]
    if plain:
        header += ["plain, equal FLOPs", "plain, equal time"]
    header += ["seeds", "parameters", "GFLOPs a step", "memory MB", "s a step"]
    lines = []
    for row in record["rows"]:
        line = [f"**{row['name']}**" if row["name"] == record["baseline"] else row["name"]]
        for name in names:
            trained = [run for run in row["runs"] if name in run["figures"]]
            line += [spread(figures({"runs": trained}, name)), number(row["paper"].get(name))]
        if plain:
            line += [number(equal_cost(row, plain, cost, record["metric"])) for cost in (flops, step_seconds)]
        cost = row.get("cost") or {}
        line += [
            len(row["runs"]) or "-",
            f"{row['parameters'] / 1e6:.2f}M" if row["runs"] else "-",
            f"{row['step_flops'] / 1e9:.1f}" if row["runs"] else "-",
            f"{cost['memory_bytes'] / 1e6:,.0f}" if cost else "-",
            f"{cost['step_seconds']:.3f}" if cost else "-",
        ]
        lines.append(line)
    return markdown_table(header, lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def spread(values: list[float]) -> str:
    """The mean, with half the range where there are several."""
    if len(values) < 2:
        return number(values[0] if values else None)
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def flops(row: dict[str, Any]) -> float | None:
    return row.get("step_flops")


def step_seconds(row: dict[str, Any]) -> float | None:
    return (row.get("cost") or {}).get("step_seconds")


def is_plain(row: dict[str, Any]) -> bool:
    return bool(row["runs"]) and " " not in row["hierarchy"]


def plain_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The trained plain transformers, where there are enough of them to draw a line through."""
    plain = [row for row in record["rows"] if is_plain(row) and record["metric"] in row["runs"][0]["figures"]]
    return plain if len(plain) > 1 else []


def equal_cost(row: dict[str, Any], plain: list[dict[str, Any]], cost: Cost, metric: str) -> float | None:
    """What a plain transformer of the same cost would reach: between the two depths around it, in log cost."""
    if not row["runs"] or is_plain(row) or any(cost(each) is None for each in (row, *plain)):
        return None
    costs, reached = zip(*sorted((cost(each), mean_figure(each, metric)) for each in plain), strict=True)
    if not costs[0] <= cost(row) <= costs[-1]:
        return None
    return float(np.interp(math.log(cost(row)), np.log(costs), reached))


def mean_figure(row: dict[str, Any], name: str) -> float:
    return statistics.mean(figures(row, name))


def agreement(record: dict[str, Any], name: str) -> str:
    """How far the order of the rows is the paper's."""
    pairs = [
        (row["paper"][name], mean_figure(row, name), row["name"])
        for row in record["rows"]
        if name in row["paper"] and any(name in run["figures"] for run in row["runs"])
    ]
    if len(pairs) < 3:
        return f"{name}: too few rows to compare their order with the paper's."
    theirs, ours, _ = zip(*pairs, strict=True)
    against = sorted(
        (
            (abs(ours_a - ours_b), f"{a} and {b}")
            for i, (paper_a, ours_a, a) in enumerate(pairs)
            for paper_b, ours_b, b in pairs[:i]
            if (paper_a - paper_b) * (ours_a - ours_b) < 0
        ),
        reverse=True,
    )
    n_pairs = len(pairs) * (len(pairs) - 1) // 2
    text = f"{name}: Spearman's rank correlation with the paper {spearmanr(theirs, ours).statistic:.2f}"
    text += f"; {len(against)} of {n_pairs} pairs of rows are in the other order"
    if against:
        worst = "; ".join(f"{names} ({difference:.3f})" for difference, names in against[:N_WORST])
        text += f", by most: {worst}"
    return f"{text}."


def anchor_line(record: dict[str, Any]) -> str:
    beaten_by = {
        name: sum(
            mean_figure(row, metric) < bpc
            for row in record["rows"]
            if row["runs"]
            for metric in row["runs"][0]["figures"]
        )
        for name, bpc in record["anchors"].items()
    }
    parts = [f"{name} {bpc:.2f} (beaten by {beaten_by[name]} rows)" for name, bpc in record["anchors"].items()]
    return f"Bits per character of general compressors on the same validation text: {', '.join(parts)}."


def setup_line(record: dict[str, Any]) -> str:
    setup = record["setup"]
    predictions = next(run["n_predictions"] for row in record["rows"] for run in row["runs"])
    model = ", ".join(f"{name} {value}" for name, value in setup["model"].items())
    optimizer = setup["optimizer"]
    scaled = f" Scaled from the paper's set-up: {record['scaled']}." if record["scaled"] else ""
    return (
        f"Set-up: {model}; {setup['steps']:,} steps of {setup['data']['batch_size']} sequences; AdamW, "
        f"{optimizer['schedule']} from {optimizer['learning_rate']:g} after {optimizer['warmup_steps']} steps. "
        f"{UNITS[record['metric']].capitalize()} over {predictions:,} predictions, sequences without context before "
        f"them, evenly spaced over the validation data. Memory is that of a compiled training step.{scaled}"
    )
