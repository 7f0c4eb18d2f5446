"""Report of learning curves: a JSON record, and Markdown and a figure rendered from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.ablations import curves
from experiments.ablations.curve_pictures import draw
from experiments.ablations.curves import Leg, curve
from experiments.ablations.gaps import Reading, Record, equal_flops, find, gaps_of, paired, trend
from experiments.ablations.rows import row_config, same_setup
from experiments.ablations.scales import Setup
from experiments.ablations.table import Row
from experiments.common.reports import markdown_table, provenance, publish, read_record, report_file
from hourglass_jax import UsageError
from hourglass_jax.costs import count_parameters, training_flops


def report(setup: Setup, directory: Path, path: Path, comment: str | None) -> str:
    """Update PATH.json from the runs in `directory`, render PATH.md and PATH.png, and return the path of PATH.md."""
    record = read_record(report_file(path, ".json"))
    if directory.is_dir():
        record = collect(setup, directory, record)
    if record is None or not record["readings"]:
        raise UsageError(f"{directory}: contains no finished leg of a curve; train one first, without --report")
    if comment is not None:
        record["comment"] = comment
    return publish(path, record, render, draw)


def collect(setup: Setup, directory: Path, stored: Record | None) -> Record:
    """Return the record of all pairs; keep stored readings of the same setup whose runs are gone."""
    common = {
        "model": setup.model,
        "data": {name: value for name, value in dataclasses.asdict(setup.data).items() if name != "path"},
        "optimizer": dataclasses.asdict(dataclasses.replace(setup.optimizer, schedule="constant")),
        "decay": curves.DECAY,
        "n_valid": setup.n_valid,
    }
    common = json.loads(json.dumps(common))
    if stored is None or not same_setup(stored["setup"], common):
        stored = {"readings": [], "gaps": [], "machines": [], "comment": ""}
    readings, gaps, machines = [], [], set(stored["machines"])
    course = curves.course(setup)
    for pair in course.pairs:
        done = {row.name: dict(finished(row, setup, directory)) for row in pair.rows}
        for row, legs in done.items():
            for leg, result in legs.values():
                readings.append(identity(row, leg) | {"bpc": result["figures"]["bpc"]})
                machines.add(result["trained"]["machine"])
        ours = done[pair.plain.name]
        for row in (rival.name for rival in pair.rivals):
            for at in done[row].keys() & ours.keys():
                difference, error = paired(ours[at][0], done[row][at][0])
                gaps.append(identity(row, done[row][at][0]) | {"difference": difference, "standard_error": error})
    readings = merge(stored["readings"], readings)
    used = {reading["row"] for reading in readings}
    pairs: list[Record] = []
    for pair in course.pairs:
        plain, rivals = pair.plain.name, [row.name for row in pair.rivals if row.name in used]
        if plain in used and (rivals or plain not in [other["plain"] for other in pairs]):
            pairs.append({"plain": plain, "rivals": rivals})
    return {
        "data": directory.parent.name,
        "setup": common,
        "pairs": pairs,
        "rows": {row.name: describe(row, setup) for pair in course.pairs for row in pair.rows if row.name in used},
        "readings": readings,
        "gaps": merge(stored["gaps"], gaps),
        "points": list(course.points),
        "branches": list(course.branches),
        "machines": sorted(machines),
        "comment": stored["comment"],
        **provenance(),
    }


def finished(row: Row, setup: Setup, directory: Path) -> Iterator[tuple[tuple[int, int, bool], tuple[Leg, Record]]]:
    """Yield the finished legs and their results by (seed, point, decayed)."""
    seeds = {int(path.name.removeprefix("seed")) for path in directory.glob("*/seed*")}
    for seed in sorted(seeds):
        for leg in curve(row, setup, directory, seed):
            result = leg.job.result()
            if result is not None:
                yield (seed, leg.point, leg.decayed), (leg, result)


def identity(row: str, leg: Leg) -> Reading:
    seed = leg.job.train.seed
    return {"row": row, "seed": seed, "point": leg.point, "decayed": leg.decayed, "characters": leg.characters}


def merge(stored: Sequence[Reading], new: Sequence[Reading]) -> list[Reading]:
    def key(reading: Reading) -> tuple[Any, ...]:
        return tuple(reading[name] for name in ("row", "seed", "characters", "decayed"))

    found = {key(reading): reading for reading in (*stored, *new)}
    return [found[at] for at in sorted(found)]


def describe(row: Row, setup: Setup) -> Record:
    config = row_config(row, setup)
    return {
        "hierarchy": config.hierarchy,
        "shortening": config.shortening,
        "upsampling": config.upsampling,
        "parameters": count_parameters(config),
        "character_flops": training_flops(config, setup.data.block_size) / setup.data.block_size,
    }


def render(record: Record) -> str:
    """Return a record as Markdown."""
    lines = [f"# Learning curves at equal FLOPs, {record['data']}", ""]
    lines += [f"![bits against characters and FLOPs](curves-{record['data']}.png)", ""]
    for pair in record["pairs"]:
        lines += [f"## {pair['plain']} and {' and '.join(pair['rivals']) or 'no other yet'}", ""]
        lines += [pair_table(record, pair), ""]
        lines += [line for rival in pair["rivals"] for line in (trend_line(record, pair["plain"], rival), "")]
    lines += [record["comment"], ""] if record["comment"] else []
    lines += [missing_line(record), "", setup_line(record), ""]
    return "\n".join(lines)


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
    for decayed, words in ((False, "At a constant rate"), (True, "After a decay")):
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
