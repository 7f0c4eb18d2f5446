"""Draw where a model's groups end in a text, and compare with fixed groups and groups that end at whitespace.

python experiments/pretrain.py --boundaries=router --hierarchy="1@1 2@6 1@1" --shortening=select --upsampling=smooth \
  --model.boundary_weight=5 --d_model=96 --n_heads=4 --d_ff=384 --positions=rotary --learning_rate=3e-3 \
  --optimizer.warmup_steps=40 --steps=1200 --out=runs/router
python experiments/figures/cuts.py --load_model_path=runs/router --out=experiments/results/cuts
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before any other package named experiments

import numpy as np
from absl import flags
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from experiments.common import launcher
from experiments.common.characters import token_names
from experiments.common.reports import provenance, report_file, write_report
from experiments.common.sources import text_name
from hourglass_jax import HourglassConfig, HourglassLM, UsageError, group_ends
from hourglass_jax.pretrained import without_places
from hourglass_jax.tokenizers import Tokenizer, boundary_tokens
from hourglass_jax.training.run import Run

LOAD = launcher.ModelFlags("runs/router", "Directory of a model of text.")
TEXT = flags.DEFINE_string(
    "text",
    "The names of a function's parameters are bound to its arguments when it is called.  Its default values are "
    "evaluated only once.",
    "The text, preferably one that the model was not trained on.",
)
OUT = launcher.define_path("out", "cuts", "Write PATH.png, PATH.json and PATH.md.")
COLUMNS = 64  # tokens per line
COLOURS = ("tab:blue", "tab:orange")


def ends_of_groups(model: HourglassLM, tokenizer: Tokenizer, text: str) -> dict[str, list[int]]:
    """Return the group ends of the first shortening, by two fixed rules and by the model's own."""
    tokens, own = tokenizer.encode(text), model.config
    if own.parsed_hierarchy.total_factor == 1:
        raise UsageError(
            f"hierarchy '{own.hierarchy}' has no shortening, so the model has no groups; give another model"
        )

    def untrained(rule: str) -> HourglassLM:
        config = HourglassConfig(
            vocab_size=own.vocab_size,
            hierarchy=own.hierarchy,
            boundaries=rule,
            boundary_tokens=boundary_tokens(tokenizer, rule),
            shortening="average",
            upsampling="repeat",
            d_model=16,
            n_heads=2,
        )
        return HourglassLM(config, rngs=nnx.Rngs(0))

    models = {rule: untrained(rule) for rule in ("fixed", "whitespace")} | {own.boundaries: model}
    return {name: np.flatnonzero(group_ends(each, tokens)[0]).tolist() for name, each in models.items()}


def draw_groups(axes: Axes, y: int, ends: list[int], length: int) -> None:
    """Draw a box for each group, the last of which may be incomplete."""
    bounds = [0, *(end + 1 for end in ends), length]
    for g, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            box = FancyBboxPatch(
                (start - 0.42, y - 0.3),
                stop - start - 0.16,
                0.6,
                boxstyle="round,pad=0.03",
                fc=COLOURS[g % 2],
                ec="0.3",
                alpha=0.35,
            )
            axes.add_patch(box)


def draw(names: list[str], ends: dict[str, list[int]]) -> Figure:
    """Draw the text in lines, each with a row for each rule."""
    lines = range(0, len(names), COLUMNS)
    figure = Figure(figsize=(12, 0.35 * (len(ends) + 0.7) * len(lines)), layout="constrained")
    for start, axes in zip(lines, figure.subplots(len(lines), squeeze=False)[:, 0], strict=True):
        for y, of_rule in enumerate(ends.values()):
            draw_groups(axes, y, of_rule, len(names))
            for x, name in enumerate(names[start : start + COLUMNS], start):
                axes.text(x, y, name, ha="center", va="center", fontsize=11, family="monospace")
        axes.set(xlim=(start - 0.5, start + COLUMNS - 0.5), ylim=(len(ends) - 0.5, -0.5), xticks=[])
        axes.set_yticks(range(len(ends)), ends)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def describe(record: dict[str, Any], model: HourglassConfig, picture: str) -> str:
    """Return the record as Markdown."""
    lengths = ", ".join(f"{name} {record['tokens'] / len(ends):.1f}" for name, ends in record["ends"].items())
    settings, training = record["settings"], ""
    if {"data", "train"} <= settings.keys():  # absent after fine-tuning and conversion
        data, train = settings["data"], settings["train"]
        windows = f"{data['batch_size']} x {data['block_size']}"
        training = f"; {train['steps']} steps of {windows} tokens of {text_name(data['path'])}, seed {train['seed']}"
    return f"""# Where groups end

![Cuts of one text]({picture})

Tokens per group in this text: {lengths}.

Model: {model.boundaries}, {model.hierarchy}, d_model {model.d_model}, {model.shortening} and {model.upsampling},
boundary_weight {model.boundary_weight:g}{training}.
"""


def main(_: list[str]) -> None:
    model, tokenizer, config = LOAD.load()
    names = [token_names(tokenizer)[token] for token in tokenizer.encode(TEXT.value)]
    ends = ends_of_groups(model, tokenizer, TEXT.value)
    settings = without_places(Run(LOAD.value).read().settings)
    record = provenance() | {"settings": settings, "text": TEXT.value, "tokens": len(names), "ends": ends}
    path = Path(OUT.value)
    picture = report_file(path, ".png")
    write_report(path, record, describe(record, config, picture.name))
    draw(names, ends).savefig(picture, dpi=110)
    print(picture)


if __name__ == "__main__":
    launcher.run(main)
