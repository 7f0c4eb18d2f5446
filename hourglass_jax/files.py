"""Files that are whole at every moment, whenever the process is killed."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hourglass_jax.errors import UsageError


def write_whole(path: Path, content: str | bytes) -> None:
    """Text is written in UTF-8; at every moment `path` is what it was before or all of `content`.

    Several may write at once: the last one stays. A process that is killed may leave a file that `is_temporary`.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; it becomes `path` where the body succeeds, and nothing is left where it does not.

    Where `path` is a link, that is what it leads to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe, which nothing can replace
        with path.open("wb") as file:
            yield file
        return
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (Exception, KeyboardInterrupt):
        temporary.unlink(missing_ok=True)
        raise


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
            directories[:] = [name for name in directories if not name.startswith(".")]
            waiting += [path for name in directories if (path := Path(here, name)).is_symlink()]
            yield from (Path(here, name) for name in names if not name.startswith("."))


def each_once(paths: Iterable[Path]) -> list[Path]:
    """Sorted; of several that lead to one file, the one without a link, or else the first."""
    by_place: dict[Path, Path] = {}
    for path in sorted(paths):
        place = path.resolve()
        if place not in by_place or path.absolute() == place:
            by_place[place] = path
    return sorted(by_place.values())


def is_temporary(path: Path, names: Collection[str]) -> bool:
    """Whether `write_whole` was killed as it wrote a file with one of these names, and left this one."""
    match = re.fullmatch(r"(.+?)(\.[0-9a-f]{8})?\.tmp", path.name)
    return bool(match and match[1] in names)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to write to; it becomes `path` where the body succeeds, and nothing is left where it does not.

    A `path` that is there stays that directory, since processes and links may know it, and takes over what was written.
    Raises UsageError unless `path` is an empty directory or absent.
    """
    path = path.expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path}: exists; choose another output directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as beside:
        whole = Path(beside) / path.name
        whole.mkdir()
        yield whole
        if not path.exists():
            whole.replace(path)
            return
        for part in whole.iterdir():
            part.replace(path / part.name)
