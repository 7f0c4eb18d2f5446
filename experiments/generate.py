"""Writes text with a pretrained or fine-tuned model, as it comes.

python experiments/generate.py --load_model_path=runs/finetune
python experiments/generate.py --load_model_path=runs/prompt --gen_mode=prompt --prompt="an old silent pond"
"""

from __future__ import annotations

import jax
import numpy as np
from absl import flags, logging

from experiments import launcher
from hourglass_jax import UsageError, generate, load
from hourglass_jax.training.checkpoints import read_run

LOAD = flags.DEFINE_string("load_model_path", "runs/finetune", "Directory of a pretrained or fine-tuned model.")
GEN_MODE = flags.DEFINE_enum("gen_mode", "scratch", ["scratch", "prompt"], "Start from nothing or from --prompt.")
PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; a model fine-tuned on prompts takes a first line.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 250, "New characters (bytes) a sample at most.", lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples to write.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", None, "Sample among the k likeliest tokens.", lower_bound=1)
TOP_P = flags.DEFINE_float("top_p", None, "Sample among the likeliest tokens that hold this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)


def main(_: list[str]) -> None:
    if GEN_MODE.value == "prompt" and not PROMPT.value:
        raise UsageError("--gen_mode=prompt needs a text; give it as --prompt='...'")
    if GEN_MODE.value == "scratch" and PROMPT.value:
        raise UsageError("--prompt is given, but --gen_mode=scratch starts from nothing; pass --gen_mode=prompt")
    model, tokenizer, _ = load(LOAD.value)
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
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
            stop_token=tokenizer.eos_id,
            banned_tokens=banned,
            stream=lambda new, decode=decode: print(decode(new[0]), end="", flush=True),
        )
        print(decode([], final=True))


if __name__ == "__main__":
    launcher.run(main)
