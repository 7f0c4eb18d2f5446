"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import os

SETTINGS = ((-1, -1), (-4, 0), (-8, 1))  # of glibc's malloc.h: M_TRIM_THRESHOLD off, no M_MMAP_MAX, one M_ARENA_MAX
VARIABLES = ("GLIBC_TUNABLES", "MALLOC_")


def keep_memory() -> bool:
    """Keeps freed memory for what comes next, instead of giving it back to the system; returns whether that could be.

    On a CPU, XLA allocates a step's temporaries anew at every step. Blocks of their size glibc takes from the system,
    which maps and clears them page by page: 250,000 pages, 0.4 s of the processor, in a step of 8 x 512 bytes at
    d_model 256. The price is that the process stays as large as it ever was.

    Call it before JAX computes anything, as the launchers do: a thread keeps the pool of memory that it began with.
    Where a thread has allocated before, XLA's may be given its pool, which keeps blocks of less than 64 MB alone.
    Nothing is done with another C library, or where its environment variables (GLIBC_TUNABLES, MALLOC_...) are set.
    """
    chosen = any(name.startswith(VARIABLES) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if chosen or mallopt is None:
        return False
    return all(mallopt(option, value) for option, value in SETTINGS)
