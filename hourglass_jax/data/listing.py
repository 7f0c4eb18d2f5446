"""The files of a directory, each once whatever links lead to it."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from absl import logging


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged the same one."""
    logging.warning("%s", message)


def files_of_kind(directory: str | Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files below a directory with one of the suffixes, in any case; log the number and kinds of others."""
    files, others = [], Counter[str]()
    for file in files_below(directory):
        suffix = file.suffix.lower()
        if suffix in suffixes and file.is_file():
            files.append(file)
        else:
            others[(suffix or "no suffix") if file.is_file() else "no regular file"] += 1
    if files and others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) + ", ..." * (len(others) > 5)
        warn_once(f"{directory}: files passed over: {others.total()} of {len(files) + others.total()} ({kinds})")
    return files


def files_below(directory: str | Path) -> Iterator[Path]:
    """The files in a directory and in those below it, but for hidden ones; what lies behind links comes last.

    Nothing is entered twice: links may lead to where they lie.
    """
    seen: set[str] = set()
    waiting = [directory]
    for top in waiting:
        for here, directories, names in os.walk(top):
            if (where := os.path.realpath(here)) in seen:
                directories.clear()
                continue
            seen.add(where)
            directories[:] = sorted(name for name in directories if not name.startswith("."))
            waiting += [path for name in directories if (path := Path(here, name)).is_symlink()]
            yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def place(path: Path) -> tuple[int, int]:
    """Return the device and inode, equal for all links to one file."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def each_once(paths: Iterable[Path]) -> list[Path]:
    """Sorted; of several links to one file, the first that is no symbolic link, or else the first."""
    by_place: dict[tuple[int, int], Path] = {}
    for path in sorted(paths, key=Path.is_symlink):
        by_place.setdefault(place(path), path)
    return sorted(by_place.values())
