"""Committed results: a JSON record that says what made it, and Markdown for readers."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from hourglass_jax import UsageError
from hourglass_jax.files import write_whole

EXPERIMENTS = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def provenance(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The command as it was given, but for a comment, the kind of machine, and versions."""
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
    """What is in a JSON file, None where there is no file; raises UsageError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); remove it to have it made anew") from error


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report_file(path: Path, ending: str) -> Path:
    """PATH.json, PATH.md or PATH.png of a report; a dot in its name, as of `table1-book.txt-micro`, ends nothing."""
    return path.with_name(path.name + ending)


def write_report(path: Path, record: dict[str, Any], text: str) -> None:
    """PATH.json and PATH.md; the Markdown ends with where its figures come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(report_file(path, ".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    source = f"Command: `{record['command']}`  \nMachine: {record['machine']}  \nVersions: {versions}"
    write_whole(report_file(path, ".md"), f"{text.rstrip()}\n\n{source}\n")
