"""Compile the pretraining step for an accelerator that need not be present; report whether it fits, and its time.

python experiments/compile.py --target=h100 --hierarchy="4@1 8@3 4@1" --d_model=768 --d_ff=3072 --n_heads=8 ...
python experiments/compile.py --target=8xh100 --fsdp=8 <any options of pretrain.py>

XLA's compiler decides whether the step compiles and fits. Times come from the model's FLOPs, at 100 % and 40 % of the
chips' peak. Requires the extra [cuda] or [tpu], and no device. Targets are the files in
experiments/accelerators/targets. The exit code is 1 if the step does not compile or does not fit.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

import jax
from absl import flags

from experiments.accelerators import report
from experiments.accelerators.step import Compiled, Pretraining, compile_step
from experiments.accelerators.targets import find_target, known_targets
from experiments.common import launcher, pretraining
from experiments.common.sources import read_tokenizer
from hourglass_jax import RuntimeConfig, UsageError

TARGET = flags.DEFINE_string(
    "target", None, f"The machine: {', '.join(known_targets())}; several chips as 8xh100 or v5e-16.", required=True
)
CHARACTERS = flags.DEFINE_float(
    "characters", None, "Characters of the complete training, to estimate its time; default: those of the run."
)
ADVICE = flags.DEFINE_boolean(
    "advice", True, "If the step does not fit, compile it with changed options until two changes fit."
)
flags.adopt_module_key_flags(pretraining)  # so that --help lists them


def read_pretraining() -> Pretraining:
    data, optimizer, train = pretraining.read_configs()
    if train.shorten_factors:
        raise UsageError("--shorten_factors compiles several programs; leave it out, and give one --hierarchy")
    origin = tokenizer = None
    if pretraining.INIT_FROM.value:
        origin, tokenizer, _ = launcher.load_origin(pretraining.INIT_FROM.value)
    tokenizer = tokenizer or read_tokenizer(data, pretraining.VOCAB_PATH.value)
    data = pretraining.in_tokens_of(tokenizer, data)
    if tokenizer.kind == "image":
        data = dataclasses.replace(data, block_size=tokenizer.n_tokens)
    config = pretraining.read_model(tokenizer, origin.config if origin else None)
    if origin:
        origin.reconfigured(config)  # raises if its parameters do not fit
    return Pretraining(config, data, optimizer, train, launcher.read_config("runtime", RuntimeConfig))


def main(_: list[str]) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or the TPU compiler searches the network for a TPU
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    target, run = find_target(TARGET.value), read_pretraining()
    devices = target.devices()
    compiled = compile_step(run, target, devices)
    characters = run.train.steps * run.data.batch_size * run.data.block_size
    print(report.describe(run, target, compiled, CHARACTERS.value or characters))
    if compiled.fits(target):
        return

    def attempt(changed: Pretraining) -> Compiled:
        options = f"remat={changed.model.remat}, accumulate={changed.runtime.accumulate}, fsdp={changed.runtime.fsdp}"
        print(f"trying {options}", file=sys.stderr, flush=True)
        return compile_step(changed, target, devices)

    if compiled.peak is not None and ADVICE.value:
        print(f"\n{report.describe_changes(report.cheapest_changes(run, target, attempt))}")
    sys.exit(1)


if __name__ == "__main__":
    launcher.run(main)
