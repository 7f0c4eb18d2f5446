"""Report of a compiled step: whether it fits, what takes the memory, and the time at a share of the chip's peak."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.accelerators.advice import Change
from experiments.accelerators.step import Compiled, Pretraining
from experiments.accelerators.targets import Target
from experiments.common.reports import markdown_table
from hourglass_jax.costs import training_flops

GIB, DAY = 2**30, 86_400
SHARES = (1.0, 0.4)  # of the peak FLOP/s: the bound, and what a well-tuned transformer reaches


def describe(run: Pretraining, target: Target, compiled: Compiled, characters: float) -> str:
    """Return Markdown; `characters` are those of the whole training."""
    model, data = run.model, run.data
    parts = [
        f"## {model.hierarchy} on {target.chips} x {target.title}",
        f"d_model {model.d_model}, {model.positions} positions, attention {model.attention}, {model.dtype}; batch "
        f"{data.batch_size} x {data.block_size:,}, data {run.runtime.data}, fsdp {run.runtime.fsdp}, accumulate "
        f"{run.runtime.accumulate}.",
    ]
    if compiled.memory is not None:
        fits = "fits" if compiled.fits(target) else "DOES NOT FIT"
        parts += [f"Compiles in {compiled.seconds:.0f} s and {fits}.", memory_table(compiled, target)]
    elif compiled.peak is not None:
        wanted, had = compiled.peak / GIB, target.memory / GIB
        parts.append(f"DOES NOT FIT: the step requires {wanted:.2f} GiB per chip, but a chip has {had:.1f} GiB.")
    else:
        parts.append(f"DOES NOT COMPILE for {target.name}: {compiled.failure.strip().partition(chr(10))[0][:300]}")
    return "\n\n".join([*parts, time_table(run, target, characters)])


def memory_table(compiled: Compiled, target: Target) -> str:
    assert compiled.memory is not None
    parts = {**vars(compiled.memory), "peak": compiled.memory.peak, "memory of a chip": target.memory}
    return markdown_table(
        ("memory per chip", "GiB"), [(name.replace("_", " "), f"{n / GIB:.2f}") for name, n in parts.items()]
    )


def step_seconds(run: Pretraining, target: Target, share: float) -> float:
    """Return the time of a step on all chips at a share of their peak, from the model's FLOPs."""
    flops = run.data.batch_size * training_flops(run.model, run.data.block_size)
    return flops / (share * target.chips * target.flops[run.model.dtype])


def time_table(run: Pretraining, target: Target, characters: float) -> str:
    rows = []
    for share in SHARES:
        seconds = step_seconds(run, target, share)
        rate = run.data.batch_size * run.data.block_size / seconds
        rows.append((f"{share:.0%}", f"{seconds * 1e3:,.2f}", f"{rate:,.0f}", f"{characters / rate / DAY:.2g}"))
    return markdown_table(
        ("of peak FLOP/s", "ms a step", "characters/s", f"days for {characters:,.0f} characters"), rows
    )


def describe_changes(changes: Sequence[Change]) -> str:
    if not changes:
        return "No change of accumulate, fsdp or remat makes it fit; use more chips or a smaller model."
    lines = [f"- `{change.flags}`: {change.peak / GIB:.2f} GiB per chip" for change in changes]
    return "\n".join(["Changes that make it fit, the cheapest first:", "", *lines])
