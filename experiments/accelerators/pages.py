"""A record of compiled steps, to which each command adds a row, and its Markdown and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.accelerators import report
from experiments.accelerators.sources import NAMES
from experiments.common.reports import PACKAGES, markdown_table, provenance, read_record, report_file, write_report

COLUMNS = (
    "row",
    "machine",
    "batch",
    "fits",
    "peak GiB a chip",
    "compile s (processor)",
    "ms a step",
    "MFU",
    "Mchar/s",
    "days",
    "launches",
)


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Puts a row into PATH.json, in place of one of the same name and target; PATH.md and PATH.png show all rows."""
    record = read_record(report_file(path, ".json")) or {"rows": []}
    made = provenance(PACKAGES)
    row = {"name": row["name"], "command": made["command"]} | row | {"versions": made["versions"]}
    key = (row["name"], row["target"])
    rows = [other for other in record["rows"] if (other["name"], other["target"]) != key] + [row]
    write(path, made, sorted(rows, key=lambda row: (row["name"], title(row), chips(row))))


def write(path: Path, made: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    estimated = [row for row in rows if row["compiles"]]
    text = [f"# Compiled for machines not at hand: {path.name}", report.METHOD, overview(rows)]
    if estimated:
        draw(estimated, report_file(path, ".png"))
        text.append(f"![chip-seconds by source, estimates]({path.name}.png)")
    for row in rows:
        text += [report.describe(row), f"`{row['command']}`"]
    write_report(path, made | {"rows": list(rows)}, "\n\n".join(text))


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row; days are those of the characters that the row says."""
    lines = []
    for row in rows:
        batch, length = row["batch"]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / report.GIB:.1f}"
        line = [row["name"], row["target"], f"{batch} x {length:,}", "yes" if row["fits"] else "no", peak]
        line.append("{compile:.0f} ({compile_processor:.0f})".format(**row["seconds_to"]))
        if row["compiles"]:
            estimate = row["estimate"]
            line += [
                f"{estimate['seconds'] * 1e3:.1f}",
                f"{estimate['mfu']:.1%}",
                f"{estimate['characters_per_second'] / 1e6:.2f}",
                f"{estimate['days']:.2g}",
                f"{estimate['launches']:,}",
            ]
        lines.append(line + [""] * (len(COLUMNS) - len(line)))
    return markdown_table([*COLUMNS[:6], *(f"{name} (estimate)" for name in COLUMNS[6:10]), COLUMNS[10]], lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar a row: chip-seconds for a million characters, by source, so that machines of any size compare."""
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    labels = [f"{row['name']}, {row['target']}" for row in rows]
    for colour, source in enumerate(name for name in NAMES if any(name in parts(row) for row in rows)):
        width = np.array([chip_seconds(row, source) for row in rows])
        axes.barh(labels, width, left=left, label=source, color=f"C{colour}")
        left += width
    for y, (end, row) in enumerate(zip(left, rows, strict=True)):
        fits = "" if row["fits"] else ", does not fit"
        axes.annotate(f" {row['estimate']['mfu']:.0%} MFU{fits}", (end, y), va="center", size=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="chip-seconds for a million characters (estimate, not measured)", title=f"{path.stem}, by source")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def parts(row: dict[str, Any]) -> dict[str, Any]:
    return row["estimate"]["breakdown"]


def chip_seconds(row: dict[str, Any], source: str) -> float:
    """Of a source, for a million characters."""
    batch, length = row["batch"]
    return parts(row).get(source, {"seconds": 0.0})["seconds"] * chips(row) * 1e6 / (batch * length)


def chips(row: dict[str, Any]) -> int:
    return int(row["machine"].partition(" x ")[0])


def title(row: dict[str, Any]) -> str:
    return row["machine"].partition(" x ")[2]
