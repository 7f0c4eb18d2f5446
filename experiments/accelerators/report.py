"""A compiled step in figures and in words. All times are estimates, and every page says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.accelerators.roofline import ATTENTION, PRODUCTS, Roofline, Total, total
from experiments.accelerators.sources import COLLECTIVES
from experiments.accelerators.step import Compiled, Pretraining
from experiments.accelerators.targets import Target
from experiments.common.reports import markdown_table
from hourglass_jax.costs import training_flops

GIB, DAY = 2**30, 86_400
METHOD = (
    "Estimates throughout: compiled by XLA's own compiler without the device, never run, nothing autotuned. A kernel "
    f"takes the longest of its matrix products at {PRODUCTS:.0%} of the peak ({ATTENTION:.0%} inside fused attention), "
    "its memory traffic, its messages and the least time of a launch; kernels do not overlap, collectives included. "
    "What a kernel passes through the cache is not counted: on a GPU, relative logits on their way from lags to keys."
)


def summarise(run: Pretraining, target: Target, compiled: Compiled, characters: float) -> dict[str, Any]:
    """A row of a record; without an estimate where nothing was compiled."""
    row = {
        "target": target.name,
        "machine": f"{target.chips} x {target.title}",
        "model": dataclasses.asdict(run.model),
        "batch": [run.data.batch_size, run.data.block_size],
        "runtime": {name: getattr(run.runtime, name) for name in ("data", "fsdp", "accumulate")},
        "compiles": bool(compiled.text),
        "failure": first_line(compiled.failure),
        "fits": compiled.fits(target),
        "seconds_to": compiled.seconds._asdict(),
        "peak_bytes": compiled.peak,
        "memory_bytes": target.memory,
        "memory": compiled.memory and dataclasses.asdict(compiled.memory),
        "compiler_memory": compiled.analysis,
        "rematerialised_by_the_compiler": compiled.rematerialised,
    }
    if compiled.text:
        row["estimate"] = estimate(run, target, Roofline(compiled.text, target), characters)
    return row


def estimate(run: Pretraining, target: Target, roofline: Roofline, characters: float) -> dict[str, Any]:
    """Times and rates of a step, which all chips take together; FLOPs, bytes and launches are those of one chip."""
    whole, kernels = total(roofline.kernels), roofline.kernels
    batch, length = run.data.batch_size, run.data.block_size
    flops = batch * training_flops(run.model, length)
    rate = batch * length / whole.seconds
    return {
        **whole._asdict(),
        "model_flops": flops,
        "mfu": flops / (whole.seconds * target.chips * target.flops[run.model.dtype]),
        "characters_per_second": rate,
        "characters": characters,
        "days": characters / rate / DAY,
        "seconds_by_bound": dict(roofline.bounds()),
        "seconds_recomputed": sum(each.seconds * each.launches for each in kernels if each.recomputed),
        "seconds_by_the_compiler": roofline.compiler_seconds(),
        "loops_of_unknown_length": roofline.unknown_loops,
        "kernels_of_unknown_flops": sum(each.launches for each in kernels if not each.stated),
        "breakdown": {source: part._asdict() for source, part in roofline.breakdown().items()},
    }


def first_line(failure: str) -> str:
    return failure.strip().partition("\n")[0][:300]


def describe(row: dict[str, Any]) -> str:
    """A row as Markdown, for a terminal too."""
    model, (batch, length) = row["model"], row["batch"]
    runtime = "".join(f", {name} {n}" for name, n in row["runtime"].items() if n not in (-1, 1))
    parts = [
        f"## {row['name']} on {row['machine']} (estimate)",
        f"{model['hierarchy']}, d_model {model['d_model']}, {model['positions']} positions, attention "
        f"{model['attention']}, {model['dtype']}; batch {batch} x {length:,}{runtime}.",
    ]
    if row["compiles"]:
        parts += [verdict(row), memory_table(row), rates(row["estimate"]), breakdown_table(row["estimate"])]
    elif row["peak_bytes"] is not None:
        wanted, had = (n / GIB for n in (row["peak_bytes"], row["memory_bytes"]))
        parts += [f"DOES NOT FIT: the compiler wants {wanted:.2f} GiB of a chip's {had:.1f}, and made no program."]
    else:
        parts += [f"DOES NOT COMPILE for {row['target']}: {row['failure']}"]
    if not row["fits"] and row["changes"] is not None:  # None: not sought
        parts += [describe_changes(row["changes"])]
    return "\n\n".join(parts)


def verdict(row: dict[str, Any]) -> str:
    again = row["rematerialised_by_the_compiler"]
    seconds = row["seconds_to"]
    fits = f"fits into {row['memory_bytes'] / GIB:.1f} GiB" if row["fits"] else "DOES NOT FIT"
    text = (
        f"Compiles in {seconds['compile']:.0f} s, {seconds['compile_processor']:.0f} s of processor time ("
        f"{seconds['trace']:.0f} s to trace); {fits}: "
        f"{row['peak_bytes'] / GIB:.2f} GiB a chip at the peak."
    )
    return text + (f" The compiler computes {again} instructions again to save memory." if again else "")


def memory_table(row: dict[str, Any]) -> str:
    parts = [(name, f"{n / GIB:.2f}") for name, n in row["memory"].items()]
    return markdown_table(("memory of a chip", "GiB"), [*parts, ("peak", f"{row['peak_bytes'] / GIB:.2f}")])


def rates(estimate: dict[str, Any]) -> str:
    by_bound = ", ".join(
        f"{name} {seconds / estimate['seconds']:.0%}" for name, seconds in estimate["seconds_by_bound"].items()
    )
    text = (
        f"Estimate: {estimate['seconds'] * 1e3:.1f} ms a step, MFU {estimate['mfu']:.1%}, "
        f"{estimate['characters_per_second']:,.0f} characters/s, {estimate['days']:.2g} days for "
        f"{estimate['characters']:,.0f} characters. Bound by {by_bound}."
    )
    if estimate["seconds_recomputed"]:
        text += f" Rematerialisation takes {estimate['seconds_recomputed'] * 1e3:.1f} ms of it."
    if estimate["seconds_by_the_compiler"]:
        text += f" The compiler's own count of cycles comes to {estimate['seconds_by_the_compiler'] * 1e3:.1f} ms."
    if estimate["kernels_of_unknown_flops"]:
        text += f" {estimate['kernels_of_unknown_flops']} launches of kernels that do not state their FLOPs."
    if estimate["loops_of_unknown_length"]:
        text += f" {estimate['loops_of_unknown_length']} loops of unknown length are counted once."
    return text


def breakdown_table(estimate: dict[str, Any]) -> str:
    """By source; the last row is the whole."""
    sent = COLLECTIVES in estimate["breakdown"]
    header = ["source (estimate)", "ms", "share", "launches", "GFLOP", "memory GB", *(["links MB"] if sent else [])]
    whole = {name: estimate[name] for name in Total._fields}
    rows = [
        [
            source,
            f"{part['seconds'] * 1e3:.2f}",
            f"{part['seconds'] / estimate['seconds']:.0%}",
            f"{part['launches']:,}",
            f"{part['flops'] / 1e9:,.0f}",
            f"{part['memory_bytes'] / 1e9:.2f}",
            *([f"{part['link_bytes'] / 1e6:,.1f}"] if sent else []),
        ]
        for source, part in (*estimate["breakdown"].items(), ("total", whole))
    ]
    return markdown_table(header, rows)


def describe_changes(changes: Sequence[dict[str, Any]]) -> str:
    if not changes:
        return "No change of remat, accumulate or fsdp was found that makes it fit; take more chips or a smaller model."
    lines = [
        f"- `{each['flags']}`: {each['peak'] / GIB:.2f} GiB a chip, {each['seconds'] * 1e3:.1f} ms a step (estimate)"
        for each in changes
    ]
    return "\n".join(["What would make it fit, the cheapest first:", "", *lines])
