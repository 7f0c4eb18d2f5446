"""Files of data sets: found in directories without duplicates, and memory-mapped."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import logging

from hourglass_jax.errors import UsageError


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged the same one."""
    logging.warning("%s", message)


def files_of_kind(directory: str | Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files below a directory with one of the suffixes, ignoring case; log the number of others."""
    files, others = [], Counter[str]()
    for file in files_below(directory):
        suffix = file.suffix.lower()
        if suffix in suffixes and file.is_file():
            files.append(file)
        else:
            others[(suffix or "no suffix") if file.is_file() else "no regular file"] += 1
    if files and others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) + ", ..." * (len(others) > 5)
        warn_once(f"{directory}: ignored {others.total()} of {len(files) + others.total()} files ({kinds})")
    return files


def files_below(directory: str | Path) -> Iterator[Path]:
    """Yield the files of a directory and its subdirectories, except hidden ones; linked directories come last.

    Each directory is visited once, so links may form a cycle.
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


def file_id(path: Path) -> tuple[int, int]:
    """Return device and inode, which are equal for all links to one file."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def unique_files(paths: Iterable[Path]) -> list[Path]:
    """Return the paths sorted, one for each file; regular names take precedence over symbolic links."""
    by_id: dict[tuple[int, int], Path] = {}
    for path in sorted(paths, key=Path.is_symlink):
        by_id.setdefault(file_id(path), path)
    return sorted(by_id.values())


class FileChanged(UsageError):
    """A memory-mapped file was shortened or overwritten in place."""


class MappedBytes(np.memmap):
    """Memory-mapped file: uint8 [N], read-only. Indexing raises FileChanged if the file was changed in place.

    The check before a read prevents a crash: reading past the end of a shortened file kills the process. The check
    after a read detects bytes that changed during it. Replacing the file by renaming is safe: the array keeps the old
    contents.
    """

    _mmap: Any  # of np.memmap; None for a copy in memory
    _file: IO[bytes] | None
    _stamp: tuple[int, int]

    def __new__(cls, path: str | Path) -> MappedBytes:
        file = open(path, "rb")  # noqa: SIM115 - open as long as the array: `path` may later name another file
        mapped: Any = super().__new__(cls, file, np.uint8, mode="r")
        mapped._file, mapped._stamp = file, stamp(file)
        return mapped

    def __array_finalize__(self, source: Any) -> None:
        super().__array_finalize__(source)
        on_disk = self._mmap is not None
        self._file = getattr(source, "_file", None) if on_disk else None
        self._stamp = getattr(source, "_stamp", (0, 0))

    def __getitem__(self, index: Any) -> Any:
        self.check()
        found = super().__getitem__(index)
        self.check()
        is_copy = isinstance(found, MappedBytes) and found._mmap is None
        return found.view(np.ndarray) if is_copy else found

    def check(self) -> None:
        """Raise FileChanged if the size or the time stamp of the file has changed."""
        if self._file and stamp(self._file) != self._stamp:
            raise FileChanged(
                f"{self._file.name}: was changed in place during reading; to replace a text, rename a new file to its "
                "name"
            )


def stamp(file: IO[bytes]) -> tuple[int, int]:
    """Return size in bytes and modification time in ns."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns
