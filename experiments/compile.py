"""Will it fit, and how fast at best: compiles pretraining's step for an accelerator that need not be at hand.

python experiments/compile.py --target=h100 --hierarchy="4@1 8@3 4@1" --d_model=768 --d_ff=3072 --n_heads=8 ...
python experiments/compile.py --target=8xh100 --fsdp=8 <any options of pretrain.py>
python experiments/compile.py --target=v5e-16 --report=experiments/results/accelerators/mine <any options>

XLA's own compiler says whether the step compiles and fits; times are estimated from the program it made, and never
measured. Needs the extra [cuda] or [tpu], and no device. Targets are the files of experiments/accelerators/targets.
Ends with 1 where the step does not compile or does not fit.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

import jax
from absl import flags

from experiments.accelerators import pages, report
from experiments.accelerators.advice import cheapest_changes
from experiments.accelerators.roofline import Roofline, total
from experiments.accelerators.step import Compiled, Pretraining, compile_step
from experiments.accelerators.targets import find_target, known_targets
from experiments.common import launcher, pretraining
from experiments.common.sources import read_tokenizer
from hourglass_jax import RuntimeConfig, UsageError

TARGET = flags.DEFINE_string(
    "target", None, f"The machine: {', '.join(known_targets())}; several chips as 8xh100 or v5e-16.", required=True
)
CHARACTERS = flags.DEFINE_float("characters", None, "To say how many days they take; default: those of the run.")
ADVICE = flags.DEFINE_boolean("advice", True, "Where it does not fit, compile changes until two are found that do.")
NAME = flags.DEFINE_string("name", None, "What reports call the row; default: the positions.")
REPORT = launcher.define_path("report", "", "Add the row to PATH.json, and draw PATH.md and PATH.png anew.")
PROGRAM = launcher.define_path("program", "", "Write the compiled program's text here.")
flags.adopt_module_key_flags(pretraining)  # so that --help shows them


def read_pretraining() -> Pretraining:
    data, optimizer, train = pretraining.read_configs()
    if train.shorten_factors:
        raise UsageError("--shorten_factors draws between several programs; leave it out, and give --hierarchy of one")
    origin = tokenizer = None
    if pretraining.INIT_FROM.value:
        origin, tokenizer, _ = launcher.load_origin(pretraining.INIT_FROM.value)
    tokenizer = tokenizer or read_tokenizer(data, pretraining.VOCAB_PATH.value)
    data = pretraining.in_tokens_of(tokenizer, data)
    if tokenizer.kind == "image":
        data = dataclasses.replace(data, block_size=tokenizer.n_tokens)
    config = pretraining.read_model(tokenizer, origin.config if origin else None)
    if origin:
        origin.reconfigured(config)  # raises where its parameters do not fit
    return Pretraining(config, data, optimizer, train, launcher.read_config("runtime", RuntimeConfig))


def main(_: list[str]) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or its compiler looks for a TPU in the network
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # seconds are of compiling, not of reading
    target, run = find_target(TARGET.value), read_pretraining()
    devices = target.devices()
    compiled = compile_step(run, target, devices)

    def attempt(changed: Pretraining) -> tuple[Compiled, float]:
        print(f"trying remat {changed.model.remat}, {changed.runtime}", file=sys.stderr, flush=True)
        result = compile_step(changed, target, devices)
        return result, total(Roofline(result.text, target).kernels).seconds if result.text else float("inf")

    if PROGRAM.value:
        Path(PROGRAM.value).write_text(compiled.text)
    characters = CHARACTERS.value or run.train.steps * run.data.batch_size * run.data.block_size
    row = {"name": NAME.value or run.model.positions} | report.summarise(run, target, compiled, characters)
    changes = None
    if compiled.peak is not None and not row["fits"] and ADVICE.value:
        changes = cheapest_changes(run, target.chips, lambda result: result.fits(target), attempt)
    row["changes"] = changes and [{"flags": change.flags} | change._asdict() for change in changes]
    print(report.describe(row))
    print(f"\n{report.METHOD}")
    if REPORT.value:
        pages.add_row(Path(REPORT.value), row)
    if not row["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    launcher.run(main)
