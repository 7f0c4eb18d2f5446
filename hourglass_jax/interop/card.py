"""The model card of a saved model: README.md with the metadata of the Hugging Face Hub."""

from __future__ import annotations

from hourglass_jax.evaluation import Evaluation
from hourglass_jax.model import HourglassLM, n_parameters
from hourglass_jax.tokenizers import ImageTokenizer, Tokenizer

CARD = "README.md"
TEMPLATE = """\
---
library_name: hourglass_jax
{metadata}
---

# {name}

A hierarchical language model of hourglass_jax, `{hierarchy}`: {parameters:,} parameters, a vocabulary of {vocabulary}.
d_model {d_model}, {n_heads} heads, d_ff {d_ff}; {positions} positions, {shortening} shortening, {upsampling}
upsampling, {boundaries} boundaries. All settings are in config.json.

## Usage

```python
import jax
import hourglass_jax as hg

model, tokenizer, config = hg.load("hf:USER/{name}")  # or the path of this directory
{usage}
```
"""
GENERATE = """\
[new] = hg.generate(model, [tokenizer.encode("an old")], max_tokens=100, key=jax.random.key(0))
print(tokenizer.decode(new))"""
FORWARD = """\
tokens = jax.random.randint(jax.random.key(0), (2, 100), 0, config.vocab_size)
logits = model(tokens)  # [2, 100, vocab_size]"""
VOCABULARIES = {"byte": "bytes", "char": "characters", "image": "values of pixels"}
UNITS = {"byte": "bits/byte", "char": "BPC", "image": "bits/dim"}


def model_card(
    name: str,
    model: HourglassLM,
    tokenizer: Tokenizer | None,
    license: str | None = None,
    evaluation: Evaluation | None = None,
) -> str:
    """Return the card in Markdown, after the metadata in YAML."""
    config, kind = model.config, tokenizer.kind if tokenizer else "none"
    writes_text = config.decodes and tokenizer is not None and not isinstance(tokenizer, ImageTokenizer)
    metadata = [f"license: {license}"] if license else []
    metadata += ["pipeline_tag: text-generation"] if writes_text else []
    card = TEMPLATE.format(
        **vars(config) | {"name": name},
        parameters=n_parameters(model),
        vocabulary=f"{config.vocab_size} {VOCABULARIES.get(kind, 'tokens')}",
        metadata="\n".join([*metadata, "tags:", "- jax", "- hourglass"]),
        usage=GENERATE if writes_text else FORWARD,
    )
    if evaluation is not None:
        figures = evaluation.summary(UNITS.get(kind, "bits/token"))
        card += f"\n## Evaluation\n\n{figures} | {evaluation.n_characters:,} predictions\n"
    return card
