"""Figure of learning curves: bits against characters and FLOPs, and the gap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.ablations.gaps import Record, gaps_of, trend

COLOURS = ("tab:orange", "tab:green", "tab:blue", "tab:purple")


def draw(record: Record, path: Path) -> None:
    """Draw a row of panels for each pair; trends of gaps are dotted at a constant rate, dashed after a decay."""
    n_pairs = len(record["pairs"])
    figure = Figure(figsize=(15, 0.6 + 4 * n_pairs), layout="constrained")
    for panels, pair in zip(figure.subplots(n_pairs, 3, squeeze=False), record["pairs"], strict=True):
        draw_pair(panels, record, pair)
    figure.suptitle(f"Learning curves at equal FLOPs, {record['data']}; lines: constant rate, diamonds: after a decay")
    figure.savefig(path, dpi=110)


def draw_pair(panels: Any, record: Record, pair: Record) -> None:
    names = [pair["plain"], *pair["rivals"]]
    colours = dict(zip(names, COLOURS, strict=False))
    against: dict[str, Callable[[Record], float]] = {
        "characters": lambda reading: reading["characters"],
        "FLOPs": lambda reading: reading["characters"] * record["rows"][reading["row"]]["character_flops"],
    }
    for axes, (label, cost) in zip(panels, against.items(), strict=False):
        for name in names:
            draw_kinds(axes, record["readings"], name, colours[name], cost, "bpc")
        axes.set(xscale="log", xlabel=label, ylabel="bits per character")
        axes.legend(fontsize=8)
    for name in pair["rivals"]:
        draw_kinds(panels[2], record["gaps"], name, colours[name], against["characters"], "difference")
        for decayed, style in ((False, ":"), (True, "--")):
            gaps = gaps_of(record, name, decayed)
            line = trend(gaps)
            if line:
                x = line.start, gaps[-1]["characters"]
                panels[2].plot(x, [line.at(x_i) for x_i in x], ls=style, lw=1, color=colours[name])
    panels[2].axhline(0, color=COLOURS[0], lw=1)
    panels[2].set(xscale="log", xlabel="characters", ylabel=f"gap: bits less those of {pair['plain']}")
    for axes in panels:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if x < 1e9 else f"{x / 1e12:g}T"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)


def draw_kinds(
    axes: Axes, readings: list[Record], name: str, colour: str, cost: Callable[[Record], float], figure: str
) -> None:
    """Draw the readings of a row: lines at a constant rate, diamonds after a decay."""
    own = [reading for reading in readings if reading["row"] == name]
    for seed in sorted({reading["seed"] for reading in own}):
        for decayed, style in ((False, {"marker": ".", "lw": 1}), (True, {"marker": "D", "ls": "none"})):
            points = [reading for reading in own if (reading["seed"], reading["decayed"]) == (seed, decayed)]
            x, y = [cost(reading) for reading in points], [reading[figure] for reading in points]
            errors = [reading.get("standard_error", 0) for reading in points]
            label = name if seed == own[0]["seed"] and not decayed else None
            axes.errorbar(x, y, errors if any(errors) else None, color=colour, ms=5, label=label, **style)
