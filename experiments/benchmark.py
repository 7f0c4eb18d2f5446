"""Measure speed; also that of the PyPI package hourglass-transformer-pytorch with the same sizes in the same run.

pip install -e ".[bench]"
python experiments/benchmark.py --suite=decoding --report=experiments/results/decoding/cpu
python experiments/benchmark.py --suite=training --report=experiments/results/training/cpu
python experiments/benchmark.py --suite=boundaries --report=experiments/results/training/boundaries
python experiments/benchmark.py --suite=cpu --report=experiments/results/cpu/tricks
python experiments/benchmark.py --suite=quality --minutes=10 --data_path=TEXT \
    --report=experiments/results/training/quality
python experiments/benchmark.py --suite=decoding --nopeer --batches=1,32,256 --report=experiments/results/decoding/gpu
python experiments/benchmark.py --suite=accelerator --report=experiments/results/training/gpu
python experiments/benchmark.py --suite=attention --report=experiments/results/training/attention
python experiments/benchmark.py --suite=steps --report=experiments/results/decoding/steps

The last three suites write their report after each part; when one is interrupted, the same command resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags

from experiments.benchmarks import accelerator, attention, boundaries, cpu, decoding, models, quality, steps, training
from experiments.common import launcher
from experiments.common.reports import PACKAGES, open_record, provenance, report_file, write_report
from hourglass_jax import UsageError
from hourglass_jax.ranges import check_range

SUITES: dict[str, Any] = {
    "decoding": decoding,
    "training": training,
    "boundaries": boundaries,
    "cpu": cpu,
    "quality": quality,
}
IN_PARTS: dict[str, Any] = {"accelerator": accelerator, "attention": attention, "steps": steps}
SUITE = flags.DEFINE_enum("suite", "decoding", [*SUITES, *IN_PARTS], "What to measure.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of runs; figures are medians.", lower_bound=1)
PEER = flags.DEFINE_boolean("peer", True, "Also measure the PyPI package (requires the extra [bench]).")
REPORT = launcher.define_path("report", "", "Write PATH.json, PATH.md and, for decoding and quality, PATH.png.")
LENGTHS = flags.DEFINE_list("lengths", ["128", "512", "1024", "2048", "4096"], "Decoding: characters to generate.")
BATCHES = flags.DEFINE_list(
    "batches", ["1", "16"], "Decoding: batch sizes; the first is measured at all lengths, the others up to 512."
)
MINUTES = flags.DEFINE_float("minutes", 10, "Quality: minutes of training of each model.", lower_bound=0)
DATA_PATH = launcher.define_path("data_path", "", "Quality: a text; empty: the built-in one.")
launcher.define_config("accelerator", accelerator.Accelerator())

TAKEN_BY = {
    "lengths": ("--suite=decoding",),
    "batches": ("--suite=decoding",),
    "minutes": ("--suite=quality",),
    "data_path": ("--suite=quality",),
    "peer": ("--suite=decoding", "--suite=training", "--suite=quality"),
    "repeats": [f"--suite={suite}" for suite in (*SUITES, *IN_PARTS) if suite != "quality"],
    **{f"accelerator.{name}": [f"--suite={suite}" for suite in IN_PARTS] for name in vars(accelerator.Accelerator())},
}


def main(_: list[str]) -> None:
    launcher.check_taken(TAKEN_BY, f"--suite={SUITE.value}")
    if SUITE.value in IN_PARTS:
        run_in_parts(IN_PARTS[SUITE.value])
        return
    suite, packages, amount, options = SUITES[SUITE.value], PACKAGES, REPEATS.value, {}
    if SUITE.value == "decoding":
        options = {flag.name: integers(flag) for flag in (LENGTHS, BATCHES)}
    if SUITE.value == "quality":
        amount, options = MINUTES.value, {"data_path": DATA_PATH.value}
    if "--suite=" + SUITE.value in TAKEN_BY["peer"]:
        options["peer"] = PEER.value
        packages = (*PACKAGES, "torch", models.PEER) if PEER.value else PACKAGES
    rows = suite.measure(amount, **options)
    text = suite.describe(rows, amount)
    print(text)
    if REPORT.value:
        path, draw = Path(REPORT.value), getattr(suite, "draw", None)
        if draw:
            text += f"\n![the rows as a picture]({path.name}.png)\n"
        write_report(path, provenance(packages) | suite.FACTS | {"rows": rows}, text)
        if draw:
            draw(rows, report_file(path, ".png"))


def integers(flag: flags.FlagHolder) -> list[int]:
    """Return a flag's numbers. Raises UsageError for an empty list or other values."""
    if not flag.value:
        raise UsageError(f"--{flag.name} is empty; give whole numbers separated by commas")
    numbers = launcher.parse_flag(flag.name, ",".join(flag.value), lambda _: [int(n) for n in flag.value])
    for number in numbers:
        check_range(flag.name, number, 1)
    return numbers


def run_in_parts(suite: Any) -> None:
    """Run a suite part by part, resuming its record; exit with 1 if a kernel is wrong."""
    path = Path(REPORT.value or f"runs/benchmark/{SUITE.value}")
    sizes = launcher.read_config("accelerator", accelerator.Accelerator)
    source = {name: value for name, value in provenance().items() if name != "command"}
    record = open_record(path, {"sizes": vars(sizes), "repeats": REPEATS.value} | source, {"rows": {}})
    rows = record["rows"]
    parts = suite.parts(sizes, REPEATS.value, rows.keys())
    for name in accelerator.run_parts(parts, rows):
        print(f"{name}: {rows[name]}", flush=True)
        write_report(path, provenance() | record, suite.describe(record, sizes, len(parts)))
    print(suite.describe(record, sizes, len(parts)))
    if not all(row.get("passed", False) for name, row in rows.items() if name.startswith("check ")):
        sys.exit(1)


if __name__ == "__main__":
    launcher.run(main)
