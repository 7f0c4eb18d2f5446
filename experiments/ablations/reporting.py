"""Report of a table: a JSON record of its runs, and Markdown and a figure rendered from the record."""

from __future__ import annotations

import bz2
import dataclasses
import functools
import itertools
import json
import lzma
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.ablations.costs import read_cost, step_flops
from experiments.ablations.pictures import Cost, draw
from experiments.ablations.rows import RESULT, make_job, same_setup
from experiments.ablations.scales import Setup, for_table
from experiments.ablations.table import UNITS, Row, Table
from experiments.common.reports import markdown_table, provenance, publish, read_record, report_file
from hourglass_jax import DataConfig, Hierarchy, UsageError
from hourglass_jax.costs import count_parameters
from hourglass_jax.data.corpora import map_bytes, split_tokens

N_WORST = 6  # listed pairs of rows that contradict the paper's order


def report(table: Table, setup: Setup, directory: Path, path: Path, comment: str | None) -> str:
    """Update PATH.json from the runs in `directory`, render PATH.md and PATH.png, and return the path of PATH.md."""
    json_path = report_file(path, ".json")
    record = read_record(json_path)
    if any(directory.glob(f"*/*/{RESULT}")):
        record = collect(table, for_table(setup, table), directory, path.parent)
    if record is None or not any(row["runs"] for row in record["rows"]):
        raise UsageError(
            f"{directory}: contains no finished row of table {table.number}; train one first, without --report"
        )
    if comment is not None:
        record["comment"] = comment
    return publish(path, record, render, draw)


def collect(table: Table, setup: Setup, directory: Path, results: Path) -> dict[str, Any]:
    """Return the record of a table from the runs in `directory` and the records in `results` of the same setup.

    Stored runs are kept after they are gone from `directory`, also those that another table's record shares.
    """
    common = {
        "model": setup.model,
        "data": {name: value for name, value in dataclasses.asdict(setup.data).items() if name != "path"},
        "optimizer": dataclasses.asdict(setup.optimizer),
        "steps": setup.train.steps,
        "n_valid": setup.n_valid,
    }
    common = json.loads(json.dumps(common))
    records = [read_record(path) for path in sorted(results.glob("table*.json"))]
    records = [
        record for record in records if record.get("data") == directory.name and same_setup(record.get("setup"), common)
    ]
    own = next((record for record in records if record["table"] == table.number), {"rows": []})
    costs = {row["directory"]: row["cost"] for row in own["rows"] if row.get("cost")}
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in itertools.chain.from_iterable(record["rows"] for record in records):
        runs.setdefault(row.get("directory", ""), []).extend(row["runs"])
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
        "setup": common,
        "anchors": next((record["anchors"] for record in records if record["anchors"]), None) or anchors(setup.data),
        "rows": [collect_row(table, row, setup, directory, runs, costs) for row in table.rows],
        "comment": own.get("comment", ""),
        **provenance(),
    }


def collect_row(
    table: Table,
    row: Row,
    setup: Setup,
    directory: Path,
    stored: Mapping[str, list[dict[str, Any]]],
    costs: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return a row with its finished runs and their cost, from `directory` and from `stored`, by run directory."""
    found = {"name": row.name, "paper": dict(row.paper), "runs": []}
    if row.options is None:
        return found
    first = make_job(table, row, setup, directory, seed=0)
    place, config = first.directory.parent, first.config
    seeds = {run["seed"]: run for run in stored.get(place.name, [])}
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
        "step_flops": step_flops(first),
        "cost": read_cost(place) or costs.get(place.name),
        "runs": [seeds[seed] for seed in sorted(seeds)],
    }


@functools.cache
def anchors(data: DataConfig) -> dict[str, float] | None:
    """Return bits per character of general compressors on the validation text; None without a text."""
    if data.dataset != "text" or not Path(data.path).is_file():
        return None
    text = split_tokens(map_bytes(data.path), data).valid.tobytes()
    packed = {"xz -9": lzma.compress(text, preset=9), "bzip2 -9": bz2.compress(text, 9)}
    return {name: 8 * len(part) / len(text) for name, part in packed.items()}


def figures(row: dict[str, Any], name: str) -> list[float]:
    """Return the figure of each seed."""
    return [run["figures"][name] for run in row["runs"]]


def metrics(record: dict[str, Any]) -> list[str]:
    """Return the names of the rows' figures: one, or one for each shorten factor."""
    found = [name for row in record["rows"] for run in row["runs"] for name in run["figures"]]
    return list(dict.fromkeys(found))


def render(record: dict[str, Any]) -> str:
    """Return a record as Markdown."""
    lines = [f"# Table {record['table']}: {record['title']}, {record['data']}", ""]
    lines += [f"![the table as a picture](table{record['table']}-{record['data']}.png)", ""]
    lines += [results_table(record), ""]
    waiting = [row["name"] for row in record["rows"] if "directory" in row and not row["runs"]]
    lines += [f"Not trained yet: {'; '.join(waiting)}.", ""] if waiting else []
    for name in metrics(record):
        if any(name in row["paper"] for row in record["rows"]):
            lines += [agreement(record, name), ""]
    if published(record):
        lines += ["What others report:", "", published_table(record), ""]
        for column, known in published(record).items():
            lines += [agreement(record, record["metric"], known, column), ""]
    if record["anchors"]:
        lines += [anchor_line(record), ""]
    lines += [record["comment"], ""] if record["comment"] else []
    lines += [setup_line(record), ""]
    lines += [record["note"], ""] if record["note"] else []
    return "\n".join(lines)


def results_table(record: dict[str, Any]) -> str:
    names, plain = metrics(record), plain_rows(record)
    in_paper = [name for name in names if any(name in row["paper"] for row in record["rows"])]
    with_groups = any("groups" in run for row in record["rows"] for run in row["runs"])
    header = [record["varied"]]
    for name in names:
        header += [name.upper() if name == record["metric"] else name] + ["paper"] * (name in in_paper)
    if plain:
        header += ["plain, equal FLOPs", "plain, equal time"]
    header += ["tokens a group", "waited"] * with_groups
    header += ["seeds", "parameters", "GFLOPs a step", "memory MB", "s a step"]
    lines = []
    for row in record["rows"]:
        line = [f"**{row['name']}**" if row["name"] == record["baseline"] else row["name"]]
        for name in names:
            trained = [run for run in row["runs"] if name in run["figures"]]
            line.append(spread(figures({"runs": trained}, name)))
            line += [number(row["paper"].get(name))] * (name in in_paper)
        if plain:
            line += [number(equal_cost(row, plain, cost, record["metric"])) for cost in (flops, step_seconds)]
        line += group_cells(row) * with_groups
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


def group_cells(row: dict[str, Any]) -> list[str]:
    """Return tokens per group and the share of suppressed boundaries, averaged over seeds."""
    counts = [run["groups"] for run in row["runs"] if "groups" in run]
    if counts:
        length, suppressed = (statistics.mean(count[name] for count in counts) for name in ("length", "suppressed"))
        return [f"{length:.2f}", f"{suppressed:.2%}"]
    factor = Hierarchy.parse(row["hierarchy"]).total_factor if row["runs"] else 1
    return [str(factor) if factor > 1 else "-", "-"]


def published(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the columns of other papers; older records have none."""
    return record.get("published", {})


def published_table(record: dict[str, Any]) -> str:
    """Return the figures of other papers as Markdown, our rows first."""
    columns = published(record)
    ours = [row["name"] for row in record["rows"]]
    names = dict.fromkeys([*ours, *(name for known in columns.values() for name in known)])
    lines = [[name, *(number(known.get(name)) for known in columns.values())] for name in names]
    return markdown_table([record["varied"], *columns], lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def spread(values: list[float]) -> str:
    """Return the mean, and half the range of several values."""
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
    """Return the trained plain transformers if there are at least two."""
    plain = [row for row in record["rows"] if is_plain(row) and record["metric"] in row["runs"][0]["figures"]]
    return plain if len(plain) > 1 else []


def equal_cost(row: dict[str, Any], plain: list[dict[str, Any]], cost: Cost, metric: str) -> float | None:
    """Return the figure of a plain transformer of the same cost, interpolated linearly in log cost."""
    if not row["runs"] or is_plain(row) or any(cost(each) is None for each in (row, *plain)):
        return None
    costs, reached = zip(*sorted((cost(each), mean_figure(each, metric)) for each in plain), strict=True)
    if not costs[0] <= cost(row) <= costs[-1]:
        return None
    return float(np.interp(math.log(cost(row)), np.log(costs), reached))


def mean_figure(row: dict[str, Any], name: str) -> float:
    return statistics.mean(figures(row, name))


def agreement(
    record: dict[str, Any], name: str, known: Mapping[str, float] | None = None, source: str = "the paper"
) -> str:
    """Compare the order of the rows with the paper's, or with that of `source`, whose figures are `known`."""
    if known is None:
        known = {row["name"]: row["paper"][name] for row in record["rows"] if name in row["paper"]}
    pairs = [
        (known[row["name"]], mean_figure(row, name), row["name"])
        for row in record["rows"]
        if row["name"] in known and any(name in run["figures"] for run in row["runs"])
    ]
    if len(pairs) < 3:
        return f"{name}: too few rows to compare their order with {source}'s."
    theirs, ours, _ = zip(*pairs, strict=True)
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        return f"{name}: all figures are equal, so there is no order to compare."
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
    text = f"{name}: Spearman's rank correlation with {source} {spearmanr(theirs, ours).statistic:.2f}"
    text += f"; {len(against)} of {n_pairs} pairs of rows are in the other order"
    if against:
        worst = "; ".join(f"{names} ({difference:.3f})" for difference, names in against[:N_WORST])
        text += f", by most: {worst}"
    return f"{text}."


def anchor_line(record: dict[str, Any]) -> str:
    trained = [row for row in record["rows"] if row["runs"]]
    worst = [max(mean_figure(row, metric) for metric in row["runs"][0]["figures"]) for row in trained]
    parts = [
        f"{name} {bpc:.2f} (beaten by {sum(figure < bpc for figure in worst)} of {len(worst)} rows)"
        for name, bpc in record["anchors"].items()
    ]
    return f"Bits per character of general compressors on the same validation text: {', '.join(parts)}."


def setup_line(record: dict[str, Any]) -> str:
    setup = record["setup"]
    predictions = next(run["n_predictions"] for row in record["rows"] for run in row["runs"])
    model = ", ".join(f"{name} {value}" for name, value in setup["model"].items())
    optimizer = setup["optimizer"]
    scaled = f" Scaled from the paper's set-up: {record['scaled']}." if record["scaled"] else ""
    machines = {run["trained"]["machine"] for row in record["rows"] for run in row["runs"] if "trained" in run}
    trained = f" Trained on {', '.join(sorted(machines))}." if machines else ""
    which = "evenly spaced over the validation data" if setup["n_valid"] else "all of the validation data"
    return (
        f"Set-up: {model}; {setup['steps']:,} steps of {setup['data']['batch_size']} sequences; AdamW, "
        f"{optimizer['schedule']} from {optimizer['learning_rate']:g} after {optimizer['warmup_steps']} steps. "
        f"{UNITS[record['metric']].capitalize()} over {predictions:,} predictions, sequences without context before "
        f"them, {which}, by the checkpoint that was best on a part of them. Time and memory are those of a compiled "
        f"training step that keeps all activations.{scaled}{trained}"
    )
