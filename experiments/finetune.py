"""Fine-tunes a pretrained model on three-line haiku, to be written whole or completed from the first line.

python experiments/finetune.py --load_model_path=runs/pretrain
python experiments/finetune.py --load_model_path=runs/pretrain --format=prompt --out=runs/prompt
"""

from __future__ import annotations

import dataclasses

import numpy as np
from absl import flags

from experiments.common import launcher
from hourglass_jax import OptimizerConfig, TrainConfig, UsageError, load
from hourglass_jax.config import check_range
from hourglass_jax.data.haiku import load_haiku, make_examples, usable_haiku
from hourglass_jax.data.pipeline import shuffled_examples
from hourglass_jax.training.identity import fingerprint
from hourglass_jax.training.metrics import plot_curves
from hourglass_jax.training.run import Run
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import fit

LOAD = flags.DEFINE_string("load_model_path", "runs/pretrain", "Directory of the pretrained model.")
DATA_PATH = flags.DEFINE_string("data_path", "", "UTF-8 file of three-line haiku; empty: the built-in ones.")
OUT = flags.DEFINE_string("out", "runs/finetune", "Directory for the fine-tuned model.")
flags.DEFINE_alias("model_save_path", "out")
FORMAT = flags.DEFINE_enum(
    "format", "haiku", ["haiku", "prompt"], "haiku: write all three lines; prompt: the first line is given."
)
BLOCK_SIZE = flags.DEFINE_integer("block_size", 256, "Longest example in tokens; longer haiku are left out.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Haiku a step.")
EPOCHS = flags.DEFINE_integer("epochs", 3, "Times each haiku is seen.")
VALIDATION = flags.DEFINE_float("validation_fraction", 0.05, "Share of the haiku held back, the last of the file.")
launcher.define_config("optimizer", OptimizerConfig(learning_rate=3e-4, warmup_steps=20))
launcher.define_alias("learning_rate", "optimizer.learning_rate", float)
launcher.define_runtime()
SEED = launcher.define_seed("Seed of the order and of dropout.")


def main(_: list[str]) -> None:
    with Signals() as signals:
        finetune(signals)


def finetune(signals: Signals) -> None:
    runtime = launcher.read_runtime()
    for name in ("block_size", "batch_size", "epochs"):
        check_range(name, flags.FLAGS[name].value, 1)
    if not 0 < VALIDATION.value < 1:
        raise UsageError(f"validation_fraction={VALIDATION.value} is out of range; it must be between 0 and 1")
    optimizer = launcher.read_config("optimizer", OptimizerConfig)
    model, tokenizer, config = load(LOAD.value)
    if tokenizer.kind == "image":
        raise UsageError(f"{LOAD.value}: a model of images; give one of text")
    block_size = min(BLOCK_SIZE.value, config.position_limit)
    haiku = usable_haiku(load_haiku(DATA_PATH.value), tokenizer, block_size)
    held_back = max(1, round(len(haiku) * VALIDATION.value))
    if held_back >= len(haiku):
        raise UsageError(
            f"{len(haiku)} haiku that fit block_size={block_size}, {held_back} of them held back, leave none to train "
            "on; give more, a smaller validation_fraction or a larger block_size"
        )
    examples, valid = (
        make_examples(part, tokenizer, FORMAT.value) for part in (haiku[:-held_back], haiku[-held_back:])
    )
    steps_an_epoch = -(-len(examples[0]) // BATCH_SIZE.value)
    train = TrainConfig(steps=EPOCHS.value * steps_an_epoch, eval_interval=steps_an_epoch, seed=SEED.value)
    settings = {
        "pretrained": str(LOAD.value),
        "pretrained_settings": Run(LOAD.value).read().settings,
        "data_path": DATA_PATH.value,
        "text_fingerprint": fingerprint(examples[0]),
        "format": FORMAT.value,
        "block_size": block_size,
        "batch_size": BATCH_SIZE.value,
        "held_back": held_back,
        "optimizer": dataclasses.asdict(optimizer),
        "train": dataclasses.asdict(train),
    }
    run = Run(OUT.value)
    launcher.start_run(run, config, tokenizer, settings, runtime, BATCH_SIZE.value)
    print(
        f"{len(examples[0]):,} haiku to train on, {len(valid[0]):,} held back, {train.steps} steps -> {run.directory}"
    )
    mode, first_line = ["--gen_mode=scratch"], ""
    if FORMAT.value == "prompt":
        first_line = haiku[-1].split("\n")[0]
        mode = ["--gen_mode=prompt", f"--prompt={first_line}"]
        first_line += "\n"
    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(first_line)])
    sample = launcher.make_sampler(tokenizer, prompt, 250, train.seed, signals, ends=True)
    batches = [
        tuple(part[i : i + BATCH_SIZE.value] for part in valid) for i in range(0, len(valid[0]), BATCH_SIZE.value)
    ]
    result = fit(
        model,
        shuffled_examples(examples, BATCH_SIZE.value, train.seed),
        batches,
        run,
        optimizer_config=optimizer,
        train_config=train,
        runtime_config=runtime,
        sample=lambda model: first_line + sample(model),
        signals=signals,
    )
    print(f"held-back haiku: {result} (curves in {plot_curves(run.directory)})")
    print(f"sample:\n{first_line}{sample(model)}")
    print("\n" + launcher.next_command("generate", f"--load_model_path={run.directory}", *mode))


if __name__ == "__main__":
    launcher.run(main)
