"""Cost of a training step of plain and Hourglass models at each length, measured and predicted (Figure 6).

A step reads the same number of characters at every length, so that the cost per character shows that of attention.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.ablations.costs import keeping_activations, timed_step
from experiments.ablations.scales import Setup
from experiments.ablations.table import TEXT
from experiments.common.reports import markdown_table, open_record, page, provenance, publish
from experiments.common.timing import in_turn
from hourglass_jax import HourglassConfig
from hourglass_jax.costs import activation_bytes, state_bytes, training_flops
from hourglass_jax.training.signals import Signals

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384)
CHARACTERS = 16_384  # per step
ROUNDS = 3  # timed runs of each model and length
HOURGLASS, EQUAL_DEPTH = "2@1 8@3 2@1", "12@1"
COLOURS = {"Hourglass": "tab:green", "equal depth": "tab:orange", "equal FLOPs": "tab:red"}
Record = dict[str, Any]


def models(setup: Setup) -> dict[str, str]:
    """Return hierarchies by role; FLOPs are equal, to the nearest depth, at the setup's own length."""
    length = setup.data.block_size
    wanted = training_flops(configure(HOURGLASS, setup, length), length)

    def distance(depth: int) -> float:
        return abs(training_flops(configure(f"{depth}@1", setup, length), length) - wanted)

    depth = min(range(1, 13), key=distance)
    return {"Hourglass": HOURGLASS, "equal depth": EQUAL_DEPTH, "equal FLOPs": f"{depth}@1"}


def configure(hierarchy: str, setup: Setup, length: int) -> HourglassConfig:
    options = {**setup.model, **TEXT, "hierarchy": hierarchy, "max_length": length}
    return keeping_activations(HourglassConfig(**options))


def predictions(setup: Setup) -> Iterator[Record]:
    """Yield the predicted FLOPs and bytes of a step of each model at each length."""
    roles = models(setup)
    for length in LENGTHS:
        batch = max(CHARACTERS // length, 1)
        for role, hierarchy in roles.items():
            config = configure(hierarchy, setup, length)
            yield {
                "role": role,
                "hierarchy": hierarchy,
                "length": length,
                "batch": batch,
                "predicted_flops": batch * training_flops(config, length),
                "predicted_bytes": state_bytes(config) + activation_bytes(config, length, batch),
            }


def plan_table(setup: Setup) -> str:
    """Return the predictions as Markdown."""
    rows = []
    for point in predictions(setup):
        cost = (f"{point['predicted_flops'] / 1e9:,.1f}", f"{point['predicted_bytes'] / 1e6:,.0f}")
        rows.append((point["hierarchy"], f"{point['length']:,}", point["batch"], *cost))
    return markdown_table(("hierarchy", "characters", "batch", "GFLOPs a step", "MB"), rows)


def measure(setup: Setup, scale: str, path: Path, signals: Signals) -> None:
    """Measure the points that PATH.json lacks, and save it after each length."""
    settings = {"scale": scale, "model": dict(setup.model), "machine": provenance()["machine"]}
    record = open_record(path, settings, {"points": list(predictions(setup))})
    for length in LENGTHS:
        waiting = [point for point in record["points"] if point["length"] == length and "seconds" not in point]
        steps = {}
        for point in waiting:
            signals.check()
            steps[point["role"]] = timed_step(configure(point["hierarchy"], setup, length), point["batch"], length)
        seconds = in_turn(steps, ROUNDS, warm=True, check=signals.check) if waiting else {}
        for point in waiting:
            step, median = steps[point["role"]], statistics.median(seconds[point["role"]])
            point |= {"flops": step.counted_flops(), "bytes": step.memory_bytes, "seconds": median}
            print(f"{point['hierarchy']} at {length:,}: {median:.3f} s a step", flush=True)
        publish(path, record | provenance(), render, draw)


def measured(record: Record) -> list[Record]:
    return [point for point in record["points"] if "seconds" in point]


def rate(record: Record) -> float:
    """Return the FLOP/s assumed by the predicted seconds: the median of all points."""
    return statistics.median(point["predicted_flops"] / point["seconds"] for point in measured(record))


def render(record: Record) -> str:
    model = ", ".join(f"{name} {value}" for name, value in record["model"].items() if name != "max_length")
    speed = f"{rate(record) / 1e9:,.1f} GFLOP/s, the median of all that was measured"
    return page(
        "What a training step costs at every length",
        "FLOPs, time and memory of a character",
        f"lengths-{record['scale']}.png",
        points_table(record),
        "What the Hourglass costs as a share of the plain models:",
        ratios_table(record),
        record.get("comment", ""),
        f"Models: {model}, attention shortening over the average and attention upsampling over repetition; 'equal "
        "depth' has as many layers as the Hourglass, 'equal FLOPs' as many FLOPs at the length that this scale "
        f"trains at. A step reads {CHARACTERS:,} characters at every length and keeps all activations. FLOPs are "
        "those of matrix products: predicted by the formula of model FLOP utilization, counted in the step's "
        f"program, which computes attention's scores again. Seconds are predicted at {speed}; they are medians of "
        f"{ROUNDS} runs, the models in turn. Bytes are the compiler's, with parameters and optimizer state; the "
        "prediction of the activations is a lower bound.",
    )


def points_table(record: Record) -> str:
    header = ("model", "length", "GFLOPs", "counted", "s predicted", "measured", "MB predicted", "measured")
    lines = []
    for point in measured(record):
        predicted, memory = point["predicted_flops"], point["predicted_bytes"]
        cells = (f"{point['hierarchy']} ({point['role']})", f"{point['length']:,}")
        cells += (f"{predicted / 1e9:,.1f}", f"{point['flops'] / 1e9:,.1f}")
        cells += (f"{predicted / rate(record):.2f}", f"{point['seconds']:.2f}")
        lines.append((*cells, f"{memory / 1e6:,.0f}", f"{point['bytes'] / 1e6:,.0f}"))
    return markdown_table(header, lines)


def ratios_table(record: Record) -> str:
    """Return the Hourglass's cost relative to each plain model's at each measured length."""
    costs = {"FLOPs": "predicted_flops", "time": "seconds", "memory": "bytes"}
    at = {(point["role"], point["length"]): point for point in measured(record)}
    others = [role for role in COLOURS if role != "Hourglass"]
    header = ["length", *(f"{name}, {role}" for role in others for name in costs)]
    lines = []
    for length in sorted({length for _, length in at}):
        ours = at["Hourglass", length]
        parts = [ours[cost] / at[role, length][cost] for role in others for cost in costs.values()]
        lines.append([f"{length:,}", *(f"{part:.2f}" for part in parts)])
    return markdown_table(header, lines)


def draw(record: Record, path: Path) -> None:
    """Draw a panel for each cost per character: measured as lines with points, predicted dashed."""
    panels = {
        "FLOPs a character": ("flops", lambda point: point["predicted_flops"]),
        "seconds a character": ("seconds", lambda point: point["predicted_flops"] / rate(record)),
        "bytes a character": ("bytes", lambda point: point["predicted_bytes"]),
    }
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    drawn = figure.subplots(1, len(panels))
    for axes, (label, (name, prediction)) in zip(drawn, panels.items(), strict=True):
        for role, colour in COLOURS.items():
            points = [point for point in record["points"] if point["role"] == role]
            draw_costs(axes, points, prediction, color=colour, ls="--", lw=1)
            found = [point for point in points if name in point]
            title = f"{points[0]['hierarchy']} ({role})"
            draw_costs(axes, found, lambda point, name=name: point[name], color=colour, marker="o", ms=4, label=title)
        axes.set(xscale="log", yscale="log", xlabel="length in characters", ylabel=label)
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    drawn[0].legend(fontsize=8)
    figure.suptitle(f"Cost of training at every length, scale {record['scale']}: measured; dashed: predicted")
    figure.savefig(path, dpi=110)


def draw_costs(axes: Axes, points: Sequence[Record], cost: Callable[[Record], float], **style: Any) -> None:
    axes.plot([point["length"] for point in points], [cost(point) / CHARACTERS for point in points], **style)
