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
from hourglass_jax.training.run import Run

LOAD = launcher.ModelFlags("runs/finetune", "Run directory of finetune.py.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 200, "Number of samples.", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 250, "Maximum number of characters; a longer sample is not well-formed.", lower_bound=2
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.", lower_bound=0.0)
SEED = launcher.define_seed("Seed of the sampling.")
REPORT = launcher.define_path("report", "", "Write PATH.json and PATH.md.")


def describe(record: dict[str, Any]) -> str:
    """Return the record as Markdown, with the settings of both trainings; a converted model has none."""
    before, after, training = record["pretraining"], record["finetuning"], ""
    if {"model", "data", "train"} <= before.keys():
        training = f"""\
- Pretrained on `{before["data"]["path"]}`: {before["train"]["steps"]} steps of
  {before["data"]["batch_size"]} x {before["data"]["block_size"]} characters,
  hierarchy {before["model"]["hierarchy"]}, d_model {before["model"]["d_model"]}.
"""
    if "held_back" in after:
        training += f"""\
- Fine-tuned on `{after["data_path"]}` ({after["format"]} format): {after["train"]["steps"]} steps of
  {after["batch_size"]} haiku; the last {after["held_back"]} were held back.
"""
    examples, odd = "\n\n".join(record["samples"][:8]), "\n\n".join(record["malformed"]) or "(none)"
    return f"""# {record["summary"]}

Sampled in {record["seconds"]:.0f} s at temperature {record["temperature"]}, seed {record["seed"]}.

{training}
The first samples:

```
{examples}
```

The malformed ones:

```
{odd}
```
"""


def main(_: list[str]) -> None:
    model, tokenizer, _ = LOAD.load()
    settings = Run(LOAD.value).read().settings
    form = settings.get("format", "text")
    if form == "text":
        raise UsageError(f"{LOAD.value}: was not fine-tuned on haiku; give a model that finetune.py trained on haiku")
    prompts = [np.array([tokenizer.bos_id])] * NUM_SAMPLES.value
    if form == "prompt":  # held-back first lines
        encoded = [encode_haiku(poem, tokenizer, form) for poem in haiku_parts(settings, tokenizer)[1]]
        prompts = [tokens[:start] for tokens, start in encoded[: NUM_SAMPLES.value]]
    started = time.perf_counter()
    samples = generate(
        model,
        prompts,
        max_tokens=MAX_TOKENS.value,
        key=jax.random.key(SEED.value),
        temperature=TEMPERATURE.value,
        stop_token=tokenizer.eos_id,
        banned_tokens=launcher.banned_tokens(tokenizer),
    )
    seconds = time.perf_counter() - started
    n_lines, poems, malformed = 2 if form == "prompt" else 3, [], []
    for prompt, sample in zip(prompts, samples, strict=True):
        text = tokenizer.decode(sample)
        poems.append(tokenizer.decode(prompt) + text)
        if len(sample) == MAX_TOKENS.value or not is_haiku(text, n_lines=n_lines):
            malformed.append(poems[-1])
    n_well_formed = len(poems) - len(malformed)
    summary = (
        f"{n_well_formed} of {len(poems)} samples are exactly {'two' if form == 'prompt' else 'three'} "
        f"non-empty lines, followed by EOS, within {MAX_TOKENS.value} characters"
    )
    print(f"{summary} ({seconds:.0f} s)")
    if REPORT.value:
        record = provenance() | {
            "summary": summary,
            "seconds": seconds,
            "temperature": TEMPERATURE.value,
            "seed": SEED.value,
            "well_formed": n_well_formed,
            "n_samples": len(poems),
            "pretraining": settings.get("pretrained_settings", {}),
            "finetuning": {name: value for name, value in settings.items() if name != "pretrained_settings"},
            "malformed": malformed,
            "samples": poems,
        }
        write_report(Path(REPORT.value), record, describe(record))


if __name__ == "__main__":
    launcher.run(main)
