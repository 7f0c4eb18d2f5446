"""Writes text with a pretrained or fine-tuned model, as it comes; draws images with a model of images.

python experiments/generate.py --load_model_path=runs/finetune
python experiments/generate.py --load_model_path=runs/prompt --gen_mode=prompt --prompt="an old silent pond"
python experiments/generate.py --load_model_path=runs/cifar10 --gen_mode=complete --num_samples=8
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from absl import flags, logging

from experiments.common import launcher
from experiments.common.pictures import draw_images, nothing, save_grid, top_halves
from experiments.common.recorded import recorded_images
from hourglass_jax import HourglassLM, ImageTokenizer, UsageError, generate, load
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer
from hourglass_jax.training.checkpoints import read_run

LOAD = flags.DEFINE_string("load_model_path", "runs/finetune", "Directory of a pretrained or fine-tuned model.")
GEN_MODE = flags.DEFINE_enum(
    "gen_mode",
    "scratch",
    ["scratch", "prompt", "complete"],
    "Start from nothing, from --prompt, or from the top halves of the validation images.",
)
PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; a model fine-tuned on prompts takes a first line.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 250, "New characters (bytes) a sample at most.", lower_bound=1)
OUT = flags.DEFINE_string("out", "samples.png", "Where the images go.")
DATA_PATH = flags.DEFINE_string("data_path", "", "Directory of the images to complete; empty: where they were.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples to write.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 is greedy; default: 0.8 for text, 1 for images.", lower_bound=0
)
TOP_K = flags.DEFINE_integer("top_k", None, "Sample among the k likeliest tokens.", lower_bound=1)
TOP_P = flags.DEFINE_float("top_p", None, "Sample among the likeliest tokens that hold this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)
FOR_TEXT = {"--gen_mode=prompt", "--prompt", "--max_tokens"}
FOR_IMAGES = {"--gen_mode=complete", "--out", "--data_path"}


def main(_: list[str]) -> None:
    if GEN_MODE.value == "prompt" and not PROMPT.value:
        raise UsageError("--gen_mode=prompt needs a text; give it as --prompt='...'")
    if GEN_MODE.value == "scratch" and PROMPT.value:
        raise UsageError("--prompt is given, but --gen_mode=scratch starts from nothing; pass --gen_mode=prompt")
    model, tokenizer, _ = load(LOAD.value)
    images = isinstance(tokenizer, ImageTokenizer)
    given = {f"--gen_mode={GEN_MODE.value}"} | {f"--{name}" for name in flags.FLAGS if flags.FLAGS[name].present}
    misplaced = sorted(given & (FOR_TEXT if images else FOR_IMAGES))
    if misplaced:
        raise UsageError(f"{misplaced[0]}: not for {LOAD.value}, a model of {'images' if images else 'text'}")
    (draw if images else write)(model, tokenizer)


def draw(model: HourglassLM, tokenizer: ImageTokenizer) -> None:
    given, shown = nothing(NUM_SAMPLES.value), []
    if GEN_MODE.value == "complete":
        originals = recorded_images(LOAD.value, DATA_PATH.value).valid[: NUM_SAMPLES.value]
        given, shown = top_halves(tokenizer, originals), [originals]
    drawn = draw_images(
        model,
        tokenizer,
        given,
        jax.random.key(SEED.value),
        temperature=1.0 if TEMPERATURE.value is None else TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
    )
    save_grid(Path(OUT.value), *shown, drawn)
    print(f"{len(drawn)} images{', each below its original' if shown else ''} -> {OUT.value}")


def write(model: HourglassLM, tokenizer: CharTokenizer | ByteTokenizer) -> None:
    form = read_run(LOAD.value)[2].get("format", "text")
    text = PROMPT.value
    if form == "prompt" and text and not text.endswith("\n"):
        text += "\n"  # such a model completes whole first lines
    unknown = tokenizer.unknown(text)
    if unknown:
        logging.warning("the model does not know %s; taken as <UNK>", ", ".join(map(repr, unknown)))
    # A pretrained model has never seen BOS: it starts from a line end instead.
    start = tokenizer.encode("\n" if not text else "") if form == "text" else [tokenizer.bos_id]
    prompt = np.concatenate([start, tokenizer.encode(text)]).astype(np.int32)
    banned = [token for token in (tokenizer.unk_id, tokenizer.bos_id) if token is not None]

    for i in range(NUM_SAMPLES.value):
        if i:
            print("-" * 20)
        print(text, end="", flush=True)
        decode = tokenizer.stream_decoder()
        generate(
            model,
            [prompt],
            max_tokens=MAX_TOKENS.value,
            key=jax.random.fold_in(jax.random.key(SEED.value), i),
            temperature=0.8 if TEMPERATURE.value is None else TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
            stop_token=tokenizer.eos_id,
            banned_tokens=banned,
            stream=lambda new, decode=decode: print(decode(new[0]), end="", flush=True),
        )
        print(decode([], final=True))


if __name__ == "__main__":
    launcher.run(main)
