"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import os


def release_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    The compiler frees hundreds of megabytes in small pieces, which glibc would keep and a step could not use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
