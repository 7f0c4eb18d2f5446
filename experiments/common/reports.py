"""Reports: a JSON record with its provenance, and Markdown; and the model cards of shipped weights."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.files import write_whole
from hourglass_jax.model import n_parameters
from hourglass_jax.training.identity import describe, differences
from hourglass_jax.training.run import Record

EXPERIMENTS = Path(__file__).resolve().parents[1]
SECTIONS = ("## Data", "## License", "## Training", "## Not good for")  # of a model's description
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class NoResults(UsageError):
    """Nothing was trained or measured yet."""


def provenance(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return the command without --comment, the kind of machine, and package versions."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{platform.machine()} CPU"
    script = Path(sys.argv[0]).absolute()
    script = script.relative_to(EXPERIMENTS.parent) if script.is_relative_to(EXPERIMENTS) else Path(script.name)
    options = [option for option in sys.argv[1:] if not option.startswith("--comment")]
    return {
        "command": shlex.join(["python", script.as_posix(), *options]),
        "machine": f"{jax.device_count()} x {kind}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def read_record(path: Path) -> Any:
    """Return the content of a JSON file, or None if it does not exist. Raises UsageError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); remove it, and run the command again") from error


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def page(title: str, caption: str, picture: str, *parts: str) -> str:
    """Return Markdown: a heading, a picture (the name of a file beside the page), and the parts that are not empty."""
    return "\n\n".join([f"# {title}", f"![{caption}]({picture})", *filter(None, parts)])


def report_file(path: Path, ending: str) -> Path:
    """Return PATH.json, PATH.md or PATH.png; PATH may contain dots, as in `table1-book.txt-micro`."""
    return path.with_name(path.name + ending)


def write_report(path: Path, record: dict[str, Any], text: str) -> None:
    """Write PATH.json and PATH.md, which ends with the provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(report_file(path, ".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    source = f"Command: `{record['command']}`  \nMachine: {record['machine']}  \nVersions: {versions}"
    write_whole(report_file(path, ".md"), f"{text.rstrip()}\n\n{source}\n")


def publish(
    path: Path,
    record: dict[str, Any] | None,
    render: Callable[[Any], str],
    draw: Callable[[Any, Path], None],
    comment: str | None = None,
) -> str:
    """Write PATH.json, and PATH.md and PATH.png from the record; return the path of PATH.md.

    comment: replaces that of the record. Raises NoResults if the record is None.
    """
    if record is None:
        raise NoResults(f"{path}.json: there are no results yet; run the command without --report first")
    if comment is not None:
        record = record | {"comment": comment}
    write_report(path, record, render(record))
    draw(record, report_file(path, ".png"))
    return f"{path}.md"


def rerender(
    path: Path, render: Callable[[Any], str], draw: Callable[[Any, Path], None], comment: str | None = None
) -> str:
    """Write PATH.md and PATH.png from PATH.json; return the path of PATH.md."""
    return publish(path, read_record(report_file(path, ".json")), render, draw, comment)


def open_record(path: Path, settings: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
    """Return the record at PATH.json, or a new one: `settings` and `empty`.

    Raises UsageError if the record was measured with other settings.
    """
    settings = json.loads(json.dumps(settings))
    record = read_record(report_file(path, ".json")) or settings | empty
    if different := differences({name: record.get(name) for name in settings}, settings):
        raise UsageError(
            f"{path}.json: was measured with other settings ({describe(different)}); remove it, or give another "
            "directory or name for the report"
        )
    return record


def model_card(name: str, model: HourglassLM, record: Record, about: Path, evaluations: Sequence[Path]) -> str:
    """Return a model card: the description in `about`, and the summaries of the evaluations' records.

    Raises UsageError if a section or a record is missing.
    """
    description = about.read_text(encoding="utf-8").strip()
    if missing := [section for section in SECTIONS if section not in description.splitlines()]:
        raise UsageError(f"{about}: lacks the section {missing[0]!r}; a model card requires {', '.join(SECTIONS)}")
    if not evaluations:
        raise UsageError("a model card requires figures; give records of evaluate.py --report as --evaluations")
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
