"""Overlap of validation and training data: shared files, copies of files, repeated passages."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from hourglass_jax.data.files import file_id, warn_once
from hourglass_jax.errors import UsageError

WINDOW = 64  # tokens
N_SAMPLES = 256  # passages of the validation text
PIECE, MAX_PIECES = 2**20, 128  # tokens in a piece of the training text; pieces searched
MIN_DISTINCT = 4  # distinct tokens in a window: blank lines and rows of dashes occur in any text
MAX_SHARE = 0.1  # share of repeated samples; measured: 0.4 % in books, 8 % in Python's reference


def without_copies(train: list[Path], valid: Collection[Path], source: object) -> list[Path]:
    """Return the files of `train` without those of `valid` and their copies; log the excluded files.

    Raises UsageError if no file is left. Messages name `source`.
    """
    excluded = copies(train, valid)
    if len(excluded) == len(train):
        raise UsageError(
            f"{source}: every training file is a validation file or a copy of one; give different files for training "
            "and validation"
        )
    if excluded:
        names = ", ".join(sorted(map(str, excluded))[:3]) + ", ..." * (len(excluded) > 3)
        warn_once(f"{source}: {len(excluded)} of {len(train)} training files excluded, used for validation: {names}")
    return [file for file in train if file not in excluded]


def copies(files: Collection[Path], originals: Collection[Path]) -> set[Path]:
    """Return the files that are, or have the same bytes as, one of `originals`; reads only files of equal size."""
    ids = set(map(file_id, originals))
    same = {file for file in files if file_id(file) in ids}
    others = [file for file in files if file not in same]
    sizes = {file.stat().st_size for file in others} & {file.stat().st_size for file in originals}
    digests = {sha256(file) for file in originals if file.stat().st_size in sizes}
    return same | {file for file in others if file.stat().st_size in sizes and sha256(file) in digests}


def sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def warn_of_repeats(train: np.ndarray, valid: np.ndarray, source: object) -> None:
    """Log a warning if many sampled passages of the validation tokens [M] occur in the training tokens [N]."""
    if (share := repeated_share(train, valid)) > MAX_SHARE:
        warn_once(
            f"{source}: {share:.0%} of sampled validation passages ({WINDOW} tokens each) also occur in the training "
            "text, so the validation loss rewards memorization; set valid_path to another text"
        )


def repeated_share(train: np.ndarray, valid: np.ndarray) -> float:
    """Return the share of sampled validation passages that occur in the training text.

    Training windows start at multiples of WINDOW. A sample has 2 * WINDOW - 1 tokens: a copy of such a passage contains
    one whole training window, wherever it starts. Only evenly spaced pieces of a long text are searched.
    """
    n_starts = len(valid) - 2 * WINDOW + 2
    if n_starts < 1:
        return 0.0
    starts = np.linspace(0, n_starts - 1, min(N_SAMPLES, n_starts)).astype(int)
    windows = valid[starts[:, None, None] + np.arange(WINDOW)[:, None] + np.arange(WINDOW)]
    hashes = hash_windows(windows.reshape(-1, WINDOW))
    known = set(hashes.tolist())
    found: set[int] = set()
    pieces = range(0, len(train), PIECE)
    for i in np.linspace(0, len(pieces) - 1, min(MAX_PIECES, len(pieces))).astype(int):
        piece = train[pieces[i] : pieces[i] + PIECE]
        piece = piece[: len(piece) // WINDOW * WINDOW].reshape(-1, WINDOW)
        found |= known.intersection(hash_windows(piece).tolist())
    ordered = np.sort(windows)
    varied = np.count_nonzero(np.diff(ordered), -1) + 1 >= MIN_DISTINCT
    repeated = np.isin(hashes, list(found)).reshape(varied.shape) & varied
    return float(repeated.any(-1).mean())


def hash_windows(windows: np.ndarray) -> np.ndarray:
    """Hash tokens [N, WINDOW] of any integer type to uint64 [N]."""
    words = np.ascontiguousarray(windows).view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
    return words @ factors
