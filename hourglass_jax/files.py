"""Atomic writes of files and directories: an interrupted write leaves the old content. Locks between processes."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from absl import logging

from hourglass_jax.errors import UsageError

HELD = (errno.EAGAIN, errno.EACCES)  # errors of flock and msvcrt if another process holds the lock
LOCKED_BYTE = 1 << 30  # beyond the text: on Windows other processes cannot read locked bytes

_unwritten: set[str] = set()  # the files that `optional_output` has warned about


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` atomically; text is encoded as UTF-8.

    The last of several writers wins. A killed process may leave a temporary file, see `is_temporary`.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that replaces `path` if the body succeeds, and is removed otherwise.

    If `path` is a link, its target is replaced. An OSError, e.g. of a full disk, names `path`.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe, which cannot be replaced
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
    """Log a warning, once per file, if the body cannot write `path` or the file that its error names.

    errors: exceptions that are handled like an OSError.
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
    """Return whether this is a temporary file of `write_whole` for one of `names`, left by a killed process."""
    match = re.fullmatch(r"(.+?)(\.[0-9a-f]{8})?\.tmp", path.name)
    return bool(match and match[1] in names)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a directory that becomes `path` if the body succeeds, and is removed otherwise.

    An existing empty `path` stays the same directory, since links may point to it, and receives the files. Raises
    UsageError if `path` exists and is not an empty directory.
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


def try_lock(file: IO[str]) -> bool:
    """Lock `file`; return False if another process holds the lock.

    Warn, and return True, if the platform or the file system has no locks.
    """
    try:
        _lock(file.fileno())
    except (OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in HELD:
            return False
        reason = getattr(error, "strerror", None) or error
        logging.warning(
            "%s: exclusive use is not guaranteed, since no lock is available (%s); run one process per directory",
            file.name,
            reason,
        )
    return True


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
