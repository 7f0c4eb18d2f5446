"""Figure of a table, drawn from its record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLAIN, HOURGLASS = "plain transformer", "Hourglass"
COLOURS = {PLAIN: "tab:orange", HOURGLASS: "tab:green"}
NAME_SIZE = 6.5  # points, like the next two
MARKER = 3  # half the side of a marker
REACHES = range(MARKER, 80, 4)  # from a marker to its name
SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
Cost = Callable[[dict[str, Any]], float | None]
Point = tuple[str, float, float]  # name of the row, cost, figure


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw our figures against cost if plain and hierarchical rows differ in cost (Figure 1), else by row."""
    trained = [row for row in record["rows"] if row["runs"]]
    comparable = [row for row in trained if record["metric"] in row["runs"][0]["figures"]]
    of_two_kinds = len({kind(row["hierarchy"]) for row in comparable}) == 2
    of_many_costs = of_two_kinds and record["varied"] in ("hierarchy", "model")
    figure = draw_costs(record, comparable) if of_many_costs else draw_rows(record, trained)
    figure.savefig(path, dpi=110)


def kind(hierarchy: str) -> str:
    return HOURGLASS if " " in hierarchy else PLAIN


def flops(row: dict[str, Any]) -> float | None:
    return row.get("step_flops")


def step_seconds(row: dict[str, Any]) -> float | None:
    return (row.get("cost") or {}).get("step_seconds")


def memory_bytes(row: dict[str, Any]) -> float | None:
    return (row.get("cost") or {}).get("memory_bytes")


def draw_costs(record: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Draw a panel for each cost that all rows have."""
    costs: dict[str, Cost] = {
        "FLOPs a step": flops,
        "seconds a step": step_seconds,
        "memory of a step, MB": lambda row: (memory_bytes(row) or 0) / 1e6,
    }
    costs = {name: cost for name, cost in costs.items() if all(cost(row) for row in rows)}
    reached = [float(np.mean([run["figures"][record["metric"]] for run in row["runs"]])) for row in rows]
    figure = Figure(figsize=(5.2 * len(costs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    points = [[(row["name"], cost(row), y) for row, y in zip(rows, reached, strict=True)] for cost in costs.values()]
    for axes, name, of_cost in zip(panels, costs, points, strict=True):
        draw_points(axes, of_cost)
        axes.set_xlabel(name)
    panels[0].set_ylabel(f"{record['metric'].upper()}, lower is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(f"Table {record['table']}, {record['data']}")
    figure.draw_without_rendering()  # fixes the layout
    for axes, of_cost in zip(panels, points, strict=True):
        label_points(axes, of_cost)
    return figure


def draw_points(axes: Axes, points: Sequence[Point]) -> None:
    """Draw points, and a line fitted to each kind in log cost."""
    for label, colour in COLOURS.items():
        of_kind = sorted((point for point in points if kind(point[0]) == label), key=lambda point: point[1])
        if of_kind:
            _, x, y = zip(*of_kind, strict=True)
            slope, level = np.polyfit(np.log(x), y, 1) if len(of_kind) > 1 else (0, y[0])
            axes.plot(x, y, "o", ms=5, color=colour, label=label)
            axes.plot(x, slope * np.log(x) + level, color=colour, lw=1, alpha=0.6)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.3, which="both")


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write names beside their points, each at the nearest free place; requires a final layout."""
    pixel = 72 / axes.figure.dpi  # in points
    at = {point: axes.transData.transform(point[1:]) * pixel for point in points}
    frame = axes.get_window_extent()
    left, bottom, right, top = (edge * pixel for edge in frame.extents)
    taken = [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in at.values()]
    for point, (x, y) in at.items():
        width, height = (side / 2 + 1 for side in name_size(axes, point[0], pixel))
        for reach, (right_of, above) in itertools.product(REACHES, SIDES):
            dx, dy = right_of * (width + reach), above * (height + reach)
            box = (x + dx - width, y + dy - height, x + dx + width, y + dy + height)
            inside = left < box[0] and box[2] < right and bottom < box[1] and box[3] < top
            if inside and not any(overlap(box, other) for other in taken):
                break
        taken.append(box)
        style = {"size": NAME_SIZE, "ha": "center", "va": "center", "textcoords": "offset points"}
        if reach > REACHES[0]:
            style["arrowprops"] = {"arrowstyle": "-", "lw": 0.4, "color": "grey"}
        axes.annotate(point[0], point[1:], xytext=(dx, dy), **style).set_in_layout(False)


def name_size(axes: Axes, name: str, pixel: float) -> tuple[float, float]:
    """Return width and height of a name in points."""
    text = axes.text(0, 0, name, size=NAME_SIZE)
    extent = text.get_window_extent()
    text.remove()
    return extent.width * pixel, extent.height * pixel


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return the overlap of two boxes (left, bottom, right, top)."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_rows(record: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Draw a line for each row: every seed of ours on the left, published figures, if any, on the right."""
    names = [row["name"] for row in rows]
    metrics = list(dict.fromkeys(name for row in rows for run in row["runs"] for name in run["figures"]))
    figure = Figure(figsize=(8, 1.4 + 0.4 * len(rows)), layout="constrained")
    known = {metric: {row["name"]: row["paper"].get(metric) for row in rows} for metric in metrics}
    known |= record.get("published", {})
    compared = any(value is not None for by_name in known.values() for value in by_name.values())
    ours, *others = figure.subplots(1, 2 if compared else 1, sharey=True, squeeze=False)[0]
    for metric in metrics:
        points = [
            (run["figures"][metric], i) for i, row in enumerate(rows) for run in row["runs"] if metric in run["figures"]
        ]
        ours.plot(*zip(*points, strict=True), "o", alpha=0.8, label=metric)
    for theirs in others:
        for column, by_name in known.items():
            points = [(by_name[name], i) for i, name in enumerate(names) if by_name.get(name) is not None]
            if points:
                theirs.plot(*zip(*points, strict=True), "s", alpha=0.8, label=column)
        theirs.set(title="published" if record.get("published") else "paper")
        if record.get("published"):
            theirs.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    ours.set(title=f"ours ({record['data']})", yticks=range(len(rows)), yticklabels=names)
    ours.invert_yaxis()
    for axes in (ours, *others):
        axes.grid(alpha=0.3)
        axes.set_xlabel(record["metric"].upper() if len(metrics) == 1 else "")
    if len(metrics) > 1:
        ours.legend(fontsize=7)
    figure.suptitle(f"Table {record['table']}: {record['title']}", fontsize=10)
    return figure
