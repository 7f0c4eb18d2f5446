"""Loss, perplexity and bits per character of a checkpoint on a text file; bits/dim of a model of images.

python experiments/evaluate.py --load_model_path=runs/pretrain --data_path=book.txt
python experiments/evaluate.py --load_model_path=runs/cifar10
python experiments/evaluate.py --load_model_path=runs/pretrain --protocol=sliding --window=4096 --step=128
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from absl import flags, logging

from experiments.common import launcher
from experiments.common.sources import recorded_data, recorded_images
from hourglass_jax import (
    Evaluation,
    HourglassLM,
    ImageTokenizer,
    UsageError,
    at_shorten_factor,
    evaluate,
    evaluate_sliding,
    load,
)
from hourglass_jax.config import check_choice
from hourglass_jax.data.corpora import load_tokens, split_tokens
from hourglass_jax.data.images import ImageSplits, image_validation
from hourglass_jax.evaluation import evaluate_batches
from hourglass_jax.tokenizers import TextTokenizer

LOAD = flags.DEFINE_string("load_model_path", "runs/pretrain", "Directory of the model.")
DATA_PATH = flags.DEFINE_string(
    "data_path", "", "UTF-8 text file, or directory of images; empty: the built-in corpus, or the run's own images."
)
SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["all", "train", "valid", "test"],
    "Cut as in the model's training; default: all of a text, valid of images.",
)
BLOCK_SIZE = flags.DEFINE_integer("block_size", None, "Window in tokens; default: as in training.", lower_bound=1)
PROTOCOL = flags.DEFINE_enum(
    "protocol", "consecutive", ["consecutive", "sliding"], "sliding: overlapping windows, the paper's test protocol."
)
WINDOW = flags.DEFINE_integer("window", 4096, "Tokens a sliding window.", lower_bound=1)
STEP = flags.DEFINE_integer("step", 128, "Tokens between sliding windows; each scores its last ones.", lower_bound=1)
FACTOR = flags.DEFINE_integer(
    "shorten_factor", None, "Use the model at this factor; see pretrain.py --shorten_factors.", lower_bound=2
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Windows or images at once.", lower_bound=1)


def main(_: list[str]) -> None:
    model, tokenizer, _ = load(LOAD.value)
    if FACTOR.value:
        model = at_shorten_factor(model, FACTOR.value)
    if isinstance(tokenizer, ImageTokenizer):
        result, where = evaluate_images(model)
        unit, figures = "bits/dim", {"bits_per_dim": result.bits_per_dim, "n_dims": result.n_characters}
    else:
        result, where = evaluate_text(model, tokenizer)
        unit, figures = "BPC", {"bpc": result.bits_per_character, "n_characters": result.n_characters}
    print(f"{result.summary(unit)} | {where}")
    print(json.dumps({"loss": result.loss, "perplexity": result.perplexity} | figures))


def evaluate_images(model: HourglassLM) -> tuple[Evaluation, str]:
    """The figures, and what they are of."""
    if BLOCK_SIZE.value or PROTOCOL.value != "consecutive":
        option = "--block_size" if BLOCK_SIZE.value else "--protocol"
        raise UsageError(f"{option}: not for {LOAD.value}, a model of images, which have their own length")
    split = SPLIT.value or "valid"
    check_choice("split", split, ImageSplits._fields)
    images = getattr(recorded_images(LOAD.value, DATA_PATH.value), split)
    return evaluate_batches(model, image_validation(images, BATCH_SIZE.value)), f"{len(images):,} images"


def evaluate_text(model: HourglassLM, tokenizer: TextTokenizer) -> tuple[Evaluation, str]:
    """As `evaluate_images`."""
    data = recorded_data(LOAD.value)
    split = SPLIT.value or "all"
    tokens, _ = load_tokens(dataclasses.replace(data, path=DATA_PATH.value), tokenizer)
    n_unknown = 0 if tokenizer.unk_id is None else np.count_nonzero(tokens == tokenizer.unk_id)
    if n_unknown:
        logging.warning("%d characters are not in the vocabulary and count as <UNK>", n_unknown)
    if split != "all":
        tokens = getattr(split_tokens(tokens, data), split)
        if not len(tokens):
            raise UsageError(f"split={split!r} is empty: the model's text was split by {data.split!r}; use 'valid'")
    if PROTOCOL.value == "sliding":
        sliding = {"window": WINDOW.value, "step": STEP.value, "batch_size": BATCH_SIZE.value}
        result, windows = evaluate_sliding(model, tokens, **sliding), f"{WINDOW.value}, step {STEP.value}"
    else:
        windows = BLOCK_SIZE.value or data.block_size
        result = evaluate(model, tokens, block_size=windows, batch_size=BATCH_SIZE.value)
    return result, f"{result.n_characters:,} characters in windows of {windows}"


if __name__ == "__main__":
    launcher.run(main)
