"""Draw a hierarchy: which positions are pooled into each group, and which positions it serves.

python experiments/figures/hourglass.py --text="an old silent pond" --hierarchy="2@1 4@3 2@1" --out=hourglass.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before any other package named experiments

from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from experiments.common import launcher
from hourglass_jax import Hierarchy, UsageError

TEXT = flags.DEFINE_string("text", "an old silent pond", "A short text; each character is a box.")
HIERARCHY = flags.DEFINE_string("hierarchy", "2@1 4@3 2@1", "A hierarchy with one shortening.")
OUT = launcher.define_path("out", "hourglass.png", "Path of the picture.")
COLOURS = ("tab:blue", "tab:green", "tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.7) -> None:
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.25), width, 0.5, boxstyle="round,pad=0.03", fc=colour, ec="0.3", alpha=0.35
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=11, family="monospace")


def line(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "alpha": 0.8}
    axes.annotate("", end, start, arrowprops=style)


def draw(text: str, hierarchy: Hierarchy) -> Figure:
    """Draw from the bottom up: characters, pre stack, groups, inner stack, post stack, predictions."""
    if len(hierarchy.stages) != 3:
        raise UsageError(f"hierarchy '{hierarchy}': the picture supports one shortening; give e.g. '2@1 4@3 2@1'")
    (pre, _), (inner, k), (post, _) = hierarchy.stages
    length, depth = len(text), len(text) - 1
    figure = Figure(figsize=(0.62 * length + 2.6, 5.2), layout="constrained")
    axes = figure.subplots()
    rows = {"read": 0, "pre": 1, "short": 2.6, "post": 4.2, "predicted": 5.2}
    n_groups = -(-depth // k)
    centres = [min(g * k + (k - 1) / 2, depth - 1) for g in range(n_groups)]
    for t in range(depth):
        colour = COLOURS[t // k % len(COLOURS)]
        pooled_by = -(-t // k)  # the shift by k - 1: group g holds positions gk - k + 1 .. gk
        box(axes, t, rows["read"], text[t].replace(" ", "␣"), "white")
        box(axes, t, rows["pre"], "", COLOURS[pooled_by % len(COLOURS)])
        box(axes, t, rows["post"], "", colour)
        box(axes, t, rows["predicted"], text[t + 1].replace(" ", "␣"), "white")
        line(axes, (t, rows["read"] + 0.3), (t, rows["pre"] - 0.3), "0.6")
        line(axes, (t, rows["post"] + 0.3), (t, rows["predicted"] - 0.3), "0.6")
        if pooled_by < n_groups:
            line(
                axes,
                (t, rows["pre"] + 0.3),
                (centres[pooled_by], rows["short"] - 0.3),
                COLOURS[pooled_by % len(COLOURS)],
            )
        line(axes, (centres[t // k], rows["short"] + 0.3), (t, rows["post"] - 0.3), colour)
    for g, centre in enumerate(centres):
        box(axes, centre, rows["short"], "", COLOURS[g % len(COLOURS)], width=1.2)
    labels = {
        "read": "read",
        "pre": f"{pre} layers",
        "short": f"shift by {k - 1}, shorten by {k}\n{inner} layers",
        "post": f"upsample, add\n{post} layers",
        "predicted": "predicted",
    }
    for name, label in labels.items():
        axes.text(-0.9, rows[name], label, ha="right", va="center", fontsize=10)
    axes.set(xlim=(-4.6, depth - 0.3), ylim=(-0.5, 5.7))
    axes.axis("off")
    return figure


def main(_: list[str]) -> None:
    draw(TEXT.value, Hierarchy.parse(HIERARCHY.value)).savefig(OUT.value, dpi=110)
    print(OUT.value)


if __name__ == "__main__":
    launcher.run(main)
