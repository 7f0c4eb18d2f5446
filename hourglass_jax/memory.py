"""Reuse and release of freed memory, with glibc's malloc."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import jax

KEEP = ((-1, -1), (-4, 0))  # mallopt: no trimming (M_TRIM_THRESHOLD), no mapped blocks (M_MMAP_MAX)
VARIABLES = ("GLIBC_TUNABLES", "MALLOC_")


def keep_freed_memory() -> None:
    """Reuse the memory of a training step for the next one; launchers call this before JAX computes anything.

    By default XLA:CPU allocates temporaries anew in each step, and glibc maps and clears their pages. That costs 0.3 s
    of processor time per step with 8.9M parameters and 16 x 256 tokens. Computations also run in the calling thread,
    since glibc keeps large blocks only in the main thread.

    Does nothing if the environment sets GLIBC_TUNABLES or MALLOC_*.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None and not any(name.startswith(VARIABLES) for name in os.environ):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        for parameter, value in KEEP:
            mallopt(parameter, value)


def release_memory() -> None:
    """Return freed memory to the system.

    The compiler frees hundreds of megabytes in small pieces, which glibc would keep although a step cannot reuse them.
    """
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """Return a function of the C library, or None if the library lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
