"""An exclusive lock on an open file; it ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import sys
from typing import IO

from absl import logging

HELD = (errno.EAGAIN, errno.EACCES)  # how flock and msvcrt report another holder
LOCKED_BYTE = 1 << 30  # beyond the text: Windows bars other processes from reading what is locked


def try_lock(file: IO[str]) -> bool:
    """Lock `file`; return False if another process holds the lock.

    Warn, and return True, where the platform or the file system has no locks.
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
