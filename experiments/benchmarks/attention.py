"""The attention suite: relative attention on a GPU, as candidates beside rotary positions.

It times the kernels of a layer, checks each candidate against plain attention in float32, and times a layer's forward
and backward pass and the training step of the whole model. Each part adds a row to the record, and the same command
resumes with the first part that has no row.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.accelerator import (
    ORACLE,
    TABLES,
    Accelerator,
    Part,
    Row,
    Tables,
    error_cells,
    is_near,
    render,
    time_step,
)
from experiments.benchmarks.device import by_kind, kernels_of, launched
from experiments.benchmarks.programs import Programs
from experiments.common.timing import Step, in_turn, synthetic
from hourglass_jax.nn.attention.choice import EXPERIMENTS, IMPLEMENTATIONS
from hourglass_jax.nn.attention.kernel import call, like, run_kernels, wide
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.tiles import Arrays, Plan, forward_tile, key_tile, lag_tile, query_tile

ATTENTIONS = IMPLEMENTATIONS | EXPERIMENTS
CANDIDATES = ("kernel", *EXPERIMENTS)
BASELINE = "fused"  # with rotary positions
LAYERS = (BASELINE, "blocked", *CANDIDATES)
PATTERNS = {
    "layer": Pattern(1, 1),
    "window": Pattern(1, 1, window=64),
    "shortening": Pattern(1, 3),
    "upsampling": Pattern(3, 1),
}
CASES = [*((kind, "bfloat16") for kind in PATTERNS), ("layer", "float32")]  # float32 kernels compile slowly
TIMES = 1.5  # allowed error of a candidate, relative to that of plain attention of the same dtype
CALLS = 10  # of a layer in a timed run
KERNELS = {"forward": forward_tile, "queries": query_tile, "keys": key_tile, "lags": lag_tile}


def parts(sizes: Accelerator, repeats: int, done: Collection[str] = ()) -> dict[str, Part]:
    """Return the parts by name, in the order in which they run; those of `done` are not compiled."""
    lengths = [sizes.length, sizes.length // sizes.config().parsed_hierarchy.total_factor]
    checks = {f"check {name}": name for name in CANDIDATES}
    layers = {f"layer {name} {n}": (name, n) for n, name in itertools.product(lengths, LAYERS)}
    steps = {f"step {name}": name for name in LAYERS}
    make: dict[str, Callable[[], Any]] = {}
    for piece, kernel in KERNELS.items():
        make[f"kernels {piece}"] = partial(compile_kernel, sizes, kernel)
    for label, name in checks.items():
        for each, (kind, dtype) in itertools.product((name, ORACLE), CASES) if label not in done else ():
            make[f"{each} {kind} {dtype}"] = partial(compile_check, sizes, each, PATTERNS[kind], dtype)
    for label, (name, length) in layers.items():
        if label not in done:
            make[label] = partial(compile_layer, sizes, name, length)
    programs = Programs(make)
    models_of = Programs(
        {label: partial(compile_step, sizes, name) for label, name in steps.items() if label not in done}
    )
    found: dict[str, Part] = {"kernels": lambda: time_kernels(programs, repeats)}
    found |= {label: partial(check, sizes, programs, name) for label, name in checks.items()}
    found |= {label: partial(time_layer, programs, label, repeats) for label in layers}
    return found | {label: partial(time_model, sizes, models_of, label, repeats) for label in steps}


def random_inputs(sizes: Accelerator, name: str, pattern: Pattern, tokens: int, dtype: str) -> Inputs:
    """Return normal inputs for `tokens` tokens; without relative positions for the baseline."""
    groups, size = tokens // max(pattern[:2]), sizes.d_model // sizes.n_heads
    lags = min(groups, pattern.window or groups)
    shapes = [(sizes.batch, sizes.n_heads, groups * slots, size) for slots in (*pattern[:2], *pattern[1::-1])]
    shapes = [*shapes[:2], shapes[1], shapes[0], (pattern.query_slots, sizes.n_heads, lags * pattern.key_slots, size)]
    q, k, v, q_position, r = (
        jax.random.normal(jax.random.key(i), shape, jnp.dtype(dtype)) for i, shape in enumerate(shapes)
    )
    q, q_position = (x * jnp.asarray(size**-0.5, x.dtype) for x in (q, q_position))
    return Inputs(q, k, v) if name == BASELINE else Inputs(q, k, v, q_position, r)


def compile_kernel(sizes: Accelerator, kernel: Callable[..., Any]) -> Callable[[], Any]:
    """Return one kernel of `kernel_attention` at a layer on the tokens."""

    def alone(plan: Plan, arrays: Arrays) -> jax.Array:
        column = jnp.zeros((*arrays.q.shape[:3], 1), wide(arrays))
        more = () if kernel is forward_tile else (arrays.q, column, column)
        first = jnp.repeat(arrays.q, 2, axis=2).astype(wide(arrays)) if kernel is lag_tile else arrays.q
        outputs = like(first), None if kernel is lag_tile else like(column if kernel is forward_tile else arrays.q)
        return call(plan, kernel, arrays, more, plan.n_blocks, *outputs)[0][:, :, : arrays.q.shape[2]]

    pattern = PATTERNS["layer"]
    inputs = jax.jit(partial(random_inputs, sizes, "kernel", pattern, sizes.length, sizes.dtype))()
    return compiled(lambda inputs: run_kernels(alone, pattern, inputs, None, None), inputs)


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Compile; return a function that computes `CALLS` times and blocks."""
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready([program(*arguments) for _ in range(CALLS)])


def time_kernels(programs: Programs, repeats: int) -> Row:
    seconds = in_turn({piece: programs[f"kernels {piece}"] for piece in KERNELS}, repeats)
    return {"kind": "kernels", "seconds": {piece: statistics.median(each) / CALLS for piece, each in seconds.items()}}


def value_and_gradients(name: str, pattern: Pattern, inputs: Inputs) -> Any:
    """Return the result of attention, and the gradients of its inputs for fixed gradients of the result."""
    out, pullback = jax.vjp(lambda inputs: ATTENTIONS[name](pattern, inputs, None, None), inputs)
    return out, pullback(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))[0]


def compile_check(sizes: Accelerator, name: str, pattern: Pattern, dtype: str) -> Callable[[], Any]:
    """Return value and gradients on the device, with matrix products at its highest precision."""
    inputs = check_inputs(sizes, pattern, dtype)
    with jax.default_matmul_precision("highest"):
        program = jax.jit(partial(value_and_gradients, name, pattern)).lower(inputs).compile()
    return partial(program, inputs)


def check_inputs(sizes: Accelerator, pattern: Pattern, dtype: str) -> Inputs:
    """Return the inputs of a check, the same numbers in all dtypes."""
    inputs = random_inputs(sizes, "", pattern, sizes.check_length, "bfloat16")
    return jax.tree.map(lambda x: x.astype(dtype), inputs)


def check(sizes: Accelerator, programs: Programs, name: str) -> Row:
    """Compare a candidate with plain attention in float32 on the host."""
    comparisons, cpu = [], jax.local_devices(backend="cpu")[0]
    for kind, dtype in CASES:
        inputs = jax.device_get(check_inputs(sizes, PATTERNS[kind], "float32"))
        with jax.default_device(cpu):
            expected = jax.device_get(jax.jit(partial(value_and_gradients, ORACLE, PATTERNS[kind]))(inputs))
        results = (jax.device_get(programs[f"{each} {kind} {dtype}"]()) for each in (name, ORACLE))
        error, of_plain = (distance(found, expected) for found in results)
        comparisons.append({"pattern": kind, "dtype": dtype, "error": error, "of_plain": of_plain})
    return {"kind": "check", "comparisons": comparisons, "passed": all(is_near(each, TIMES) for each in comparisons)}


def distance(found: Any, expected: Any) -> float:
    """Return the largest root mean square of a difference, relative to that of its array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(np.float64(a) - b) / (np.linalg.norm(b) + 1e-12)) for a, b in pairs)


def compile_layer(sizes: Accelerator, name: str, length: int) -> dict[str, Callable[[], Any]]:
    """Return a layer's forward pass, and its forward and backward pass."""
    pattern = PATTERNS["layer"]
    inputs = jax.jit(partial(random_inputs, sizes, name, pattern, length, sizes.dtype))()
    return {
        "forward": compiled(lambda inputs: ATTENTIONS[name](pattern, inputs, None, None), inputs),
        "both": compiled(partial(value_and_gradients, name, pattern), inputs),
    }


def time_layer(programs: Programs, label: str, repeats: int) -> Row:
    """Time a layer's attention; the backward pass is the difference."""
    runs = programs[label]
    medians = {name: statistics.median(each) / CALLS for name, each in in_turn(runs, repeats).items()}
    forward, both = medians["forward"], medians["both"]
    return {
        "kind": "layer",
        "forward": forward,
        "backward": both - forward,
        **launched(kernels_of(runs["both"]), CALLS),
    }


def compile_step(sizes: Accelerator, name: str) -> Step:
    positions = "rotary" if name == BASELINE else "relative"
    return Step(sizes.config(positions=positions, attention=name), synthetic(sizes.batch, sizes.length))


def time_model(sizes: Accelerator, programs: Programs, label: str, repeats: int) -> Row:
    """Time a training step of the whole model, and its kernels by kind."""
    step = programs[label]
    row = time_step(sizes, step, repeats)
    kernels = kernels_of(step)
    return row | {"kind": "step", "kinds": by_kind(kernels)} | launched(kernels)


def describe(record: Mapping[str, Any], sizes: Accelerator, n_parts: int) -> str:
    """Return the finished parts as Markdown."""
    about = (
        f"Attention: {sizes.batch} rows, {sizes.n_heads} heads of {sizes.d_model // sizes.n_heads}, {sizes.dtype}. "
        f"Training: {sizes.hierarchy}, length {sizes.length:,}, AdamW. {BASELINE} has rotary positions, all others "
        f"relative ones. A check passes at {TIMES} times the error of plain attention, the largest root mean square of "
        "the result and the gradients."
    )
    return render("# Relative attention on an accelerator", about, record, n_parts, ROWS)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def check_cells(name: str, row: Row) -> list[list[Any]]:
    _, attention = name.split(" ")
    return [[attention, each["pattern"], *error_cells(each, TIMES)] for each in row["comparisons"]]


def step_cells(name: str, row: Row) -> list[list[Any]]:
    kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in row["kinds"].items())
    [cells] = TABLES["train"][2](name, row)
    return [[*cells[:-1], f"{row['launches']:.0f}", kinds]]


ROWS: Tables = {
    "kernels": (
        "## The kernels of `kernel` in a layer on the tokens, ms",
        [*KERNELS],
        lambda name, row: [[milliseconds(row["seconds"][piece]) for piece in KERNELS]],
    ),
    "check": (
        "## Candidates against plain attention in float32",
        ["attention", "pattern", "dtype", "error", "plain's own", "passes"],
        check_cells,
    ),
    "layer": (
        "## A layer's attention, ms",
        ["attention", "length", "forward", "backward"],
        lambda name, row: [[*name.split(" ")[1:], milliseconds(row["forward"]), milliseconds(row["backward"])]],
    ),
    "step": (
        "## A training step",
        [*TABLES["train"][1][:-1], "launches", "ms by kind of kernel"],
        step_cells,
    ),
}
