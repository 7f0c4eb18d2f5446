"""Report of learning curves: a JSON record, and Markdown and a figure rendered from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.ablations import curves
from experiments.ablations.curves import Leg
from experiments.ablations.rows import row_config
from experiments.ablations.scales import Setup
from experiments.ablations.table import Row
from experiments.common.reports import markdown_table, page, provenance, publish, read_record, report_file
from hourglass_jax.costs import count_parameters, training_flops
from hourglass_jax.training.identity import identity

TREND = 4  # a trend starts at this share of the most characters
COLOURS = ("tab:orange", "tab:green", "tab:blue", "tab:purple")
KINDS = ((False, "At a constant rate", ":"), (True, "After a decay", "--"))  # decayed, words, style of a trend
Record = dict[str, Any]
Reading = dict[str, Any]  # row, seed, point, decayed, characters, and a figure


def report(setup: Setup, directory: Path, path: Path, comment: str | None) -> str:
    """Update PATH.json from the runs in `directory`, render PATH.md and PATH.png, and return the path of PATH.md."""
    record = read_record(report_file(path, ".json"))
    if directory.is_dir():
        record = collect(setup, directory, record)
    return publish(path, record if record and record["readings"] else None, render, draw, comment)


def collect(setup: Setup, directory: Path, stored: Record | None) -> Record:
    """Return the record of all pairs; keep stored readings of the same setup whose runs are gone."""
    facts = replace(setup, optimizer=replace(setup.optimizer, schedule="constant")).facts() | {"decay": curves.DECAY}
    del facts["steps"]
    if stored is None or identity(stored["setup"]) != identity(facts):
        stored = {"readings": [], "gaps": [], "machines": [], "comment": ""}
    seeds = [int(path.name.removeprefix("seed")) for path in directory.glob("*/seed*")]
    legs = [leg for leg in curves.plan(setup, directory, max(seeds, default=-1) + 1) if leg.result()]
    finished = {(leg.row.name, leg.train.seed, leg.point, leg.decayed): leg for leg in legs}
    readings = merge(stored["readings"], [place(leg) | leg.result()["figures"] for leg in legs])
    used, gaps = {reading["row"] for reading in readings}, []
    course = curves.COURSES[setup.course]
    pairs: list[Record] = []
    for pair in course.pairs:
        plain, rivals = pair.plain.name, [row.name for row in pair.rivals]
        for (row, *at), leg in finished.items():
            if row in rivals and (plain, *at) in finished:
                gaps.append(place(leg) | paired(finished[plain, *at], leg))
        rivals = [row for row in rivals if row in used]
        if plain in used and (rivals or plain not in [other["plain"] for other in pairs]):
            pairs.append({"plain": plain, "rivals": rivals})
    return {
        "data": directory.parent.name,
        "setup": facts,
        "pairs": pairs,
        "rows": {row.name: describe(row, setup) for row in course.rows if row.name in used},
        "readings": readings,
        "gaps": merge(stored["gaps"], gaps),
        "points": list(course.points),
        "branches": list(course.branches),
        "machines": sorted({*stored["machines"], *(leg.result()["trained"]["machine"] for leg in legs)}),
        "comment": stored["comment"],
        **provenance(),
    }


def place(leg: Leg) -> Reading:
    numbers = {"point": leg.point, "decayed": leg.decayed, "characters": leg.characters}
    return {"row": leg.row.name, "seed": leg.train.seed} | numbers


def merge(stored: Sequence[Reading], new: Sequence[Reading]) -> list[Reading]:
    """Return all readings in order; a new one replaces the stored one of the same row, seed and place."""
    found = {(each["row"], each["seed"], each["characters"], each["decayed"]): each for each in (*stored, *new)}
    return [found[at] for at in sorted(found)]


def describe(row: Row, setup: Setup) -> Record:
    config, length = row_config(row, setup), setup.data.block_size
    options = {name: getattr(config, name) for name in ("hierarchy", "shortening", "upsampling")}
    flops = training_flops(config, length) / length
    return options | {"parameters": count_parameters(config), "character_flops": flops}


def paired(plain: Leg, rival: Leg) -> dict[str, float]:
    """Return the mean of the rival's minus the plain model's bits on the same sequences, and its standard error."""
    losses = [np.load(leg.directory / curves.LOSSES).astype(np.float64) / math.log(2) for leg in (plain, rival)]
    gap = losses[1] - losses[0]
    return {"difference": float(gap.mean()), "standard_error": float(gap.std(ddof=1) / math.sqrt(len(gap)))}


def equal_flops(record: Record, plain: str, gap: Reading) -> float | None:
    """Return the rival's bits minus the plain model's at the same FLOPs; None if that has fewer than 2 readings.

    The plain model's bits are interpolated between its two nearest readings, linearly in log characters.
    """
    ours = [reading for reading in record["readings"] if reading["row"] == plain and alike(reading, gap)]
    if len(ours) < 2:
        return None
    flops = [record["rows"][name]["character_flops"] for name in (plain, gap["row"])]
    x = np.log([reading["characters"] for reading in ours])
    y = [reading["bpc"] for reading in ours]
    wanted = math.log(gap["characters"] * flops[1] / flops[0])
    i = int(np.clip(np.searchsorted(x, wanted), 1, len(x) - 1))
    reached = y[i - 1] + (y[i] - y[i - 1]) * (wanted - x[i - 1]) / (x[i] - x[i - 1])
    return find(record["readings"], gap)["bpc"] - reached


def alike(a: Reading, b: Reading) -> bool:
    """Return whether both have the same seed, and both or neither are decayed."""
    return (a["seed"], a["decayed"]) == (b["seed"], b["decayed"])


def find(readings: Sequence[Reading], like: Reading, row: str = "") -> Reading | None:
    """Return the reading of a row at the seed and point of `like`."""
    wanted = row or like["row"], like["characters"]
    return next((each for each in readings if alike(each, like) and (each["row"], each["characters"]) == wanted), None)


def gaps_of(record: Record, rival: str, decayed: bool) -> list[Reading]:
    """Return the gaps of a row, ordered by characters."""
    gaps = [gap for gap in record["gaps"] if gap["row"] == rival and gap["decayed"] == decayed]
    return sorted(gaps, key=lambda gap: gap["characters"])


class Trend(NamedTuple):
    """A line through gaps: bits at `start` characters, and bits added per doubling of the characters."""

    start: int
    level: float
    slope: float
    standard_error: float  # of the slope

    def at(self, characters: float) -> float:
        return self.level + self.slope * math.log2(characters / self.start)


def trend(gaps: Sequence[Reading]) -> Trend | None:
    """Fit the late gaps, weighted by their standard errors; None if all have the same number of characters."""
    late = [gap for gap in gaps if gap["characters"] >= gaps[-1]["characters"] / TREND]
    if len({gap["characters"] for gap in late}) < 2:
        return None
    start = late[0]["characters"]
    doublings = np.log2([gap["characters"] / start for gap in late])
    weights = [1 / gap["standard_error"] for gap in late]
    line, covariance = np.polyfit(doublings, [gap["difference"] for gap in late], 1, w=weights, cov="unscaled")
    return Trend(start, float(line[1]), float(line[0]), math.sqrt(covariance[0, 0]))


def render(record: Record) -> str:
    """Return a record as Markdown."""
    parts = []
    for pair in record["pairs"]:
        parts.append(f"## {pair['plain']} and {' and '.join(pair['rivals']) or 'no other yet'}")
        parts.append(pair_table(record, pair))
        parts += [trend_line(record, pair["plain"], rival) for rival in pair["rivals"]]
    return page(
        f"Learning curves at equal FLOPs, {record['data']}",
        "bits against characters and FLOPs",
        f"curves-{record['data']}.png",
        *parts,
        record["comment"],
        missing_line(record),
        setup_line(record),
    )


def pair_table(record: Record, pair: Record) -> str:
    """Return the readings of the plain model and its rivals as Markdown."""
    names = [pair["plain"], *pair["rivals"]]
    header = ["characters", "rate", "seed", pair["plain"]]
    for rival in pair["rivals"]:
        header += [rival, "gap", "gap at equal FLOPs"]
    places = merge((), [{**reading, "row": ""} for reading in record["readings"] if reading["row"] in names])
    lines = []
    for place in places:
        plain = find(record["readings"], place, pair["plain"])
        line = [f"{place['characters']:,}", "decayed" if place["decayed"] else "constant", place["seed"], bits(plain)]
        for rival in pair["rivals"]:
            gap = find(record["gaps"], place, rival)
            at_flops = equal_flops(record, pair["plain"], gap) if gap else None
            line += [bits(find(record["readings"], place, rival)), show_gap(gap)]
            line.append("-" if at_flops is None else f"{at_flops:+.4f}")
        lines.append(line)
    return markdown_table(header, lines)


def bits(reading: Reading | None) -> str:
    return "-" if reading is None else f"{reading['bpc']:.4f}"


def show_gap(gap: Reading | None) -> str:
    return "-" if gap is None else f"{gap['difference']:+.4f} ± {gap['standard_error']:.4f}"


def trend_line(record: Record, plain: str, rival: str) -> str:
    """Return the gap's trend, a sentence for each kind of reading."""
    rows = record["rows"]
    ratio = rows[rival]["character_flops"] / rows[plain]["character_flops"]
    text = f"**{rival}** takes {ratio:.3f} times the FLOPs of {plain}."
    for decayed, words, _ in KINDS:
        gaps = gaps_of(record, rival, decayed)
        if not gaps:
            continue
        last, line = gaps[-1], trend(gaps)
        text += f" {words} its gap is {show_gap(last)} bits after {last['characters']:,} characters"
        if line:
            text += f" and changes by {line.slope:+.4f} ± {line.standard_error:.4f} a doubling, from {line.start:,} on"
        text += "."
    return text


def missing_line(record: Record) -> str:
    """Return the points not reached yet, by row."""
    parts = []
    for name in record["rows"]:
        own = [reading for reading in record["readings"] if reading["row"] == name]
        done = {(reading["point"], reading["decayed"]) for reading in own}
        wanted = [(point, False) for point in record["points"]] + [(point, True) for point in record["branches"]]
        missing = sorted({point for point, decayed in wanted if (point, decayed) not in done})
        if missing:
            parts.append(f"{name} from {missing[0]:,} on")
    return f"Not reached yet, of {record['points'][-1]:,} characters: {'; '.join(parts)}." if parts else "All reached."


def setup_line(record: Record) -> str:
    setup = record["setup"]
    model = ", ".join(f"{name} {value}" for name, value in setup["model"].items())
    optimizer, data = setup["optimizer"], setup["data"]
    return (
        f"Set-up: {model}; {data['batch_size']} sequences a step, of one seed the same for all rows; AdamW, constant "
        f"{optimizer['learning_rate']:g} after {optimizer['warmup_steps']} steps. A decayed reading went on from the "
        f"constant one for {setup['decay']:.0%} more steps, in which the rate fell to 0, linearly. Bits per character "
        f"of the last parameters over {setup['n_valid'] * data['block_size']:,} predictions, evenly spaced over the "
        "validation data, sequences without context before them. A gap is a model's bits less those of the plain one "
        "on the same sequences, ± its standard error over these; what another seed changes is not in it. At equal "
        "FLOPs, the plain model's bits lie on the line through the two nearest of its readings, in the logarithm of "
        f"the characters. Trained on {', '.join(record['machines'])}."
    )


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
        for decayed, _, style in KINDS:
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
