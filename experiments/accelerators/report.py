"""Report of a compiled step: whether it fits, what takes the memory, its time at a share of the chip's peak, advice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.accelerators.step import Compiled, Pretraining
from experiments.accelerators.targets import Target
from experiments.common.reports import markdown_table
from hourglass_jax.costs import training_flops

GIB, DAY = 2**30, 86_400
SHARES = (1.0, 0.4)  # of the peak FLOP/s: the bound, and what a well-tuned transformer reaches
N_CHANGES = 2
FLAGS = {"accumulate": "--runtime.accumulate", "fsdp": "--runtime.fsdp", "remat": "--model.remat"}


def describe(run: Pretraining, target: Target, compiled: Compiled, characters: float) -> str:
    """Return Markdown; `characters` are those of the whole training."""
    model, data, runtime = run.model, run.data, run.runtime
    parts = [
        f"## {model.hierarchy} on {target.chips} x {target.title}",
        f"d_model {model.d_model}, {model.positions} positions, attention {model.attention}, {model.dtype}; batch "
        f"{data.batch_size} x {data.block_size:,}, data {runtime.data}, fsdp {runtime.fsdp}, accumulate "
        f"{runtime.accumulate}.",
    ]
    if compiled.text:
        fits = "fits" if compiled.fits(target) else "DOES NOT FIT"
        memory = compiled.memory | {"peak": compiled.peak, "memory of a chip": target.memory}
        cells = [(name, f"{n_bytes / GIB:.2f}") for name, n_bytes in memory.items()]
        parts += [
            f"Compiles in {compiled.seconds:.0f} s and {fits}.",
            markdown_table(("memory per chip", "GiB"), cells),
        ]
    elif compiled.peak is not None:
        wanted, had = compiled.peak / GIB, target.memory / GIB
        parts.append(f"DOES NOT FIT: the step requires {wanted:.2f} GiB per chip, but a chip has {had:.1f} GiB.")
    else:
        parts.append(f"DOES NOT COMPILE for {target.name}: {compiled.failure.strip().partition(chr(10))[0][:300]}")
    return "\n\n".join([*parts, time_table(run, target, characters)])


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


class Change(NamedTuple):
    """Options that make the step fit, and its peak memory with them in bytes per chip."""

    options: dict[str, Any]
    peak: float


def kinds_of_change(run: Pretraining, chips: int) -> list[list[dict[str, Any]]]:
    """Return the options of each kind of change, mildest first, and last all kinds combined.

    The kinds are ordered by cost: accumulate adds no FLOPs, fsdp adds communication, remat adds up to a third of the
    FLOPs.
    """
    rows, runtime = run.data.batch_size // chips, run.runtime
    values: dict[str, list[Any]] = {
        "accumulate": [n for n in range(runtime.accumulate + 1, rows + 1) if rows % n == 0 and not n & (n - 1)],
        "fsdp": [n for n in range(runtime.fsdp + 1, chips + 1) if chips % n == 0] if runtime.data == -1 else [],
        "remat": {"dots": ["full"], "full": []}.get(run.model.remat, ["dots", "full"]),
    }
    combined = {name: found[-1] for name, found in values.items() if found}
    kinds = [[{name: value} for value in found] for name, found in values.items()]
    return [*kinds, [combined] if len(combined) > 1 else []]


def cheapest_changes(run: Pretraining, target: Target, compile_run: Callable[[Pretraining], Compiled]) -> list[Change]:
    """Return at most two changes with which the step fits: the mildest of each kind, or all kinds combined."""
    found: list[Change] = []
    for kind in kinds_of_change(run, target.chips):
        if len(found) == N_CHANGES:
            break
        for options in kind:
            compiled = compile_run(run.changed(**options))
            if compiled.fits(target) and compiled.peak is not None:
                found.append(Change(options, compiled.peak))
                break
    return found


def describe_changes(changes: Sequence[Change]) -> str:
    if not changes:
        return "No change of accumulate, fsdp or remat makes it fit; use more chips or a smaller model."
    lines = ["Changes that make it fit, the cheapest first:", ""]
    for options, peak in changes:
        given = " ".join(f"{FLAGS[name]}={value}" for name, value in options.items())
        lines.append(f"- `{given}`: {peak / GIB:.2f} GiB per chip")
    return "\n".join(lines)
