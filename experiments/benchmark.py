"""Speed, beside the PyPI package hourglass-transformer-pytorch at the same sizes and in the same run.

pip install -e ".[bench]"
python experiments/benchmark.py --suite=decoding --report=experiments/results/decoding/cpu
python experiments/benchmark.py --suite=training --report=experiments/results/training/cpu
python experiments/benchmark.py --suite=decoding --nopeer --batches=1,32,256 --report=experiments/results/decoding/gpu
python experiments/benchmark.py --suite=accelerator --report=experiments/results/training/gpu    # under 10 minutes
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments.benchmarks import decoding, models, training
from experiments.common import launcher
from experiments.common.reports import PACKAGES, provenance, write_report

SUITE = flags.DEFINE_enum("suite", "decoding", ["decoding", "training", "accelerator"], "What to time.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Each figure is a median of so many.", lower_bound=1)
PEER = flags.DEFINE_boolean("peer", True, "Measure the peer too (needs the extra [bench]).")
REPORT = flags.DEFINE_string("report", "", "Write PATH.json, PATH.md and, for decoding, PATH.png.")
LENGTHS = flags.DEFINE_list("lengths", ["128", "512", "1024", "2048", "4096"], "Decoding: characters to generate.")
BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Decoding: texts at a time; the first at every length.")
launcher.define_config("accelerator", training.Accelerator())


def main(_: list[str]) -> None:
    repeats, facts = REPEATS.value, {"sizes": models.SIZES, "models": models.METHODS}
    if SUITE.value == "decoding":
        lengths, batches = ([int(n) for n in flag.value] for flag in (LENGTHS, BATCHES))
        rows = decoding.measure(lengths, batches, repeats, peer=PEER.value)
        text = decoding.describe(rows, repeats)
    elif SUITE.value == "training":
        rows = training.measure(repeats, peer=PEER.value)
        text = training.describe(rows, repeats)
    else:
        sizes = launcher.read_config("accelerator", training.Accelerator)
        rows, facts = training.measure_accelerator(sizes, repeats), {"sizes": vars(sizes)}
        text = training.describe_accelerator(rows, sizes, repeats)
    print(text)
    if REPORT.value:
        path = Path(REPORT.value)
        if SUITE.value == "decoding":
            path.parent.mkdir(parents=True, exist_ok=True)
            decoding.plot(rows, path.with_suffix(".png"))
            text += f"\n![characters per second]({path.name}.png)\n"
        beside_peer = PEER.value and SUITE.value != "accelerator"
        packages = (*PACKAGES, "torch", models.PEER) if beside_peer else PACKAGES
        write_report(path, provenance(packages) | facts | {"rows": rows}, text)


if __name__ == "__main__":
    launcher.run(main)
