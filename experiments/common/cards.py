"""The model card of weights that come with the package: what people wrote of them, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common.reports import read_record
from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.model import n_parameters
from hourglass_jax.training.run import Record

SECTIONS = ("## Data", "## Licence", "## Training", "## Not good for")  # what a description must say


def model_card(name: str, model: HourglassLM, record: Record, about: Path, evaluations: Sequence[Path]) -> str:
    """Markdown: a description, with a section for each of SECTIONS, and the summaries of evaluations' records.

    Raises UsageError where a section or a record is missing.
    """
    description = about.read_text(encoding="utf-8").strip()
    if missing := [section for section in SECTIONS if section not in description.splitlines()]:
        raise UsageError(f"{about}: lacks the section {missing[0]!r}; a model card has {', '.join(SECTIONS)}")
    if not evaluations:
        raise UsageError("a model card needs figures; give the records of evaluate.py --report as --evaluations")
    figures = []
    for path in evaluations:
        measured = read_record(path)
        if not isinstance(measured, dict) or not {"summary", "command"} <= measured.keys():
            raise UsageError(f"{path}: not a record of evaluate.py --report or score_haiku.py --report")
        figures.append(f"- {measured['summary']}  \n  `{measured['command']}`")
    config, size = model.config, n_parameters(model)
    tokens = {"byte": "bytes", "char": "characters"}.get(record.tokenizer.kind, record.tokenizer.kind)
    return f"""# {name}

{description}

## Figures

{chr(10).join(figures)}

## Model

`{config.hierarchy}`, d_model {config.d_model}, {config.n_heads} heads, d_ff {config.d_ff}, positions
{config.positions}, {config.shortening} and {config.upsampling}; {size:,} parameters, stored in bfloat16; a
vocabulary of {config.vocab_size} ({tokens}). All settings are in config.json.
"""
