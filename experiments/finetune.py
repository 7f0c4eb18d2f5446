"""Fine-tune a pretrained model on haiku (all lines, or after a given first line), prompts with answers, or a text.

python experiments/finetune.py --load_model_path=runs/pretrain
python experiments/finetune.py --load_model_path=runs/pretrain --format=prompt --out=runs/prompt
python experiments/finetune.py --load_model_path=runs/pretrain --format=pairs --data_path=pairs.jsonl --out=runs/pairs
python experiments/finetune.py --load_model_path=runs/pretrain --format=text --data_path=book.txt --out=runs/book
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags
from flax import nnx

from experiments.common import launcher
from experiments.common.recorded import recorded_data
from experiments.common.sources import HaikuSource, PairSource, TextSource, open_text, unit_of
from hourglass_jax import DataConfig, HourglassConfig, OptimizerConfig, TrainConfig, UsageError
from hourglass_jax.checks import check_causal
from hourglass_jax.data.corpora import load_text
from hourglass_jax.data.haiku import load_haiku, usable_haiku, without_held_out
from hourglass_jax.data.pairs import TEMPLATE, all_text, read_pairs, split_pairs
from hourglass_jax.ranges import check_range
from hourglass_jax.recipes import RECIPES
from hourglass_jax.tokenizers import TextTokenizer
from hourglass_jax.training.metrics import plot_curves
from hourglass_jax.training.optimizer import trained_parameters
from hourglass_jax.training.run import Run
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import fit
from hourglass_jax.transfer import extend_vocabulary

EPOCHS_OF_MANY, MIN_STEPS = 3, 100  # defaults; with few haiku, training runs more epochs
MAX_WARMUP = 0.1  # share of the steps

LOAD = launcher.ModelFlags("runs/pretrain", "Directory of the pretrained model.")
DATA_PATH = launcher.define_path(
    "data_path",
    "",
    "UTF-8 file of three-line haiku, JSON Lines of pairs, or a text as for pretrain.py; empty: the built-in one.",
)
VALID_PATH = launcher.define_path(
    "valid_path", "", "Haiku, pairs or text for validation; empty: held back from data_path."
)
OUT = launcher.define_path("out", "runs/finetune", "Directory for the fine-tuned model.")
flags.DEFINE_alias("model_save_path", "out")
FORMAT = flags.DEFINE_enum(
    "format",
    "haiku",
    ["haiku", "prompt", "pairs", "text"],
    "haiku: write all three lines; prompt: the first line is given; pairs: answer prompts (prompt and completion, or "
    "messages); text: windows of any text, as in pretraining.",
)
EXTEND = flags.DEFINE_boolean("extend_vocabulary", False, "Add unknown characters to the model's vocabulary.")
BLOCK_SIZE = flags.DEFINE_integer(
    "block_size",
    None,
    "Longest haiku in tokens, default 256; longest pair, default the model's max_length; tokens per window of a text, "
    "default as in pretraining.",
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Haiku, pairs or windows per step.")
EPOCHS = flags.DEFINE_integer(
    "epochs", None, f"Epochs; default: {EPOCHS_OF_MANY}, or as many as give {MIN_STEPS} steps."
)
VALIDATION = flags.DEFINE_float(
    "validation_fraction",
    0.05,
    "Share held back for validation, from the end of the file; 0: all pairs, used for training and validation.",
)
launcher.define_config("optimizer", OptimizerConfig(learning_rate=3e-4, warmup_steps=20))
RECIPE = launcher.define_recipe("paper", "Defaults of the optimizer; modern: Muon.")
launcher.define_alias("learning_rate", "optimizer.learning_rate", float)
launcher.define_alias("train_only", "optimizer.train_only", str)
launcher.define_runtime()
launcher.define_allow_unknown()
SEED = launcher.define_seed("Seed of the order and of dropout.")


def main(_: list[str]) -> None:
    with Signals() as signals:
        finetune(signals)


def finetune(signals: Signals) -> None:
    runtime = launcher.read_runtime()
    check_range("batch_size", BATCH_SIZE.value, 1)
    check_range("validation_fraction", VALIDATION.value, 0.0, 1, open_low=FORMAT.value != "pairs", open_high=True)
    if FORMAT.value == "pairs" and not DATA_PATH.value:
        raise UsageError("--format=pairs requires --data_path; give JSON Lines of prompts and completions, or messages")
    model, tokenizer, _ = LOAD.load()
    if tokenizer.kind == "image":
        raise UsageError(f"{LOAD.value}: is a model of images; give a model of text")
    if FORMAT.value != "text":
        check_causal(model.config, "so the model cannot generate text; pass --format=text, or give another model")
    if EXTEND.value and tokenizer.kind == "char":
        paths = [DATA_PATH.value, *filter(None, [VALID_PATH.value])]
        model, tokenizer = extend_vocabulary(model, tokenizer, "\n".join(map(text_at, paths)))
    open_source = {"text": open_windows, "pairs": open_pairs}.get(FORMAT.value, open_haiku)
    source, settings = open_source(model.config, tokenizer)
    train, optimizer = schedule(source.n_examples)
    trained_parameters(nnx.state(model), optimizer)  # before anything is written
    settings |= source.fingerprint | {
        "pretrained": LOAD.given,
        "pretrained_settings": Run(LOAD.value).read().settings,
        "format": FORMAT.value,
        "optimizer": dataclasses.asdict(optimizer),
        "train": dataclasses.asdict(train),
    }
    run = Run(OUT.value)
    launcher.start_run(run, model.config, tokenizer, settings, runtime, source.batches(train.seed)(0))
    epochs = train.steps * BATCH_SIZE.value / source.n_examples
    print(f"{source.size}, {train.steps} steps ({epochs:.3g} epochs, warm-up {optimizer.warmup_steps} steps) -> {run}")
    unit = unit_of(source.unit, model.config)
    heading, sample = source.sampler(model.config, train.seed, Path(OUT.value), signals)
    result = fit(
        model,
        source.batches(train.seed),
        source.validation(),
        run,
        optimizer_config=optimizer,
        train_config=train,
        runtime_config=runtime,
        sample=sample,
        unit=unit,
        signals=signals,
    )
    print(f"validation: {result.summary(unit)} ({launcher.peak_memory()}, curves in {plot_curves(Path(OUT.value))})")
    print(f"sample: {heading}{sample(model)}")
    script, *options = ("generate",) if FORMAT.value == "text" else source.next_command
    script = script if model.config.decodes else "evaluate"
    print("\n" + launcher.next_command(script, f"--load_model_path={run}", *options))


def text_at(path: str) -> str:
    """Return the text whose characters --extend_vocabulary adds."""
    if FORMAT.value == "text":
        return load_text(path)
    return all_text(read_pairs(path)) if FORMAT.value == "pairs" else "\n".join(load_haiku(path))


def open_windows(config: HourglassConfig, tokenizer: TextTokenizer) -> tuple[TextSource, dict]:
    """Return a text's source and its settings for the run."""
    block_size = BLOCK_SIZE.value
    if block_size is None:
        block_size = recorded_data(Run(LOAD.value).read().settings).block_size
    data = DataConfig(
        path=DATA_PATH.value,
        tokenizer=tokenizer.kind,
        clean=getattr(tokenizer, "clean", False),
        block_size=int(min(block_size, config.position_limit)),
        batch_size=BATCH_SIZE.value,
        order="epochs",
        train_fraction=1 - VALIDATION.value,
        valid_path=VALID_PATH.value,
    )
    return open_text(data, tokenizer, allow_unknown=flags.FLAGS.allow_unknown), {"data": dataclasses.asdict(data)}


def open_haiku(config: HourglassConfig, tokenizer: TextTokenizer) -> tuple[HaikuSource, dict]:
    """Return the haiku's source and its settings for the run."""
    block_size = int(min(256 if BLOCK_SIZE.value is None else BLOCK_SIZE.value, config.position_limit))
    check_range("block_size", block_size, 1)
    haiku = usable_haiku(load_haiku(DATA_PATH.value), tokenizer, block_size)
    if VALID_PATH.value:
        valid, n_held_back = usable_haiku(load_haiku(VALID_PATH.value), tokenizer, block_size), 0
    else:
        n_held_back = max(1, round(len(haiku) * VALIDATION.value))
        haiku, valid = haiku[:-n_held_back], haiku[-n_held_back:]
    haiku = without_held_out(haiku, valid)
    if not haiku or not valid:
        raise UsageError(
            f"{len(haiku)} haiku for training and {len(valid)} for validation fit block_size={block_size}; give more "
            "haiku, another --validation_fraction or a larger --block_size"
        )
    source = HaikuSource(
        haiku,
        valid,
        tokenizer,
        form=FORMAT.value,
        batch_size=BATCH_SIZE.value,
        allow_unknown=flags.FLAGS.allow_unknown,
    )
    return source, example_settings(block_size, n_held_back)


def open_pairs(config: HourglassConfig, tokenizer: TextTokenizer) -> tuple[PairSource, dict]:
    """Return the pairs' source and its settings for the run."""
    block_size = int(min(config.max_length if BLOCK_SIZE.value is None else BLOCK_SIZE.value, config.position_limit))
    check_range("block_size", block_size, 1)
    pairs = read_pairs(DATA_PATH.value)
    n_held_back = 0
    if VALIDATION.value and not VALID_PATH.value:
        n_held_back = max(1, round(len(pairs) * VALIDATION.value))
    train, valid = split_pairs(pairs, VALID_PATH.value, n_held_back)
    if not train:
        raise UsageError(
            f"{DATA_PATH.value}: no pairs are left to train on, {len(valid)} are for validation; give more pairs, or "
            "--validation_fraction=0 to use all pairs for both"
        )
    source = PairSource(
        train,
        valid,
        tokenizer,
        block_size=block_size,
        batch_size=BATCH_SIZE.value,
        allow_unknown=flags.FLAGS.allow_unknown,
    )
    return source, example_settings(block_size, n_held_back) | {"template": TEMPLATE}


def example_settings(block_size: int, n_held_back: int) -> dict[str, Any]:
    """Return the settings of a run on separate examples, haiku or pairs."""
    return {
        "data_path": DATA_PATH.value,
        "valid_path": VALID_PATH.value,
        "block_size": block_size,
        "batch_size": BATCH_SIZE.value,
        "held_back": n_held_back,
    }


def schedule(n_examples: int) -> tuple[TrainConfig, OptimizerConfig]:
    """Return the steps for the number of examples, and an optimizer with at most a tenth of them as warm-up.

    More --epochs make an existing run longer and keep its warm-up.
    """
    steps_an_epoch = -(-n_examples // BATCH_SIZE.value)
    if EPOCHS.value is None:
        steps = max(EPOCHS_OF_MANY * steps_an_epoch, MIN_STEPS)
    else:
        check_range("epochs", EPOCHS.value, 1)
        steps = EPOCHS.value * steps_an_epoch
    begun = steps if flags.FLAGS.overwrite else first_steps(Run(OUT.value), steps)
    optimizer = launcher.read_config("optimizer", OptimizerConfig, RECIPES[RECIPE.value].optimizer)
    if "optimizer.warmup_steps" not in flags.FLAGS:
        warmup_steps = min(optimizer.warmup_steps, round(MAX_WARMUP * begun))
        optimizer = dataclasses.replace(optimizer, warmup_steps=warmup_steps)
    return TrainConfig(steps=steps, eval_interval=max(steps_an_epoch, begun // 10), seed=SEED.value), optimizer


def first_steps(run: Run, steps: int) -> int:
    """Return the steps that the run had before it was made longer; `steps` for a new run."""
    if not run.exists:
        return steps
    _, _, settings, history = run.read()
    return history[0]["steps"][0] if history else settings.get("train", {}).get("steps", steps)


if __name__ == "__main__":
    launcher.run(main)
