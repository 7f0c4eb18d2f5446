"""Checksums of a checkpoint, written last: a directory without them is incomplete, one that differs is damaged.

Orbax restores an array with a flipped bit silently, and cannot tell a step that was cut off while it was removed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hourglass_jax.files import write_whole

MANIFEST = "MANIFEST.json"


def write_manifest(directory: Path, **facts: Any) -> None:
    """Seals `directory` with the SHA-256 of each of its files, and `facts` as JSON."""
    write_whole(directory / MANIFEST, json.dumps({"files": _checksums(directory), **facts}, indent=1))


def add_facts(directory: Path, **facts: Any) -> None:
    """Adds `facts` to what seals `directory`; nothing where it is not sealed."""
    if manifest := read_manifest(directory):
        write_whole(directory / MANIFEST, json.dumps(manifest | facts, indent=1))


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `write_manifest` wrote; empty where the directory was never sealed."""
    try:
        return json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}


def damage(directory: Path) -> str:
    """What is wrong with a sealed directory, in words; empty if nothing is."""
    expected = read_manifest(directory).get("files")
    if not isinstance(expected, dict):
        return "it was not finished"
    found = _checksums(directory)
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if changed := [name for name in sorted(expected) if expected[name] != found[name]]:
        return f"{changed[0]} was changed since it was written"
    return ""


def _checksums(directory: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            with path.open("rb") as file:
                checksums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums
