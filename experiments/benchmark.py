"""Speed, beside the PyPI package hourglass-transformer-pytorch at the same sizes and in the same run.

pip install -e ".[bench]"
python experiments/benchmark.py --suite=decoding --report=experiments/results/decoding/cpu
python experiments/benchmark.py --suite=training --report=experiments/results/training/cpu
python experiments/benchmark.py --suite=boundaries --report=experiments/results/training/boundaries
python experiments/benchmark.py --suite=decoding --nopeer --batches=1,32,256 --report=experiments/results/decoding/gpu
python experiments/benchmark.py --suite=accelerator --report=experiments/results/training/gpu    until all is done

The accelerator suite runs in slices of under 9 minutes: what is measured and compiled is kept beside the report, and
the same command goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags

from experiments.benchmarks import accelerator, boundaries, decoding, models, training
from experiments.common import launcher
from experiments.common.reports import PACKAGES, provenance, read_record, report_file, write_report
from experiments.common.slices import Slice, keep_compiled
from hourglass_jax import UsageError
from hourglass_jax.ranges import check_range
from hourglass_jax.training.identity import described, differences

SUITE = flags.DEFINE_enum("suite", "decoding", ["decoding", "training", "boundaries", "accelerator"], "What to time.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Each figure is a median of so many.", lower_bound=1)
PEER = flags.DEFINE_boolean("peer", True, "Measure the peer too (needs the extra [bench]).")
REPORT = launcher.define_path("report", "", "Write PATH.json, PATH.md and, for decoding, PATH.png.")
LENGTHS = flags.DEFINE_list("lengths", ["128", "512", "1024", "2048", "4096"], "Decoding: characters to generate.")
BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Decoding: texts at a time; the first at every length.")
SLICE_MINUTES = flags.DEFINE_float("slice_minutes", 8.5, "Accelerator: begin no part that would end later than this.")
launcher.define_config("accelerator", accelerator.Accelerator())

TAKEN_BY = {
    "lengths": ("--suite=decoding",),
    "batches": ("--suite=decoding",),
    "peer": ("--suite=decoding", "--suite=training"),
    "slice_minutes": ("--suite=accelerator",),
    **{f"accelerator.{name}": ("--suite=accelerator",) for name in vars(accelerator.Accelerator())},
}


def main(_: list[str]) -> None:
    launcher.check_taken(TAKEN_BY, f"--suite={SUITE.value}")
    if SUITE.value == "accelerator":
        run_accelerator()
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
        with_peer = PEER.value and SUITE.value != "boundaries"
        packages = (*PACKAGES, "torch", models.PEER) if with_peer else PACKAGES
        write_report(path, provenance(packages) | facts | {"rows": rows}, text)


def integers(flag: flags.FlagHolder) -> list[int]:
    """Of a list; raises UsageError for what is none, or empty."""
    if not flag.value:
        raise UsageError(f"--{flag.name} is empty; give whole numbers with commas between")
    numbers = launcher.parse_flag(flag.name, ",".join(flag.value), lambda _: [int(n) for n in flag.value])
    for number in numbers:
        check_range(flag.name, number, 1)
    return numbers


def run_accelerator() -> None:
    """A slice of the accelerator suite; ends with 1 where a kernel is wrong."""
    path = Path(REPORT.value or "runs/benchmark/accelerator")
    keep_compiled(path.parent / "compiled")
    sizes = launcher.read_config("accelerator", accelerator.Accelerator)
    settings = json.loads(json.dumps({"sizes": vars(sizes), "repeats": REPEATS.value}))
    settings |= {name: value for name, value in provenance().items() if name != "command"}
    record = read_record(report_file(path, ".json")) or settings | {"rows": {}, "tries": {}}
    if different := differences({name: record.get(name) for name in settings}, settings):
        raise UsageError(f"{path}.json: was measured otherwise ({described(different)}); give another --report")
    parts = accelerator.parts(sizes, REPEATS.value)

    def save(record: dict[str, Any]) -> None:
        write_report(path, provenance() | record, accelerator.describe(record, sizes, len(parts)))

    for name in Slice(record, SLICE_MINUTES.value * 60, save).run(parts):
        print(f"{name}: {record['rows'][name]}", flush=True)
    print(accelerator.describe(record, sizes, len(parts)))
    if len(record["rows"]) < len(parts):
        print(f"{len(record['rows'])} of {len(parts)} parts are done; the same command goes on")
    checks = [row for name, row in record["rows"].items() if name.startswith("check ")]
    if not all(row.get("passed", False) for row in checks):  # one that raised has no such entry
        sys.exit(1)


if __name__ == "__main__":
    launcher.run(main)
