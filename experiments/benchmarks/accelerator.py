"""The accelerator suite: kernels against plain attention, then training steps, then decoding.

Each part adds a row to the record, and the same command resumes with the first part that has no row.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks import models
from experiments.common.reports import markdown_table
from experiments.common.timing import Step, in_turn, synthetic, timed
from hourglass_jax import HourglassConfig, HourglassLM
from hourglass_jax.costs import training_flops
from hourglass_jax.evaluation import score
from hourglass_jax.nn.attention.choice import IMPLEMENTATIONS
from hourglass_jax.training.metrics import matmul_ceiling

Row = dict[str, Any]
Part = Callable[[], Row]
Tables = dict[str, tuple[str, list[str], Callable[[str, Row], list[list[Any]]]]]  # heading, header, cells by kind
ORACLE = "plain"
POSITIONS = ("relative", "rotary", "learned")
WINDOWS = (0, 64)
TIMES, ROUNDING = 2.0, 1e-5  # allowed error of a kernel: TIMES the error of plain attention, plus ROUNDING


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Sizes of the suite; the defaults are the paper's enwik8 model at length 4096.

    check_length, check_d_model: size of the models that check kernels; the length is no multiple of a block.
    decode_length, decode_batches: tokens generated, and rows generated at once.
    """

    hierarchy: str = "4@1 8@3 4@1"
    d_model: int = 768
    n_heads: int = 8
    length: int = 4096
    batch: int = 4
    dtype: str = "bfloat16"
    check_length: int = 391
    check_d_model: int = 128
    decode_length: int = 512
    decode_batches: tuple[int, ...] = (1, 32, 256)

    def config(self, hierarchy: str = "", **options: Any) -> HourglassConfig:
        sizes = {"d_model": self.d_model, "n_heads": self.n_heads, "d_ff": 4 * self.d_model, "dtype": self.dtype}
        sizes |= {"vocab_size": 256, "max_length": self.length, "upsampling": "attention_repeat"}
        return HourglassConfig(hierarchy=hierarchy or self.hierarchy, **(sizes | options))

    def trained(self) -> dict[str, HourglassConfig]:
        """Return models with every attention, and plain models of the same depth and of the same FLOPs."""
        configs = {
            f"{self.hierarchy}, {positions}, {attention}": self.config(positions=positions, attention=attention)
            for positions in POSITIONS[:2]
            for attention in IMPLEMENTATIONS
            if attention != ORACLE
        }
        plain = partial(self.config, positions="rotary", attention="fused")
        depth = sum(n for n, _ in self.config().parsed_hierarchy.stages)
        flops = training_flops(self.config(positions="rotary"), self.length)
        equal = min(range(1, depth + 1), key=lambda n: abs(training_flops(plain(f"{n}@1"), self.length) - flops))
        configs[f"{depth}@1, rotary, fused (its depth)"] = plain(f"{depth}@1")
        configs[f"{equal}@1, rotary, fused (its FLOPs)"] = plain(f"{equal}@1")
        return configs


def parts(sizes: Accelerator, repeats: int, done: Collection[str] = ()) -> dict[str, Part]:
    """Return the parts by name, in the order in which they run, also those of `done`."""
    checked = [(a, p) for a in IMPLEMENTATIONS if a != ORACLE for p in POSITIONS]
    found: dict[str, Part] = {f"check {a} {p}": partial(check, sizes, a, p) for a, p in checked}
    found |= {f"train {name}": partial(train, sizes, config, repeats) for name, config in sizes.trained().items()}
    found |= {
        f"decode {positions} {batch}": partial(decode, sizes, positions, batch, repeats)
        for positions in POSITIONS[:2]
        for batch in sizes.decode_batches
    }
    return found


def run_parts(parts: Mapping[str, Part], rows: dict[str, Row]) -> Iterator[str]:
    """Run the parts without a row, and yield the name of each after adding its row; an error becomes a row."""
    for name in [name for name in parts if name not in rows]:
        try:
            rows[name] = parts[name]()
        except Exception as error:
            rows[name] = {"kind": "failed", "reason": " ".join(str(error).split())[:300]}
        yield name


def check(sizes: Accelerator, attention: str, positions: str) -> Row:
    """Compare logits and gradients of a small model with those of plain attention in float32 on the host.

    A kernel passes if its error is at most `TIMES` that of plain attention of the same dtype on the same device.
    """
    size = {"d_ff": 128, "d_model": sizes.check_d_model, "n_heads": 2, "max_length": sizes.check_length}
    comparisons, cpu = [], jax.local_devices(backend="cpu")[0]
    for window in WINDOWS:
        options = size | {"positions": positions, "window": window, "initialization": "xavier"}
        small = partial(sizes.config, "1@1 1@3 1@1", **options)
        exact = small(attention=ORACLE, dtype="float32")
        with jax.default_device(cpu):
            params = jax.device_get(nnx.state(HourglassLM(exact, rngs=nnx.Rngs(0))))
            expected = logits_and_gradients(exact, params, sizes.check_length)
        for dtype in ("float32", "bfloat16"):
            found = [
                logits_and_gradients(small(attention=name, dtype=dtype), params, sizes.check_length)
                for name in (attention, ORACLE)
            ]
            error, allowed = (distance(each, expected) for each in found)
            comparisons.append({"window": window, "dtype": dtype, "error": error, "of_plain": allowed})
    return {"kind": "check", "comparisons": comparisons, "passed": all(map(is_near, comparisons))}


def is_near(comparison: Mapping[str, Any], times: float = TIMES) -> bool:
    return comparison["error"] <= times * comparison["of_plain"] + ROUNDING


def logits_and_gradients(config: HourglassConfig, params: nnx.State, length: int) -> Any:
    """Return logits and gradients of two sequences, with matrix products at the device's highest precision."""
    graph = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))[0]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length + 1)).astype(np.int32)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        return -score(model, tokens).mean(), model(tokens[:, :-1])

    with jax.default_matmul_precision("highest"):
        (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.device_get((logits, gradients))


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest number of the same array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-12)) for a, b in pairs)


def train(sizes: Accelerator, config: HourglassConfig, repeats: int) -> Row:
    """Time a training step."""
    return time_step(sizes, Step(config, synthetic(sizes.batch, sizes.length)), repeats) | {"kind": "train"}


def time_step(sizes: Accelerator, step: Step, repeats: int) -> Row:
    """Time a compiled step."""
    [seconds] = in_turn({"step": step}, repeats).values()
    flops = sizes.batch * training_flops(step.config, sizes.length) / statistics.median(seconds)
    measured = {"compile_seconds": step.compile_seconds, "memory_bytes": step.memory_bytes}
    share = flops / matmul_ceiling(sizes.dtype)
    return timed(seconds, sizes.batch * sizes.length, ceiling_share=share, **measured)


def decode(sizes: Accelerator, positions: str, batch: int, repeats: int) -> Row:
    """Time generation from prompts of one character."""
    model = HourglassLM(sizes.config(positions=positions), rngs=nnx.Rngs(0))
    [seconds] = in_turn({"decode": models.generation(model, batch, sizes.decode_length)}, repeats).values()
    return timed(seconds, batch * sizes.decode_length, kind="decode")


def describe(record: Mapping[str, Any], sizes: Accelerator, n_parts: int) -> str:
    """Return the finished parts as Markdown."""
    about = (
        f"Training: d_model {sizes.d_model}, {sizes.n_heads} heads, length {sizes.length:,}, batch {sizes.batch}, "
        f"{sizes.dtype}, AdamW, without dropout. Times are medians without compilation."
    )
    return render("# On an accelerator", about, record, n_parts, TABLES)


def render(title: str, about: str, record: Mapping[str, Any], n_parts: int, tables: Tables) -> str:
    """Return the finished parts as Markdown: a table for each kind of row, and the failed parts."""
    rows = record["rows"]
    text = [title, f"{len(rows)} of {n_parts} parts are done. {about}"]
    for kind, (heading, header, cells) in tables.items():
        lines = [line for name, row in rows.items() if row["kind"] == kind for line in cells(name, row)]
        text += [heading, markdown_table(header, lines)] if lines else []
    text += [f"- {name}: failed, {row['reason']}" for name, row in rows.items() if row["kind"] == "failed"]
    return "\n\n".join(text) + "\n"


def check_cells(name: str, row: Row) -> list[list[str]]:
    return [[name.partition(" ")[2], each["window"], *error_cells(each)] for each in row["comparisons"]]


def error_cells(comparison: Mapping[str, Any], times: float = TIMES) -> list[str]:
    """Return the dtype of a comparison, its errors, and whether it passes."""
    errors = [f"{comparison[name]:.1e}" for name in ("error", "of_plain")]
    return [comparison["dtype"], *errors, "yes" if is_near(comparison, times) else "NO"]


def train_cells(name: str, row: Row) -> list[list[str]]:
    milliseconds, speed = statistics.median(row["seconds"]) * 1e3, row["characters_per_second"]
    costs = [f"{row['ceiling_share']:.0%}", f"{row['memory_bytes'] / 2**30:.2f}", f"{row['compile_seconds']:.0f}"]
    return [[name.partition(" ")[2], f"{milliseconds:,.1f}", f"{speed:,.0f}", *costs]]


def decode_cells(name: str, row: Row) -> list[list[str]]:
    _, positions, batch = name.split(" ")
    return [[positions, batch, f"{row['characters_per_second']:,.0f}"]]


TABLES: Tables = {
    "check": (
        "## Kernels against plain attention in float32",
        ["kernel, positions", "window", "dtype", "error", "plain's own", "passes"],
        check_cells,
    ),
    "train": (
        "## A training step",
        ["model", "ms a step", "characters/s", "of the matmul ceiling", "GiB", "compile s"],
        train_cells,
    ),
    "decode": ("## Generation", ["positions", "batch", "characters/s"], decode_cells),
}
