"""Count the well-formed haiku among a fine-tuned model's samples.

python experiments/benchmarks/score_haiku.py --load_model_path=runs/finetune
python experiments/benchmarks/score_haiku.py --load_model_path=runs/prompt --report=runs/prompt/samples
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before any other package named experiments

import jax
import numpy as np
from absl import flags

from experiments.common import launcher
from experiments.common.recorded import haiku_parts
from experiments.common.reports import provenance, write_report
from hourglass_jax import UsageError, generate
from hourglass_jax.data.haiku import encode_haiku, is_haiku
from hourglass_jax.tokenizers import Tokenizer
from hourglass_jax.training.run import Run

LOAD = launcher.ModelFlags("runs/finetune", "Run directory of finetune.py.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 200, "Number of samples.", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 250, "Maximum number of characters; a longer sample is not well-formed.", lower_bound=2
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.", lower_bound=0.0)
SEED = launcher.define_seed("Seed of the sampling.")
REPORT = launcher.define_path("report", "", "Write PATH.json and PATH.md.")


def read_prompts(form: str, settings: dict[str, Any], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the prompt of each sample: BOS, and a held-back first line for format=prompt."""
    if form != "prompt":
        return [np.array([tokenizer.bos_id])] * NUM_SAMPLES.value
    encoded = [encode_haiku(poem, tokenizer, form) for poem in haiku_parts(settings, tokenizer)[1]]
    return [tokens[:start] for tokens, start in encoded[: NUM_SAMPLES.value]]


def describe(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    examples = "\n\n".join(record["samples"][:8])
    odd = "\n\n".join(record["malformed"]) or "(none)"
    return f"""# {record["summary"]}

Sampled in {record["seconds"]:.0f} s at temperature {record["temperature"]}, seed {record["seed"]}.

{describe_training(record["pretraining"], record["finetuning"])}
The first samples:

```
{examples}
```

The malformed ones:

```
{odd}
```
"""


def describe_training(pretraining: dict[str, Any], finetuning: dict[str, Any]) -> str:
    """Return the settings of both trainings as Markdown; empty for a converted model."""
    text = ""
    if {"model", "data", "train"} <= pretraining.keys():
        model, data = pretraining["model"], pretraining["data"]
        text += f"""\
- Pretrained on `{data["path"]}`: {pretraining["train"]["steps"]} steps of
  {data["batch_size"]} x {data["block_size"]} characters,
  hierarchy {model["hierarchy"]}, d_model {model["d_model"]}.
"""
    if "held_back" in finetuning:
        text += f"""\
- Fine-tuned on `{finetuning["data_path"]}` ({finetuning["format"]} format): {finetuning["train"]["steps"]} steps of
  {finetuning["batch_size"]} haiku; the last {finetuning["held_back"]} were held back.
"""
    return text


def main(_: list[str]) -> None:
    model, tokenizer, _ = LOAD.load()
    settings = Run(LOAD.value).read().settings
    form = settings.get("format", "text")
    if form == "text":
        raise UsageError(f"{LOAD.value}: was not fine-tuned on haiku; give a model that finetune.py trained on haiku")
    prompts = read_prompts(form, settings, tokenizer)
    started = time.perf_counter()
    samples = generate(
        model,
        prompts,
        max_tokens=MAX_TOKENS.value,
        key=jax.random.key(SEED.value),
        temperature=TEMPERATURE.value,
        stop_token=tokenizer.eos_id,
        banned_tokens=[token for token in (tokenizer.unk_id, tokenizer.bos_id) if token is not None],
    )
    seconds = time.perf_counter() - started
    texts = [tokenizer.decode(sample) for sample in samples]
    well_formed = [
        len(sample) < MAX_TOKENS.value and is_haiku(text, n_lines=2 if form == "prompt" else 3)
        for sample, text in zip(samples, texts, strict=True)
    ]
    summary = (
        f"{sum(well_formed)} of {len(texts)} samples are exactly {'two' if form == 'prompt' else 'three'} "
        f"non-empty lines, followed by EOS, within {MAX_TOKENS.value} characters"
    )
    print(f"{summary} ({seconds:.0f} s)")
    poems = [tokenizer.decode(prompt) + text for prompt, text in zip(prompts, texts, strict=True)]
    if REPORT.value:
        record = provenance() | {
            "summary": summary,
            "seconds": seconds,
            "temperature": TEMPERATURE.value,
            "seed": SEED.value,
            "well_formed": sum(well_formed),
            "n_samples": len(texts),
            "pretraining": settings.get("pretrained_settings", {}),
            "finetuning": {name: value for name, value in settings.items() if name != "pretrained_settings"},
            "malformed": [poem for poem, good in zip(poems, well_formed, strict=True) if not good],
            "samples": poems,
        }
        write_report(Path(REPORT.value), record, describe(record))


if __name__ == "__main__":
    launcher.run(main)
