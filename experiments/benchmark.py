"""Measure speed; also that of the PyPI package hourglass-transformer-pytorch with the same sizes in the same run.

pip install -e ".[bench]"
python experiments/benchmark.py --suite=decoding --report=experiments/results/decoding/cpu
python experiments/benchmark.py --suite=training --report=experiments/results/training/cpu
python experiments/benchmark.py --suite=boundaries --report=experiments/results/training/boundaries
python experiments/benchmark.py --suite=cpu --report=experiments/results/cpu/tricks
python experiments/benchmark.py --suite=decoding --nopeer --batches=1,32,256 --report=experiments/results/decoding/gpu
python experiments/benchmark.py --suite=accelerator --report=experiments/results/training/gpu
python experiments/benchmark.py --suite=attention --report=experiments/results/training/attention
python experiments/benchmark.py --suite=steps --report=experiments/results/decoding/steps

The last three suites write their report after each part; when one is interrupted, the same command resumes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags

from experiments.benchmarks import accelerator, attention, boundaries, cpu, decoding, models, steps, training
from experiments.common import launcher
from experiments.common.reports import PACKAGES, provenance, read_record, report_file, write_report
from hourglass_jax import UsageError
from hourglass_jax.ranges import check_range
from hourglass_jax.training.identity import describe, differences

IN_PARTS: dict[str, Any] = {"accelerator": accelerator, "attention": attention, "steps": steps}
SUITE = flags.DEFINE_enum(
    "suite", "decoding", ["decoding", "training", "boundaries", "cpu", *IN_PARTS], "What to measure."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of runs; figures are medians.", lower_bound=1)
PEER = flags.DEFINE_boolean("peer", True, "Also measure the PyPI package (requires the extra [bench]).")
REPORT = launcher.define_path("report", "", "Write PATH.json, PATH.md and, for decoding, PATH.png.")
LENGTHS = flags.DEFINE_list("lengths", ["128", "512", "1024", "2048", "4096"], "Decoding: characters to generate.")
BATCHES = flags.DEFINE_list(
    "batches", ["1", "16"], "Decoding: batch sizes; the first is measured at all lengths, the others up to 512."
)
launcher.define_config("accelerator", accelerator.Accelerator())

TAKEN_BY = {
    "lengths": ("--suite=decoding",),
    "batches": ("--suite=decoding",),
    "peer": ("--suite=decoding", "--suite=training"),
    **{f"accelerator.{name}": [f"--suite={suite}" for suite in IN_PARTS] for name in vars(accelerator.Accelerator())},
}


def main(_: list[str]) -> None:
    launcher.check_taken(TAKEN_BY, f"--suite={SUITE.value}")
    if SUITE.value in IN_PARTS:
        run_in_parts(IN_PARTS[SUITE.value])
        return
    repeats, facts = REPEATS.value, {"sizes": models.SIZES, "models": models.METHODS}
    if SUITE.value == "decoding":
        lengths, batches = map(integers, (LENGTHS, BATCHES))
        rows = decoding.measure(lengths, batches, repeats, peer=PEER.value)
        text = decoding.describe(rows, repeats)
    elif SUITE.value == "boundaries":
        facts = {"sizes": models.SIZES | {"hierarchy": boundaries.HIERARCHY}}
        rows = boundaries.measure(repeats)
        text = boundaries.describe(rows, repeats)
    elif SUITE.value == "cpu":
        facts = {"sizes": models.SIZES}
        rows = cpu.measure(repeats)
        text = cpu.describe(rows, repeats)
    else:
        rows = training.measure(repeats, peer=PEER.value)
        text = training.describe(rows, repeats)
    print(text)
    if REPORT.value:
        path = Path(REPORT.value)
        if SUITE.value == "decoding":
            path.parent.mkdir(parents=True, exist_ok=True)
            decoding.plot(rows, report_file(path, ".png"))
            text += f"\n![characters per second]({path.name}.png)\n"
        with_peer = PEER.value and SUITE.value in ("decoding", "training")
        packages = (*PACKAGES, "torch", models.PEER) if with_peer else PACKAGES
        write_report(path, provenance(packages) | facts | {"rows": rows}, text)


def integers(flag: flags.FlagHolder) -> list[int]:
    """Return a flag's numbers. Raises UsageError for an empty list or other values."""
    if not flag.value:
        raise UsageError(f"--{flag.name} is empty; give whole numbers separated by commas")
    numbers = launcher.parse_flag(flag.name, ",".join(flag.value), lambda _: [int(n) for n in flag.value])
    for number in numbers:
        check_range(flag.name, number, 1)
    return numbers


def run_in_parts(suite: Any) -> None:
    """Run a suite on an accelerator, part by part; exit with 1 if a kernel is wrong."""
    path = Path(REPORT.value or f"runs/benchmark/{SUITE.value}")
    sizes = launcher.read_config("accelerator", accelerator.Accelerator)
    settings = json.loads(json.dumps({"sizes": vars(sizes), "repeats": REPEATS.value}))
    settings |= {name: value for name, value in provenance().items() if name != "command"}
    record = read_record(report_file(path, ".json")) or settings | {"rows": {}}
    if different := differences({name: record.get(name) for name in settings}, settings):
        raise UsageError(
            f"{path}.json: was measured with other settings ({describe(different)}); give another --report"
        )
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
