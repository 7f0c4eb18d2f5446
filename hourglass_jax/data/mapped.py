"""A file's bytes as an array on disk, which notices that the file is changed in place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from hourglass_jax.errors import UsageError


class FileChanged(UsageError):
    """A memory-mapped file was shortened or overwritten in place."""


class MappedBytes(np.memmap):
    """uint8 [N], read-only. Indexing raises FileChanged if the file has changed since it was opened.

    Reading a page beyond the end of a shortened file kills the process, so the check comes first. It comes again
    after the read, so that what was read is what the file held when it was opened. A file that is replaced by rename
    stays readable as it was.
    """

    _mmap: Any  # of NumPy: None for a copy in memory
    _file: IO[bytes] | None
    _stamp: tuple[int, int]

    def __new__(cls, path: str | Path) -> MappedBytes:
        file = open(path, "rb")  # noqa: SIM115 - stays open as long as the array: the path may name another file later
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
        """Raise FileChanged if the file has another size or time stamp than when it was opened."""
        if self._file and stamp(self._file) != self._stamp:
            raise FileChanged(
                f"{self._file.name}: was changed in place while it was read; replace a text by renaming a new file to "
                "its name"
            )


def stamp(file: IO[bytes]) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change in ns."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns
