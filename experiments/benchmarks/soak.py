"""Kill a run with SIGKILL many times; its result must be bit-identical to that of an uninterrupted run.

python experiments/benchmarks/soak.py
python experiments/benchmarks/soak.py --kills=50 --report=experiments/results/reliability/soak
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before any other package named experiments

import jax
import numpy as np
from absl import flags
from orbax.checkpoint import StandardCheckpointer

from experiments.common import launcher
from experiments.common.reports import EXPERIMENTS, markdown_table, provenance, write_report
from hourglass_jax import UsageError
from hourglass_jax.training.checkpoints import CHECKPOINTS, MANIFEST, CheckpointStore
from hourglass_jax.training.metrics import read_curves

KILLS = flags.DEFINE_integer("kills", 50, "Number of kills.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 1000, "Steps of the run; all kills must come before its end.")
SEED = launcher.define_seed("Seed of the kill times.")
REPORT = launcher.define_path("report", "", "Write PATH.json and PATH.md.")
WORKDIR = launcher.define_path("workdir", "", "Keep the runs in this directory; default: remove them.")

# With dropout: a key used twice or skipped changes every later parameter.
RUN = ["--data_path=text.txt", "--hierarchy=0@1 1@2 0@1", "--d_model=32", "--n_heads=2", "--d_ff=64", "--dropout=0.1"]
RUN += ["--block_size=32", "--batch_size=4", "--optimizer.warmup_steps=5", "--train.eval_interval=10", "--eval_iter=2"]
RUN += ["--optimizer.optimizer=muon", "--optimizer.ema=0.99"]  # the state has every kind of array
INTERVAL = 2  # steps between checkpoints of the killed run; the other run saves at evaluations
WORDS = "the quick brown fox jumps over a lazy dog while five wizards mix jugs of quartz pink vow"
WORDS_DRAWN = 4000
# Curves that do not depend on time.
LEARNED = ("train_loss", "gradient_norm", "parameter_norm", "learning_rate", "valid_loss")
MOMENTS = {
    "starting": "imports, compilation, restoring, the first steps",
    "training": "training between two saves",
    "writing": "a checkpoint being written",
    "sealing or removing": "a checkpoint being sealed, or an old one being removed",
}
PATIENCE = 1200  # seconds after which a process counts as hanging


class Watched:
    """A process of pretrain.py, observed through its checkpoint directory."""

    def __init__(self, workdir: Path, out: str, *options: str):
        self.checkpoints = workdir / out / CHECKPOINTS
        self.log = workdir / f"{out}.stderr"
        self.present, self.changes, self.started = self.unwritten(), 0, time.monotonic()
        command = [sys.executable, EXPERIMENTS / "pretrain.py", *RUN, f"--out={out}", *options]
        cache = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").absolute())}
        environment = os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with self.log.open("w") as log:
            pipes = {"stdout": subprocess.DEVNULL, "stderr": log}
            self.process = subprocess.Popen(command, cwd=workdir, env=environment, **pipes)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def unwritten(self) -> set[str]:
        """Return the checkpoints that orbax is still writing."""
        return {path.name for path in self.checkpoints.glob("*.orbax-checkpoint-tmp*")}

    def watch(self, *, changes: int = 0, seconds: float = 0.0) -> None:
        """Wait until writes have started or ended `changes` times, then `seconds`; or until the process ends."""
        met = None
        while self.process.poll() is None and (met is None or time.monotonic() < met + seconds):
            present = self.unwritten()
            began, ended = present - self.present, self.present - present
            self.changes += bool(began) + bool(ended and self.changes)  # without the removal of a kill's leftovers
            self.present = present
            if met is None and self.changes >= changes:
                met = time.monotonic()
            if time.monotonic() > self.started + PATIENCE:
                raise UsageError(f"pretrain.py takes more than {PATIENCE} s to write a checkpoint; see {self.log}")
            time.sleep(0.001)

    def kill(self) -> str:
        """Send SIGKILL, and return what it interrupted, judged by the checkpoint directory."""
        self.process.kill()
        self.process.wait()
        if not self.changes:
            return "starting"
        if self.unwritten():
            return "writing"
        unsealed = [path for path in self.checkpoints.iterdir() if not (path / MANIFEST).exists()]
        return "sealing or removing" if unsealed else "training"

    def finish(self) -> None:
        """Wait for the process. Raises UsageError if it fails or hangs."""
        try:
            failed = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise UsageError(f"pretrain.py takes more than {PATIENCE} s; see {self.log}") from None
        if failed:
            lines = self.log.read_text(errors="replace").splitlines() or ["no message"]
            raise UsageError(f"pretrain.py ended with exit code {failed}: {lines[-1]}")


def final_state(directory: Path) -> tuple[int, dict[str, Any]]:
    """Return the newest intact step, its parameters and optimizer state."""
    store = CheckpointStore(directory)
    step = store.sound_step()
    store.close()
    if step is None:
        raise UsageError(f"{directory}: has no intact checkpoint")
    checkpoint = (directory / CHECKPOINTS / str(step)).absolute()
    return step, {name: StandardCheckpointer().restore(checkpoint / name) for name in ("opt_state", "params")}


def compare(first: Path, second: Path) -> dict[str, bool]:
    """Return which parts of two runs' final states are bit-identical."""
    (step, state), (other_step, other_state) = map(final_state, (first, second))
    same = {"step": step == other_step}
    for name, tree in state.items():
        pairs = zip(*map(jax.tree.leaves, (tree, other_state[name])), strict=True)
        same[name] = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    names = ("step", *LEARNED)
    curves = [[[each.get(name) for name in names] for each in read_curves(path)] for path in (first, second)]
    return same | {"curves": curves[0] == curves[1] != []}


def soak(workdir: Path, *, kills: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Train twice in `workdir`, without and with `kills` kills, and return a record that compares the results.

    Every other kill comes up to 30 ms after a checkpoint write starts or ends; the others come at a random time, up to
    a second after the first write. The record's "failure" is set if a restart failed, or the run ended early.
    """
    rng, started = random.Random(seed), time.perf_counter()
    record: dict[str, Any] = {"kills": [], "starts": 0, "passed_over": 0, "failure": "", "same": {}}
    (workdir / "text.txt").write_text(" ".join(rng.choices(WORDS.split(), k=WORDS_DRAWN)))
    with Watched(workdir, "whole", f"--steps={steps}") as run:
        run.finish()
    record["seconds_whole"] = time.perf_counter() - started
    life = 0.0  # seconds until the last process that was killed in a write got there
    try:
        for number in range(kills + 1):
            with Watched(workdir, "killed", f"--steps={steps}", f"--checkpoint_interval={INTERVAL}") as run:
                record["starts"] += 1
                if number == kills:
                    run.finish()
                elif aimed := number % 2 == 0:
                    run.watch(changes=rng.randint(1, 8), seconds=rng.uniform(0, 0.03))
                    life = time.monotonic() - run.started
                else:
                    run.watch(seconds=rng.uniform(0, life + 1))
                if run.process.poll() is None:
                    moment = run.kill()
                    record["kills"].append({"aimed": aimed, "moment": moment, "saves_begun": (run.changes + 1) // 2})
                elif number < kills:
                    run.finish()
                    raise UsageError(f"the run ended after {number} of {kills} kills; increase --steps")
                record["passed_over"] += run.log.read_text(errors="replace").count("skipping the checkpoint")
        record["same"] = compare(workdir / "whole", workdir / "killed")
    except UsageError as failure:
        record["failure"] = str(failure)
    record["identical"] = bool(record["same"]) and all(record["same"].values())
    moments = [kill["moment"] for kill in record["kills"]]
    record["during_saves"] = sum(moment in ("writing", "sealing or removing") for moment in moments)
    record["summary"] = (
        f"{len(moments)} kills, {record['during_saves']} of them during a save: "
        f"{'identical' if record['identical'] else 'NOT identical'} to an uninterrupted run of {steps} steps"
    )
    return record | {"steps": steps, "seed": seed, "seconds": time.perf_counter() - started}


def describe(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    moments = [kill["moment"] for kill in record["kills"]]
    table = [(words, moments.count(moment)) for moment, words in MOMENTS.items()]
    same = "\n".join(f"- {name}: {'identical' if value else 'DIFFERENT'}" for name, value in record["same"].items())
    return f"""# {record["summary"]}

- The same command was started {record["starts"]} times, and killed with SIGKILL {len(moments)} times.
- {record["failure"] or "Every start resumed the run."}
- Starts skipped incomplete checkpoints {record["passed_over"]} times.
- A checkpoint was written every {INTERVAL} steps.

{markdown_table(("what the kill interrupted", "kills"), table)}

Compared bit for bit, at step {record["steps"]}, with an uninterrupted run that saved only at evaluations:

{same}

Took {record["seconds"]:.0f} s, {record["seconds_whole"]:.0f} of them for the uninterrupted run; seed {record["seed"]}.

The run trained on {WORDS_DRAWN:,} random words: `python experiments/pretrain.py {shlex.join(record["run"])}`
"""


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(WORKDIR.value or temporary)
        workdir.mkdir(parents=True, exist_ok=True)
        for name in ("whole", "killed"):
            if (workdir / name).exists():
                raise UsageError(f"{workdir / name}: exists; remove it or give another --workdir")
        record = soak(workdir, kills=KILLS.value, steps=STEPS.value, seed=SEED.value)
    print(f"{record['summary']} ({record['seconds']:.0f} s)")
    if REPORT.value:
        record |= provenance() | {"run": [*RUN, f"--steps={STEPS.value}", f"--checkpoint_interval={INTERVAL}"]}
        write_report(Path(REPORT.value), record, describe(record))
    if not record["identical"]:
        raise UsageError(record["failure"] or f"the runs differ: {record['same']}")


if __name__ == "__main__":
    launcher.run(main)
