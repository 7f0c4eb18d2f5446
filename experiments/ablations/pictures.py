"""Pictures of a table, drawn from its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"plain transformer": "tab:orange", "Hourglass": "tab:green"}
Cost = Callable[[dict[str, Any]], float | None]


def draw(record: dict[str, Any], path: Path) -> None:
    """Ours beside the paper's; where plain and hierarchical rows meet, against what they cost (Figure 1)."""
    trained = [row for row in record["rows"] if row["runs"]]
    comparable = [row for row in trained if record["metric"] in row["runs"][0]["figures"]]
    of_two_kinds = len({kind(row["hierarchy"]) for row in comparable}) == 2
    figure = draw_costs(record, comparable) if of_two_kinds else draw_rows(record, trained)
    figure.savefig(path, dpi=110)


def kind(hierarchy: str) -> str:
    return "Hourglass" if " " in hierarchy else "plain transformer"


def draw_costs(record: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """A panel for each cost that all rows have."""
    costs: dict[str, Cost] = {
        "FLOPs a step": lambda row: row["step_flops"],
        "seconds a step": lambda row: (row["cost"] or {}).get("step_seconds"),
        "memory of a step, MB": lambda row: (row["cost"] or {}).get("memory_bytes", 0) / 1e6,
    }
    costs = {name: cost for name, cost in costs.items() if all(cost(row) for row in rows)}
    reached = [float(np.mean([run["figures"][record["metric"]] for run in row["runs"]])) for row in rows]
    figure = Figure(figsize=(5.2 * len(costs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, (name, cost) in zip(panels, costs.items(), strict=True):
        draw_points(axes, [(row["hierarchy"], cost(row), y) for row, y in zip(rows, reached, strict=True)])
        axes.set_xlabel(name)
    panels[0].set_ylabel(f"{record['metric'].upper()}, lower is better")
    panels[0].legend()
    figure.suptitle(f"Table {record['table']}, {record['data']}")
    return figure


def draw_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Models as (hierarchy, cost, figure), and a line fitted through each kind in the logarithm of the cost."""
    for label, colour in COLOURS.items():
        of_kind = sorted((point for point in points if kind(point[0]) == label), key=lambda point: point[1])
        if of_kind:
            draw_kind(axes, of_kind, label, colour)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.18)
    axes.grid(alpha=0.3, which="both")


def draw_kind(axes: Axes, points: Sequence[tuple[str, float, float]], label: str, colour: str) -> None:
    names, x, y = zip(*points, strict=True)
    slope, level = np.polyfit(np.log(x), y, 1) if len(points) > 1 else (0, y[0])
    line = slope * np.log(x) + level
    axes.plot(x, y, "o", ms=5, color=colour, label=label)
    axes.plot(x, line, color=colour, lw=1)
    for name, x_row, y_row, on_line in zip(names, x, y, line, strict=True):
        offset, side = ((3, 3), "left") if y_row > on_line else ((-3, -6), "right")  # away from the line
        style = {"ha": side, "size": 6, "rotation": 40, "rotation_mode": "anchor", "textcoords": "offset points"}
        axes.annotate(name, (x_row, y_row), xytext=offset, **style)


def draw_rows(record: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """A line for each row: every seed of ours on the left, the paper's figure on the right."""
    names = [row["name"] for row in rows]
    metrics = list(dict.fromkeys(name for row in rows for run in row["runs"] for name in run["figures"]))
    figure = Figure(figsize=(8, 1.4 + 0.4 * len(rows)), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharey=True)
    for metric in metrics:
        points = [
            (run["figures"][metric], i) for i, row in enumerate(rows) for run in row["runs"] if metric in run["figures"]
        ]
        ours.plot(*zip(*points, strict=True), "o", alpha=0.8, label=metric)
        points = [(row["paper"][metric], i) for i, row in enumerate(rows) if metric in row["paper"]]
        if points:
            theirs.plot(*zip(*points, strict=True), "s", alpha=0.8, label=metric)
    ours.set(title=f"ours ({record['data']})", yticks=range(len(rows)), yticklabels=names)
    ours.invert_yaxis()
    theirs.set(title="paper")
    for axes in (ours, theirs):
        axes.grid(alpha=0.3)
        axes.set_xlabel(record["metric"].upper() if len(metrics) == 1 else "")
    if len(metrics) > 1:
        ours.legend(fontsize=7)
    figure.suptitle(f"Table {record['table']}: {record['title']}", fontsize=10)
    return figure
