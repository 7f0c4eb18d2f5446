"""Loss, perplexity and bits per character of a checkpoint on a text file.

python experiments/evaluate.py --load_model_path=runs/pretrain --data_path=book.txt
python experiments/evaluate.py --load_model_path=runs/pretrain --protocol=sliding --window=4096 --step=128
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from absl import flags, logging

from experiments import launcher
from hourglass_jax import UsageError, evaluate, evaluate_sliding, load
from hourglass_jax.config import DataConfig, check_choice
from hourglass_jax.data.corpora import load_tokens, split_tokens
from hourglass_jax.training.checkpoints import read_run

LOAD = flags.DEFINE_string("load_model_path", "runs/pretrain", "Directory of the model.")
DATA_PATH = flags.DEFINE_string("data_path", "", "UTF-8 text file; empty: the built-in corpus.")
SPLIT = flags.DEFINE_string("split", "all", "all | train | valid | test, cut as in the model's training.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", None, "Window in tokens; default: as in training.", lower_bound=1)
PROTOCOL = flags.DEFINE_enum(
    "protocol", "consecutive", ["consecutive", "sliding"], "sliding: overlapping windows, the paper's test protocol."
)
WINDOW = flags.DEFINE_integer("window", 4096, "Tokens a sliding window.", lower_bound=1)
STEP = flags.DEFINE_integer("step", 128, "Tokens between sliding windows; each scores its last ones.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Windows at once.", lower_bound=1)


def main(_: list[str]) -> None:
    check_choice("split", SPLIT.value, ("all", "train", "valid", "test"))
    model, tokenizer, _ = load(LOAD.value)
    settings = read_run(LOAD.value)[2]
    data = DataConfig(**settings.get("pretrained_settings", settings)["data"])
    tokens, _ = load_tokens(dataclasses.replace(data, path=DATA_PATH.value), tokenizer)
    n_unknown = 0 if tokenizer.unk_id is None else np.count_nonzero(tokens == tokenizer.unk_id)
    if n_unknown:
        logging.warning("%d characters are not in the vocabulary and count as <UNK>", n_unknown)
    if SPLIT.value != "all":
        tokens = getattr(split_tokens(tokens, data), SPLIT.value)
        if not len(tokens):
            raise UsageError(
                f"split={SPLIT.value!r} is empty: the model's text was split by {data.split!r}; use 'valid'"
            )
    if PROTOCOL.value == "sliding":
        sliding = {"window": WINDOW.value, "step": STEP.value, "batch_size": BATCH_SIZE.value}
        result, windows = evaluate_sliding(model, tokens, **sliding), f"{WINDOW.value}, step {STEP.value}"
    else:
        windows = BLOCK_SIZE.value or data.block_size
        result = evaluate(model, tokens, block_size=windows, batch_size=BATCH_SIZE.value)
    print(f"{result} | {result.n_characters:,} characters in windows of {windows}")
    record = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bpc": result.bits_per_character,
        "n_characters": result.n_characters,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    launcher.run(main)
