"""Fine-tunes a pretrained model on three-line haiku, to be written whole or completed from the first line.

python experiments/finetune.py --load_model_path=runs/pretrain
python experiments/finetune.py --load_model_path=runs/pretrain --format=prompt --out=runs/prompt
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging

from experiments import launcher
from hourglass_jax import OptimizerConfig, TrainConfig, UsageError, generate, load
from hourglass_jax.config import check_range
from hourglass_jax.data.corpora import load_haiku
from hourglass_jax.data.pipeline import Batch, pack_examples, shuffled_examples
from hourglass_jax.tokenizers import Tokenizer
from hourglass_jax.training.checkpoints import read_run, write_run
from hourglass_jax.training.metrics import plot_curves
from hourglass_jax.training.trainer import fit

LOAD = flags.DEFINE_string("load_model_path", "runs/pretrain", "Directory of the pretrained model.")
DATA_PATH = flags.DEFINE_string("data_path", "", "UTF-8 file of three-line haiku; empty: the built-in ones.")
OUT = flags.DEFINE_string("out", "runs/finetune", "Directory for the fine-tuned model.")
flags.DEFINE_alias("model_save_path", "out")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Remove another run found in the output directory.")
FORMAT = flags.DEFINE_enum(
    "format", "haiku", ["haiku", "prompt"], "haiku: write all three lines; prompt: the first line is given."
)
BLOCK_SIZE = flags.DEFINE_integer("block_size", 256, "Longest example in tokens; longer haiku are left out.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Haiku a step.")
EPOCHS = flags.DEFINE_integer("epochs", 3, "Times each haiku is seen.")
VALIDATION = flags.DEFINE_float("validation_fraction", 0.05, "Share of the haiku held back, the last of the file.")
launcher.define_config("optimizer", OptimizerConfig(learning_rate=3e-4, warmup_steps=20))
launcher.define_alias("learning_rate", "optimizer.learning_rate", float)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the order and of dropout.", lower_bound=0)


def encode_haiku(haiku: str, tokenizer: Tokenizer, form: str) -> tuple[np.ndarray, int]:
    """BOS + three lines + EOS, and the first token that carries loss: with form 'prompt' the second line's."""
    first_line = tokenizer.encode(haiku.split("\n")[0] + "\n")
    tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(haiku), [tokenizer.eos_id]])
    return tokens, 1 + len(first_line) if form == "prompt" else 1


def make_examples(haiku: list[str], tokenizer: Tokenizer, form: str, block_size: int) -> Batch:
    """The haiku that fit, padded; left out are longer ones, and those with a line of no known character."""
    readable = [poem for poem in haiku if all(len(tokenizer.encode(line)) for line in poem.split("\n"))]
    encoded = [encode_haiku(poem, tokenizer, form) for poem in readable]
    kept = [(tokens, start) for tokens, start in encoded if len(tokens) <= block_size + 1]
    if len(kept) < len(haiku):
        logging.warning("%d of %d haiku left out: too long, or with an empty line", len(haiku) - len(kept), len(haiku))
    if not kept:
        raise UsageError(f"no haiku fits block_size={block_size}; raise it")
    return pack_examples(*zip(*kept, strict=True), pad_id=tokenizer.eos_id)


def main(_: list[str]) -> None:
    for name in ("block_size", "batch_size", "epochs"):
        check_range(name, flags.FLAGS[name].value, 1)
    if not 0 < VALIDATION.value < 1:
        raise UsageError(f"validation_fraction={VALIDATION.value} is out of range; it must be between 0 and 1")
    optimizer = launcher.read_config("optimizer", OptimizerConfig)
    model, tokenizer, config = load(LOAD.value)
    haiku = load_haiku(DATA_PATH.value)
    held_back = max(1, round(len(haiku) * VALIDATION.value))
    if held_back >= len(haiku):
        raise UsageError(f"{len(haiku)} haiku leave none to train on; give more, or a smaller validation_fraction")
    block_size = min(BLOCK_SIZE.value, config.max_length)
    examples, valid = (
        make_examples(part, tokenizer, FORMAT.value, block_size) for part in (haiku[:-held_back], haiku[-held_back:])
    )
    steps_an_epoch = -(-len(examples[0]) // BATCH_SIZE.value)
    train = TrainConfig(steps=EPOCHS.value * steps_an_epoch, eval_interval=steps_an_epoch, seed=SEED.value)
    settings = {
        "pretrained": str(LOAD.value),
        "pretrained_settings": read_run(LOAD.value)[2],
        "data_path": DATA_PATH.value,
        "format": FORMAT.value,
        "block_size": block_size,
        "batch_size": BATCH_SIZE.value,
        "held_back": held_back,
        "optimizer": dataclasses.asdict(optimizer),
        "train": dataclasses.asdict(train),
    }
    out = Path(OUT.value)
    launcher.prepare_directory(out, settings, overwrite=OVERWRITE.value)
    print(f"{len(examples[0]):,} haiku to train on, {len(valid[0]):,} held back, {train.steps} steps -> {out}")
    write_run(out, config, tokenizer, settings)
    batches = [
        tuple(part[i : i + BATCH_SIZE.value] for part in valid) for i in range(0, len(valid[0]), BATCH_SIZE.value)
    ]
    result = fit(
        model,
        shuffled_examples(examples, BATCH_SIZE.value, train.seed),
        batches,
        out,
        optimizer_config=optimizer,
        train_config=train,
    )
    print(f"held-back haiku: {result} (curves in {plot_curves(out)})")

    first_line = haiku[-1].split("\n")[0] + "\n" if FORMAT.value == "prompt" else ""
    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(first_line)])
    [sample] = generate(
        model,
        [prompt],
        max_tokens=min(250, config.max_length - len(prompt)),
        key=jax.random.key(train.seed),
        temperature=0.8,
        stop_token=tokenizer.eos_id,
        banned_tokens=[token for token in (tokenizer.unk_id, tokenizer.bos_id) if token is not None],
    )
    print(f"sample:\n{first_line}{tokenizer.decode(sample)}")
    mode = f"prompt --prompt={haiku[-1].splitlines()[0]!r}" if FORMAT.value == "prompt" else "scratch"
    print(f"\nnext: python experiments/generate.py --load_model_path={out} --gen_mode={mode}")


if __name__ == "__main__":
    launcher.run(main)
