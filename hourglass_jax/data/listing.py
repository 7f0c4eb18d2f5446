"""The files of a directory, each once whatever links lead to it: what a model learns from must not validate it, too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def files_below(directory: str | Path) -> Iterator[Path]:
    """The files in a directory and in those below it, but for hidden ones; what lies behind links comes last.

    Nothing is entered twice: links may lead to where they lie.
    """
    seen: set[str] = set()
    waiting = [directory]
    for top in waiting:
        for here, directories, names in os.walk(top):
            if (place := os.path.realpath(here)) in seen:
                directories.clear()
                continue
            seen.add(place)
            directories[:] = sorted(name for name in directories if not name.startswith("."))
            waiting += [path for name in directories if (path := Path(here, name)).is_symlink()]
            yield from (Path(here, name) for name in names if not name.startswith("."))


def each_once(paths: Iterable[Path]) -> list[Path]:
    """Sorted; of several that lead to one file, the first that is no link itself, or else the first."""
    by_place: dict[Path, Path] = {}
    for path in sorted(paths, key=Path.is_symlink):
        by_place.setdefault(path.resolve(), path)
    return sorted(by_place.values())
