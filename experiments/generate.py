"""Generate text with a pretrained or fine-tuned model, streamed, or images with a model of images.

python experiments/generate.py --load_model_path=runs/finetune
python experiments/generate.py --pretrained=haiku --prompt="an old silent pond"
python experiments/generate.py --load_model_path=runs/pretrain --gen_mode=prompt --prompt_file=- --stop=. < text.txt
python experiments/generate.py --load_model_path=runs/cifar10 --gen_mode=complete --num_samples=8
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

import jax
import numpy as np
from absl import flags, logging

from experiments.common import launcher
from experiments.common.pictures import draw_images, nothing, save_grid, top_halves
from experiments.common.recorded import recorded_images
from hourglass_jax import HourglassLM, ImageTokenizer, UsageError, generate
from hourglass_jax.checks import check_decodes
from hourglass_jax.data.corpora import decode_text
from hourglass_jax.generation import MAX_NEW_TOKENS
from hourglass_jax.tokenizers import ByteTokenizer, TextTokenizer, clean, to_utf8
from hourglass_jax.training.run import Run
from hourglass_jax.training.signals import Interrupted, Signals

LOAD = launcher.ModelFlags("runs/finetune", "Directory of a pretrained or fine-tuned model.")
GEN_MODE = flags.DEFINE_enum(
    "gen_mode",
    None,
    ["scratch", "prompt", "complete"],
    "scratch: no prompt (default); prompt: default if a prompt is given; complete: complete the top halves of images.",
)
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; for a model fine-tuned on prompts, a first line.")
PROMPT_FILE = launcher.define_path(
    "prompt_file", "", "File with the text to continue, without its last newline; -: standard input."
)
EACH_LINE = flags.DEFINE_boolean("each_line", False, "Each line of --prompt_file that is not empty is a prompt.")
STOP = flags.DEFINE_multi_string("stop", [], "End a sample before this text; may be repeated.")
RAW_OUT = launcher.define_path("raw_out", "", "Write the new bytes of all samples to this file.")
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 250, "Maximum number of new characters (bytes) per sample.", lower_bound=1, upper_bound=MAX_NEW_TOKENS
)
OUT = launcher.define_path("out", "samples.png", "Path of the images.")
DATA_PATH = launcher.define_path("data_path", "", "Directory of the images to complete; empty: that of training.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Number of samples.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 is greedy; default: 0.8 for text, 1 for images.", lower_bound=0
)
TOP_K = flags.DEFINE_integer("top_k", None, "Sample from the k likeliest tokens.", lower_bound=1)
TOP_P = flags.DEFINE_float("top_p", None, "Sample from the likeliest tokens with this total probability.")
SEED = launcher.define_seed("Seed of the sampling.")
FOR_TEXT = {"--gen_mode=prompt", *(f"--{f.name}" for f in (PROMPT, PROMPT_FILE, EACH_LINE, STOP, RAW_OUT, MAX_TOKENS))}
FOR_IMAGES = {"--gen_mode=complete", "--out", "--data_path"}


def main(_: list[str]) -> None:
    mode = gen_mode()
    if mode == "prompt" and bool(PROMPT.value) == bool(PROMPT_FILE.value):
        raise UsageError("--gen_mode=prompt requires one prompt; give it as --prompt='...' or as --prompt_file=FILE")
    if mode == "scratch" and (PROMPT.value or PROMPT_FILE.value):
        option = "--prompt" if PROMPT.value else "--prompt_file"
        raise UsageError(f"{option} does not apply to --gen_mode=scratch; pass --gen_mode=prompt, or leave it out")
    if EACH_LINE.value and not PROMPT_FILE.value:
        raise UsageError("--each_line requires --prompt_file; give it, or leave out --each_line")
    if "" in STOP.value:
        raise UsageError("--stop is empty; give the text before which a sample ends")
    for text in (PROMPT.value, *STOP.value):
        to_utf8(text)
    model, tokenizer, config = LOAD.load()
    check_decodes(config)
    images = isinstance(tokenizer, ImageTokenizer)
    given = {f"--gen_mode={mode}"} | {f"--{name}" for name in flags.FLAGS if flags.FLAGS[name].present}
    misplaced = sorted(given & (FOR_TEXT if images else FOR_IMAGES))
    if misplaced:
        raise UsageError(f"{misplaced[0]} does not apply to {LOAD.value}, a model of {'images' if images else 'text'}")
    if not (directory := Path(OUT.value if images else RAW_OUT.value).parent).is_dir():
        raise UsageError(f"the directory {directory} does not exist; create it or give another path")
    with launcher.stopping() as signals:
        (draw if images else write)(model, tokenizer, signals)


def gen_mode() -> str:
    """Return --gen_mode; its default depends on whether a prompt is given."""
    return GEN_MODE.value or ("prompt" if PROMPT.present or PROMPT_FILE.present else "scratch")


def draw(model: HourglassLM, tokenizer: ImageTokenizer, signals: Signals) -> None:
    given, shown = nothing(NUM_SAMPLES.value), []
    if gen_mode() == "complete":
        originals = recorded_images(LOAD.value, DATA_PATH.value).valid[: NUM_SAMPLES.value]
        given, shown = top_halves(tokenizer, originals), [originals]
    drawn = draw_images(
        model,
        tokenizer,
        given,
        jax.random.key(SEED.value),
        check=signals.check,
        temperature=1.0 if TEMPERATURE.value is None else TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
    )
    save_grid(Path(OUT.value), *shown, drawn)
    print(f"{len(drawn)} images{', each below its original' if shown else ''} -> {OUT.value}")


def write(model: HourglassLM, tokenizer: TextTokenizer, signals: Signals) -> None:
    form = Run(LOAD.value).read().settings.get("format", "text")
    prompts = read_prompts(tokenizer)
    if form == "prompt":  # trained to complete a first line
        prompts = [text.removesuffix(b"\n") + b"\n" if text else text for text in prompts]
    raw: BinaryIO | None = None
    with contextlib.ExitStack() as files:
        for number, (text, _) in enumerate(itertools.product(prompts, range(NUM_SAMPLES.value))):
            if number:
                print("-" * 20)
            print(text.decode("utf-8", "replace"), end="", flush=True)
            sample = Sample(tokenizer, STOP.value, signals)
            with contextlib.suppress(StopText, Interrupted):
                generate(
                    model,
                    [prompt_tokens(tokenizer, text, form)],
                    max_tokens=MAX_TOKENS.value,
                    key=jax.random.fold_in(jax.random.key(SEED.value), number),
                    temperature=0.8 if TEMPERATURE.value is None else TEMPERATURE.value,
                    top_k=TOP_K.value,
                    top_p=TOP_P.value,
                    stop_token=tokenizer.eos_id,
                    banned_tokens=launcher.banned_tokens(tokenizer),
                    stream=sample.take,
                )
            new = sample.finish()
            raw = raw or files.enter_context(open(RAW_OUT.value or os.devnull, "wb"))  # after all checks
            raw.write(new)
            signals.check()


def read_prompts(tokenizer: TextTokenizer) -> list[bytes]:
    """Return the UTF-8 bytes of each prompt; from scratch, one empty prompt."""
    prompts = [to_utf8(PROMPT.value)]
    if PROMPT_FILE.value:
        raw = sys.stdin.buffer.read() if PROMPT_FILE.value == "-" else Path(PROMPT_FILE.value).read_bytes()
        if not isinstance(tokenizer, ByteTokenizer):
            raw = decode_text(raw, "standard input" if PROMPT_FILE.value == "-" else PROMPT_FILE.value).encode("utf-8")
        prompts = [line for line in raw.splitlines() if line] if EACH_LINE.value else [re.sub(rb"\r?\n\Z", b"", raw)]
        if not any(prompts):
            raise UsageError(f"--prompt_file={PROMPT_FILE.value}: contains no prompt; give a file with text")
    if getattr(tokenizer, "clean", False):
        check_cleaned(prompts)
    unknown = sorted(
        {character for text in prompts for character in tokenizer.unknown(text.decode("utf-8", "replace"))}
    )
    if unknown:
        logging.warning("characters that are not in the vocabulary become <UNK>: %s", ", ".join(map(repr, unknown)))
    return prompts


def check_cleaned(prompts: Sequence[bytes]) -> None:
    """Warn of the characters that cleaning removes from a prompt. Raises UsageError if none are left."""
    for text in (prompt.decode("utf-8") for prompt in prompts if prompt):
        if not clean(text):
            raise UsageError(
                f"the prompt {text!r} is empty after cleaning, which the model requires; give a prompt with letters"
            )
    lost = sorted({c for prompt in prompts for c in prompt.decode("utf-8") if not clean(c)})
    if lost:
        logging.warning(
            "the prompt is cleaned like the model's training text, which removes %s", ", ".join(map(repr, lost))
        )


def prompt_tokens(tokenizer: TextTokenizer, text: bytes, form: str) -> np.ndarray:
    """Return the prompt's tokens, int32 [n], after BOS unless `form` is 'text'.

    Pretraining does not use BOS, so from scratch such a model starts with a newline, or if its vocabulary has none,
    with a space or another character.
    """
    tokens = tokenizer.encode(text if isinstance(tokenizer, ByteTokenizer) else text.decode("utf-8"))
    if form != "text":
        return np.concatenate([[tokenizer.bos_id], tokens]).astype(np.int32)
    if len(tokens):
        return tokens
    start = next((c for c in "\n " if not tokenizer.unknown(c)), None)
    return tokenizer.encode(tokenizer.characters[0] if start is None else start)


class StopText(Exception):
    """A stop text was generated."""


class Sample:
    """Streams a sample's bytes up to the first stop text; delays bytes that may start a stop text."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str], signals: Signals):
        self.tokenizer, self.signals = tokenizer, signals
        self.stops = [text.encode("utf-8") for text in stops]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.written, self.n_shown = b"", 0

    def take(self, new: Sequence[np.ndarray]) -> None:
        """Add new tokens of the one row. Raises StopText, or Interrupted after a signal."""
        self.signals.check()
        self.written += self.tokenizer.decode_bytes(new[0])
        ends = [end for stop in self.stops if (end := self.written.find(stop, self.n_shown)) >= 0]
        if ends:
            self.written = self.written[: min(ends)]
            raise StopText
        self.show(len(self.written) + 1 - max(map(len, self.stops), default=1))

    def show(self, end: int, final: bool = False) -> None:
        end = max(end, self.n_shown)
        print(self.decoder.decode(self.written[self.n_shown : end], final), end="", flush=True)
        self.n_shown = end

    def finish(self) -> bytes:
        """Print the remaining text, and return all bytes."""
        self.show(len(self.written), final=True)
        print()
        return self.written


if __name__ == "__main__":
    launcher.run(main)
