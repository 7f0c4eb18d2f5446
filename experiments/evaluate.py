"""Evaluate a checkpoint: loss, perplexity and bits per character on a text, or bits/dim on images.

python experiments/evaluate.py --load_model_path=runs/pretrain                               on the validation split
python experiments/evaluate.py --load_model_path=runs/pretrain --data_path=book.txt
python experiments/evaluate.py --load_model_path=runs/pretrain --data_path=book.txt --per_token=surprise.tsv
python experiments/evaluate.py --load_model_path=runs/pretrain --data_path=book.txt --boundaries=cuts.tsv
python experiments/evaluate.py --load_model_path=runs/cifar10
python experiments/evaluate.py --load_model_path=runs/pretrain --protocol=sliding --window=4096 --step=128
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

import numpy as np
from absl import flags

from experiments.common import launcher
from experiments.common.characters import check_characters, score_documents, write_surprise
from experiments.common.cuts import write_boundaries
from experiments.common.recorded import recorded_data, recorded_haiku, recorded_images, recorded_text
from experiments.common.reports import provenance, write_report
from experiments.common.sources import UNITS
from hourglass_jax import Evaluation, HourglassLM, ImageTokenizer, UsageError, at_shorten_factor
from hourglass_jax.data.images import ImageSplits, image_validation
from hourglass_jax.data.pipeline import Batch, all_examples, consecutive_windows, sliding_windows, without_targets
from hourglass_jax.evaluation import check_text, evaluate_batches
from hourglass_jax.ranges import check_choice
from hourglass_jax.tokenizers import TextTokenizer
from hourglass_jax.training.run import Run

LOAD = launcher.ModelFlags("runs/pretrain", "Directory of the model.")
DATA_PATH = launcher.define_path(
    "data_path", "", "Text or token store, as for pretrain.py, or directory of images; empty: the training data."
)
SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["all", "train", "valid", "test"],
    "Split as in training; default: valid for the training data, images and token stores, all for another text.",
)
BLOCK_SIZE = flags.DEFINE_integer("block_size", None, "Window in tokens; default: as in training.", lower_bound=1)
PROTOCOL = flags.DEFINE_enum(
    "protocol", "consecutive", ["consecutive", "sliding"], "sliding: overlapping windows, the paper's test protocol."
)
WINDOW = flags.DEFINE_integer("window", 4096, "Tokens per sliding window.", lower_bound=1)
STEP = flags.DEFINE_integer(
    "step", 128, "Tokens between sliding windows; each window scores its last step tokens.", lower_bound=1
)
FACTOR = flags.DEFINE_integer(
    "shorten_factor", None, "Evaluate at this factor; see pretrain.py --shorten_factors.", lower_bound=2
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Windows or images at once.", lower_bound=1)
PER_TOKEN = launcher.define_path("per_token", "", "Write the surprise of each character to this file, tab-separated.")
BOUNDARIES = launcher.define_path("boundaries", "", "Write where groups end to this file, tab-separated.")
REPORT = launcher.define_path("report", "", "Write PATH.json and PATH.md.")
launcher.define_allow_unknown()


def main(_: list[str]) -> None:
    model, tokenizer, _ = LOAD.load()
    if FACTOR.value:
        model = at_shorten_factor(model, FACTOR.value)
    if not model.config.causal:
        options = {"--protocol": PROTOCOL.value != "consecutive"}
        options |= {"--per_token": PER_TOKEN.value, "--boundaries": BOUNDARIES.value}
        refuse(options, f"{LOAD.value}, a bidirectional model")
    if PROTOCOL.value == "sliding":
        refuse({"--block_size": BLOCK_SIZE.value}, "sliding windows; give their length as --window")
    else:
        refuse({"--window": WINDOW.present, "--step": STEP.present}, "consecutive windows; pass --protocol=sliding too")
    if isinstance(tokenizer, ImageTokenizer):
        summary, figures = evaluate_images(model)
    elif not DATA_PATH.value and "held_back" in Run(LOAD.value).read().settings:
        summary, figures = evaluate_haiku(model, tokenizer)
    else:
        summary, figures = evaluate_text(model, tokenizer)
    print(summary)
    print(json.dumps(figures))
    if REPORT.value:
        record = provenance() | {"summary": summary} | figures
        write_report(Path(REPORT.value), record, f"# {summary}")


def evaluate_images(model: HourglassLM) -> tuple[str, dict[str, Any]]:
    """Return a summary line and the figures."""
    options = {"--block_size": BLOCK_SIZE.value, "--protocol": PROTOCOL.value != "consecutive"}
    options |= {"--per_token": PER_TOKEN.value, "--boundaries": BOUNDARIES.value}
    refuse(options, f"{LOAD.value}, a model of images")
    split = SPLIT.value or "valid"
    check_choice("split", split, ImageSplits._fields)
    images = getattr(recorded_images(LOAD.value, DATA_PATH.value), split)
    result = evaluate_batches(model, image_validation(images, BATCH_SIZE.value))
    summary, figures = result.summary("bits/dim"), {"bits_per_dim": result.bits_per_dim, "n_dims": result.n_characters}
    if not model.config.causal:
        summary, figures = masked_figures(result, "bits/dim")
    return f"{summary} | {split}, {len(images):,} images", common(result) | figures | {"split": split}


def evaluate_haiku(model: HourglassLM, tokenizer: TextTokenizer) -> tuple[str, dict[str, Any]]:
    """Return a summary line and the figures on the haiku of fine-tuning."""
    options = {"--block_size": BLOCK_SIZE.value, "--protocol": PROTOCOL.value != "consecutive"}
    refuse(options, "the haiku of fine-tuning; give a text as --data_path")
    split = SPLIT.value or "valid"
    check_choice("split", split, ("train", "valid"))
    source = recorded_haiku(LOAD.value)
    batches = all_examples(getattr(source, split), BATCH_SIZE.value)
    tokens = np.concatenate([tokens[:, 1:][weights > 0] for tokens, weights in batches])
    result = evaluate_predictions(model, batches, tokenizer)
    summary, figures = text_figures(result, tokens, tokenizer)
    return f"{summary} | {split} of the haiku of fine-tuning", figures | {"split": split}


def evaluate_text(model: HourglassLM, tokenizer: TextTokenizer) -> tuple[str, dict[str, Any]]:
    """Return a summary line and the figures on a text."""
    tokens, text, name, ends = recorded_text(LOAD.value, DATA_PATH.value, SPLIT.value)
    check_text(tokens, model)
    n_unknown = check_characters(text, tokenizer, name, allow_unknown=flags.FLAGS.allow_unknown)
    if PROTOCOL.value == "sliding":
        batches = sliding_windows(tokens, WINDOW.value, STEP.value, BATCH_SIZE.value)
        windows = f"{WINDOW.value}, step {STEP.value}"
    else:
        block_size = BLOCK_SIZE.value or recorded_data(Run(LOAD.value).read().settings).block_size
        batches, windows = consecutive_windows(tokens, block_size, BATCH_SIZE.value), str(block_size)
    predicted, documents = tokens[1:], {}
    if ends is None:
        result = evaluate_predictions(model, batches, tokenizer)
    else:
        specials = (tokenizer.bos_id, tokenizer.eos_id)
        predicted = predicted[~np.isin(predicted, specials)]
        if model.config.causal and not (PER_TOKEN.value or BOUNDARIES.value):
            result, bits = score_documents(model, batches, tokens, ends, specials)
            documents = {"bits_by_document": bits, "n_documents": len(ends)}
        else:
            result = evaluate_predictions(model, without_targets(batches, specials), tokenizer)
    summary, figures = text_figures(result, predicted, tokenizer)
    if not model.config.causal:
        summary, figures = masked_figures(result, UNITS[tokenizer.kind])
    if documents:
        summary += f" | mean over {len(ends):,} documents {documents['bits_by_document']:.4f}"
    figures |= documents | {"n_unknown": n_unknown, "text": name}
    return f"{summary} in windows of {windows} | {name}", figures


def evaluate_predictions(model: HourglassLM, batches: Sequence[Batch], tokenizer: TextTokenizer) -> Evaluation:
    if BOUNDARIES.value:
        write_boundaries(Path(BOUNDARIES.value), model, batches, tokenizer)
    if PER_TOKEN.value:
        return write_surprise(Path(PER_TOKEN.value), model, batches, tokenizer)
    return evaluate_batches(model, batches)


def text_figures(result: Evaluation, predicted: np.ndarray, tokenizer: TextTokenizer) -> tuple[str, dict[str, Any]]:
    """Return BPC, and bits per byte for bytes; `predicted`: the tokens of `result`."""
    if tokenizer.kind == "char":
        figures = {"bpc": result.bits_per_character, "n_characters": result.n_characters}
        return f"{result} | {result.n_characters:,} characters", common(result) | figures
    n_bytes, bits = result.n_characters, result.bits_per_character
    n_characters = int(np.count_nonzero((predicted & 0xC0) != 0x80))  # the first byte of each character
    bpc = bits * n_bytes / max(n_characters, 1)
    figures = {"bits_per_byte": bits, "n_bytes": n_bytes, "bpc": bpc, "n_characters": n_characters}
    words = f"BPC {bpc:.4f} | {n_bytes:,} bytes, {n_characters:,} characters of UTF-8"
    return f"{result.summary('bits/byte')} | {words}", common(result) | figures


def masked_figures(result: Evaluation, unit: str) -> tuple[str, dict[str, Any]]:
    """Return bits per masked token."""
    figures = {"masked_bits": result.bits_per_character, "n_masked": result.n_characters}
    return f"{result.summary(f'masked {unit}')} | {result.n_characters:,} masked", common(result) | figures


def refuse(options: dict[str, Any], what: str) -> None:
    """Raise UsageError if one of the options, which do not apply to `what`, is given."""
    for option, given in options.items():
        if given:
            raise UsageError(f"{option} does not apply to {what}")


def common(result: Evaluation) -> dict[str, Any]:
    return {"loss": result.loss, "perplexity": result.perplexity}


if __name__ == "__main__":
    launcher.run(main)
