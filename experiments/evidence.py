"""The whole evidence on one GPU that is lent for minutes: Table 1's main pairs, the other tables, learning curves.

python experiments/evidence.py --data_path=data/gutenberg8                         again and again until all is done

A command is a slice of under 9 minutes. It trains what is next in the order of experiments/ablations/evidence.py, saves
what it is at when the time is up, brings the reports up to date, and says what comes next. All that the next slice
needs lies in --out: runs, reports, compiled programs.

Where a few files come back, those in $OUT, and go along the next time as $STATE, with the text packed by xz, in a line:

cat $STATE/evidence.tar.* | tar xz; mkdir -p data; xz -dc gutenberg8.xz > data/gutenberg8; PYTHONPATH=. timeout 570
    python experiments/evidence.py --data_path=data/gutenberg8; tar cz runs/evidence | split -b 15M - $OUT/evidence.tar.

The scale is micro, that of the rows and curves trained on CPUs: its 20 million characters are 57 a parameter of 6@1 and
26 of 2@1 8@3 2@1, those of small 9 and 4, far before hierarchy begins to pay; and a checkpoint of 4 to 15 MB travels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from experiments.ablations import evidence
from experiments.ablations.evidence import Part
from experiments.ablations.rows import setup_source, valid_sample
from experiments.ablations.scales import SCALES, Setup, find_setup
from experiments.common import launcher
from experiments.common.slices import Slice, keep_compiled
from hourglass_jax import UsageError
from hourglass_jax.files import write_whole
from hourglass_jax.training.signals import Interrupted, Signals

RECORD, COMPILED = "slices.json", "compiled"  # in the directory of the runs, and in --out
BEGIN, STOP = 0.85, 0.95  # of a slice: when no part is begun any more, for to compile takes a minute; when all stop

DATA_PATH = launcher.define_path("data_path", "", "The text, 100 MB in enwik8's shape.")
SCALE = flags.DEFINE_string("scale", "micro", " | ".join(SCALES))
OUT = launcher.define_path("out", "runs/evidence", "Directory of all that the next slice needs.")
RESULTS = launcher.define_path("results", "", "Directory of the reports; default: results/ in --out.")
SLICE_MINUTES = flags.DEFINE_float("slice_minutes", 8.5, "How long a slice may take.", lower_bound=0)
KEEP_MEGABYTES = flags.DEFINE_integer(
    "keep_megabytes", 28, "Of compiled programs and unfinished runs, keep in --out what fits; 0: all.", lower_bound=0
)
launcher.define_runtime()


def main(_: list[str]) -> None:
    if not DATA_PATH.value:
        raise UsageError("--data_path is not given; give a text of 100 MB in enwik8's shape")
    out = Path(OUT.value)
    setup = find_setup("enwik8", SCALE.value, DATA_PATH.value)
    directory = out / f"{Path(DATA_PATH.value).name}-{SCALE.value}"
    groups = evidence.groups(setup, directory)
    parts = evidence.in_order(groups)
    record = evidence.read_progress(directory / RECORD, parts)
    keep_compiled(out / COMPILED)
    if any(evidence.is_waiting(name, record) for name in parts):
        run_slice(parts, record, setup, directory)
    for path in evidence.write_reports(groups, setup, directory, Path(RESULTS.value or out / "results")):
        print(path)
    print(f"{out}: {tidy(parts) / 1e6:,.1f} MB\n\n{evidence.summary(groups, parts, record)}")


def run_slice(parts: Mapping[str, Part], record: dict[str, Any], setup: Setup, directory: Path) -> None:
    """Trains what `record` lacks, until the time is up or a signal comes."""
    seconds = 60 * SLICE_MINUTES.value

    def save(record: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / RECORD, json.dumps(record, indent=1) + "\n")

    with Signals(STOP * seconds) as signals:
        work = Slice(record, BEGIN * seconds, save, whole=False)
        runtime = launcher.read_runtime()
        source = setup_source(setup, [part.job for part in parts.values()])
        given = (source, valid_sample(source, setup), runtime, signals)
        try:
            for name in work.run({name: partial(evidence.train, part, *given) for name, part in parts.items()}):
                print(evidence.describe(record["rows"][name]), flush=True)
                tidy(parts)
        except Interrupted as interruption:
            print(f"\n{interruption}", flush=True)


def tidy(parts: Mapping[str, Part]) -> int:
    out = Path(OUT.value)
    return evidence.tidy(parts.values(), out, out / COMPILED, KEEP_MEGABYTES.value * 10**6)


if __name__ == "__main__":
    launcher.run(main)
