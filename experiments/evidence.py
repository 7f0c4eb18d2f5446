"""The whole evidence on one GPU that is lent for minutes: Table 1's main pairs, the other tables, learning curves.

python experiments/evidence.py --data_path=data/gutenberg8 --workers=12            again and again until all is done

A command is a slice of under 9 minutes. It trains what is next in the order of experiments/ablations/evidence.py, saves
what it is at when the time is up, brings the reports up to date, and says what comes next. All that the next slice
needs lies in --out: runs, reports, compiled programs. A narrow model leaves most of a GPU idle: --workers share it,
each at a part of its own, where NVIDIA's MPS runs (nvidia-cuda-mps-control -d) side by side and not in turn. Compiling
keeps a core busy for longer than training does: XLA_FLAGS="--xla_gpu_enable_triton_gemm=false
--xla_gpu_autotune_level=0" makes it a third.

Where a few files come back, those in $OUT, and go along the next time as $STATE, with the text packed by xz, in a line:

cat $STATE/evidence.tar.* | tar xz; mkdir -p data; xz -dc gutenberg8.xz > data/gutenberg8; PYTHONPATH=. timeout 570
    python experiments/evidence.py --data_path=data/gutenberg8 --workers=12 --keep_megabytes=45;
    tar cz runs/evidence | split -b 15M - $OUT/evidence.tar.

The scale is micro, that of the rows and curves trained on CPUs: its 20 million characters are 57 a parameter of 6@1 and
26 of 2@1 8@3 2@1, those of small 9 and 4, far before hierarchy begins to pay; and a checkpoint of 4 to 15 MB travels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags

from experiments.ablations import evidence
from experiments.ablations.evidence import Part
from experiments.ablations.rows import setup_source, valid_sample
from experiments.ablations.scales import SCALES, Setup, find_setup
from experiments.common import launcher
from experiments.common.slices import Slice, keep_compiled
from hourglass_jax import UsageError
from hourglass_jax.files import write_whole
from hourglass_jax.training.run import RunBusy
from hourglass_jax.training.signals import Interrupted, Signals

COMPILED = "compiled"  # in --out
MEMORY = 0.7  # of a GPU's, for all workers together
BEGIN, STOP = 0.85, 0.95  # of a slice: when no part is begun any more, for to compile takes a minute; when all stop

DATA_PATH = launcher.define_path("data_path", "", "The text, 100 MB in enwik8's shape.")
SCALE = flags.DEFINE_string("scale", "micro", " | ".join(SCALES))
OUT = launcher.define_path("out", "runs/evidence", "Directory of all that the next slice needs.")
RESULTS = launcher.define_path("results", "", "Directory of the reports; default: results/ in --out.")
SLICE_MINUTES = flags.DEFINE_float("slice_minutes", 8.5, "How long a slice may take.", lower_bound=0)
KEEP_MEGABYTES = flags.DEFINE_integer(
    "keep_megabytes", 0, "Of compiled programs and unfinished runs, keep in --out what fits; 0: all.", lower_bound=0
)
TABLES = flags.DEFINE_list("tables", list(evidence.NUMBERS), "The tables; the main pairs of Table 1 come before them.")
WORKERS = flags.DEFINE_integer("workers", 1, "Processes that share the device and the work.", lower_bound=1)
WORKER = flags.DEFINE_integer("worker", 0, "Which one this is; the first starts the others and writes the reports.")
launcher.define_runtime()


def main(_: list[str]) -> None:
    if not DATA_PATH.value:
        raise UsageError("--data_path is not given; give a text of 100 MB in enwik8's shape")
    out, setup = Path(OUT.value), find_setup("enwik8", SCALE.value, DATA_PATH.value)
    directory = out / f"{Path(DATA_PATH.value).name}-{SCALE.value}"
    tables = evidence.find_tables(TABLES.value)
    groups = evidence.groups(setup, directory, tables)
    parts = evidence.in_order(groups)
    keep_compiled(out / COMPILED)
    train_slice(parts, setup, directory)
    if WORKER.value:
        return
    for path in evidence.write_reports(groups, tables, setup, directory, Path(RESULTS.value or out / "results")):
        print(path)
    size = evidence.tidy(parts.values(), out, out / COMPILED, KEEP_MEGABYTES.value * 10**6)
    record = evidence.read_progress(directory, parts)
    record["rows"] = evidence.stored(directory)["rows"] | record["rows"]  # with the reasons of what failed once
    print(f"{out}: {size / 1e6:,.1f} MB\n\n{evidence.summary(groups, parts, record)}")


def train_slice(parts: Mapping[str, Part], setup: Setup, directory: Path) -> None:
    """Trains what is waiting until the time is up; the first worker starts the others, and stops them."""
    record = evidence.read_progress(directory, parts, str(WORKER.value) if WORKER.value else "*")
    if not any(evidence.is_waiting(name, record) for name in parts):
        return
    runtime = launcher.read_runtime()
    source = setup_source(setup, [part.job for part in parts.values()])
    with Signals(STOP * 60 * SLICE_MINUTES.value) as signals:
        given = (source, valid_sample(source, setup), runtime, signals)
        others = [] if WORKER.value else start_others(record, directory)
        try:
            train_own(parts, record, given, directory)
            wait_for(others, signals)
        except Interrupted as interruption:
            print(f"\n{interruption}", flush=True)
        finally:
            end(others)


def start_others(record: Mapping[str, Any], directory: Path) -> list[subprocess.Popen[bytes]]:
    """The other workers, of the same command; all go on from `record`, each with its share of a GPU's memory."""
    numbers = range(WORKERS.value)
    for path in directory.glob(evidence.RECORDS):
        path.unlink()
    for number in numbers:
        save(directory, number, record)
    if WORKERS.value > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{MEMORY / WORKERS.value:.3f}")
    command = [sys.executable, *sys.argv]
    return [  # each in a session of its own, so that a signal comes once: from here
        subprocess.Popen([*command, f"--worker={number}"], start_new_session=True) for number in numbers[1:]
    ]


def wait_for(workers: Sequence[subprocess.Popen[bytes]], signals: Signals) -> None:
    """Until all have ended; raises Interrupted for a signal, or where the time is up."""
    while any(worker.poll() is None for worker in workers):
        signals.check()
        time.sleep(0.2)


def end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stops what still runs, which saves what it is at."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    codes = [worker.wait() for worker in workers]
    if any(codes):
        print(f"workers ended with {', '.join(map(str, codes))}", flush=True)


def save(directory: Path, worker: int, record: Mapping[str, Any]) -> None:
    """A worker's record, which is its own: what another one is at would look to it as tries that came to nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / evidence.RECORDS.replace("*", str(worker)), json.dumps(record, indent=1) + "\n")


def train_own(parts: Mapping[str, Part], record: dict[str, Any], given: Sequence[Any], directory: Path) -> None:
    """Trains what `record` lacks and no other worker is at; raises Interrupted where time or a signal ends a part.

    given: the other arguments of evidence.train.
    """
    seconds = BEGIN * 60 * SLICE_MINUTES.value
    work = Slice(record, seconds, partial(save, directory, WORKER.value), whole=False)

    def train_one() -> bool:
        """Whether there was one to train."""
        record["rows"] = evidence.stored(directory)["rows"] | record["rows"]
        for name in evidence.that_can_begin(parts, record):
            try:
                work.attempt(name, partial(evidence.train, parts[name], *given))
            except RunBusy:
                continue
            print(evidence.describe(record["rows"][name]), flush=True)
            return True
        return False

    while not work.over and train_one():
        pass


if __name__ == "__main__":
    launcher.run(main)
