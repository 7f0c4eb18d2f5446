"""Bits of the same characters by length of context, which show how far back a model looks.

Layers on shortened sequences serve the distant past (section 1 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import hourglass_jax as hg
from experiments.ablations.rows import Job
from experiments.ablations.scales import Setup
from experiments.common import launcher
from experiments.common.recorded import recorded_data
from experiments.common.reports import markdown_table, open_record, page, provenance, publish
from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.data.corpora import map_bytes, split_tokens
from hourglass_jax.pretrained import pretrained_path
from hourglass_jax.training.checkpoints import CHECKPOINTS
from hourglass_jax.training.signals import Signals

SHORTEST = 12  # characters of context; each doubles, so that groups of 2, 3, 4 and 6 align alike
N_SCORED = 24  # characters after the context
N_SEQUENCES = 1024  # if the setup evaluates on all data
BATCH = 64
Record = dict[str, Any]
Load = Callable[[], tuple[HourglassLM, int]]  # a model and its training length in characters


def contexts(length: int) -> list[int]:
    """Return the contexts that fit in `length` characters. Raises UsageError if none does."""
    found = [SHORTEST << i for i in range(max(length, 1).bit_length()) if (SHORTEST << i) + N_SCORED <= length]
    if not found:
        raise UsageError(
            f"sequences of {length} characters are too short for {SHORTEST} of context and {N_SCORED} after it"
        )
    return found


def sample(setup: Setup, context: int) -> np.ndarray:
    """Return windows of the validation text, int32 [N, context + N_SCORED + 1]; the end is the same at each context.

    Raises UsageError if the text is too short.
    """
    text = split_tokens(map_bytes(setup.data.path), setup.data).valid
    first = len(text) // 10  # characters before it serve only as context
    if first < context + N_SCORED:
        raise UsageError(
            f"{setup.data.path}: has {len(text):,} validation characters, but contexts of {context:,} require "
            f"{10 * (context + N_SCORED):,}; give a longer text"
        )
    ends = np.linspace(first, len(text) - 1, setup.n_valid or N_SEQUENCES).astype(int)
    return np.stack([text[end - context - N_SCORED : end + 1] for end in ends]).astype(np.int32)


def bits(model: HourglassLM, tokens: np.ndarray) -> np.ndarray:
    """Return bits per character [N] of the last N_SCORED characters of each row."""
    score = nnx.jit(hg.score)
    batches = np.array_split(tokens, math.ceil(len(tokens) / BATCH))
    losses = [-np.asarray(score(model, batch))[:, -N_SCORED:] for batch in batches]
    return np.concatenate(losses).mean(axis=1, dtype=np.float64) / math.log(2)


def measure(models: Mapping[str, Load], setup: Setup, path: Path, data: str, signals: Signals) -> None:
    """Measure the models and add them to PATH.json, PATH.md and PATH.png."""
    record = open_record(path, {"data": data, "places": setup.n_valid or N_SEQUENCES}, {"models": {}})
    for name, load in models.items():
        record["models"][name] = found = readings(*load(), setup, signals)
        publish(path, record | provenance(), render, draw)
        print(f"{name}: " + ", ".join(f"{each['bits']:.3f} after {each['context']}" for each in found), flush=True)


def readings(model: HourglassLM, length: int, setup: Setup, signals: Signals) -> list[Record]:
    """Return bits at each context that fits in `length`, the gain over the shortest one, and its standard error."""
    found: list[Record] = []
    shortest = bits(model, sample(setup, SHORTEST))
    for context in contexts(length):
        signals.check()
        losses = bits(model, sample(setup, context))
        gain = shortest - losses
        error = gain.std(ddof=1) / math.sqrt(len(gain))
        found.append({"context": context, "bits": losses.mean(), "gain": gain.mean(), "standard_error": error})
    return found


def loaders(jobs: Sequence[Job], names: Sequence[str]) -> dict[str, Load]:
    """Return a loader for each finished row that still has checkpoints, and for each shipped model of these names."""
    there = [job for job in jobs if job.result() is not None and (job.directory / CHECKPOINTS).is_dir()]
    origins = {f"{job.row.name}, seed {job.train.seed}": str(job.directory) for job in there}
    origins |= {f"{pretrained_path(name).name} (shipped)": name for name in names}
    return {name: partial(load, origin) for name, origin in origins.items()}


def load(origin: str) -> tuple[HourglassLM, int]:
    """Return a model and its training length. Raises UsageError if it does not read bytes."""
    model, tokenizer, settings = launcher.load_origin(origin)
    if tokenizer.kind != "byte":
        raise UsageError(f"{origin}: has a tokenizer of kind {tokenizer.kind!r}, but the rows read bytes; leave it out")
    return model, recorded_data(settings).block_size


def render(record: Record) -> str:
    found = sorted({each["context"] for model in record["models"].values() for each in model})
    lines = []
    for name, model in record["models"].items():
        at = {each["context"]: f"{each['bits']:.3f}" for each in model}
        gain = f"{model[-1]['gain']:.3f} ± {model[-1]['standard_error']:.3f}"
        lines.append((name, *(at.get(context, "-") for context in found), gain))
    return page(
        f"What more context gives, {record['data']}",
        "bits against characters of context",
        f"contexts-{record['data']}.png",
        markdown_table(("model", *(f"{context:,}" for context in found), "gain"), lines),
        record.get("comment", ""),
        f"Bits per character of the same {N_SCORED} characters at each of {record['places']:,} places, evenly spaced "
        "over the validation data, after so many characters of context, up to what each model was trained on. The gain "
        "is that of the longest context over the shortest, ± its standard error over places.",
    )


def draw(record: Record, path: Path) -> None:
    """Draw bits against context, and the gain of each context over the shortest."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, model in record["models"].items():
        x = [each["context"] for each in model]
        panels[0].plot(x, [each["bits"] for each in model], marker="o", ms=4, label=name)
        gains, errors = ([each[key] for each in model] for key in ("gain", "standard_error"))
        panels[1].errorbar(x, gains, errors, marker="o", ms=4, label=name)
    for axes, label in zip(panels, ("bits per character", f"gain over {SHORTEST} characters, in bits"), strict=True):
        axes.set(xscale="log", xlabel="characters of context", ylabel=label)
        ticks = sorted({each["context"] for model in record["models"].values() for each in model})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=7)
    figure.suptitle(f"What more context gives, {record['data']}")
    figure.savefig(path, dpi=110)
