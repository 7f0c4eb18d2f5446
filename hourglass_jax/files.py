"""Files that are whole at every moment, whenever the process is killed."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from absl import logging

from hourglass_jax.errors import UsageError

_unwritten: set[str] = set()  # the files that `optional_output` has warned about


def write_whole(path: Path, content: str | bytes) -> None:
    """Text is written in UTF-8; at every moment `path` is what it was before or all of `content`.

    Several may write at once: the last one stays. A process that is killed may leave a file that `is_temporary`.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; it becomes `path` where the body succeeds, and nothing is left where it does not.

    Where `path` is a link, that is what it leads to. An OSError, such as that of a full disk, names `path`.
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
    except (Exception, KeyboardInterrupt) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and str(error.filename or temporary) == str(temporary):
            error.filename = str(path)
        raise


@contextmanager
def optional_output(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Log one warning per file, instead of raising, when the body cannot write `path` or the file its error names.

    errors: what the body raises then, beside OSError.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except kinds as error:
        name = str(getattr(error, "filename", None) or path)
        if name not in _unwritten:
            reason = getattr(error, "strerror", None) or error
            logging.warning("%s: cannot be written (%s); the run continues without it", name, reason)
        _unwritten.add(name)


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
