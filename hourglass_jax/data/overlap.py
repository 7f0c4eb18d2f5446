"""Validation data that is also training data: the same file, a copy of it, or a passage of its text."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from hourglass_jax.data.listing import place, warn_once
from hourglass_jax.errors import UsageError

WINDOW = 64  # tokens
N_SAMPLES = 256  # of the validation text; each has WINDOW windows, so that one lies at a multiple of WINDOW in a copy
PIECE, MAX_PIECES = 2**20, 128  # tokens that are searched at once, and pieces of a training text that are searched
MIN_DISTINCT = 4  # tokens in a window: rules and blanks repeat themselves in any text
MAX_SHARE = 0.1  # of repeated samples; measured: books 0.4 %, Python's reference 8 %


def without_copies(train: list[Path], valid: Collection[Path], source: object) -> list[Path]:
    """Return the files of `train` that are neither in `valid` nor copies of a file that is; log the others.

    Raises UsageError, which names the source, where none is left.
    """
    left_out = copies(train, valid)
    if len(left_out) == len(train):
        raise UsageError(
            f"{source}: every training file is a validation file or a copy of one; give other files for one of the two"
        )
    if left_out:
        names = ", ".join(sorted(map(str, left_out))[:3]) + ", ..." * (len(left_out) > 3)
        warn_once(f"{source}: {len(left_out)} of {len(train)} files left out of training, used for validation: {names}")
    return [file for file in train if file not in left_out]


def copies(files: Collection[Path], originals: Collection[Path]) -> set[Path]:
    """Return the files that are one of `originals` or have the same bytes; reads only files of equal size."""
    places = set(map(place, originals))
    same = {file for file in files if place(file) in places}
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
            f"{source}: {share:.0%} of the sampled validation passages of {WINDOW} tokens are also in the training "
            "text, so the validation loss rewards memorization; give another text as valid_path"
        )


def repeated_share(train: np.ndarray, valid: np.ndarray) -> float:
    """Return the share of sampled validation passages that occur in the training text.

    A sample is 2 * WINDOW - 1 tokens and counts if one of its windows equals a window at a multiple of WINDOW in
    `train`. Of more than PIECE * MAX_PIECES training tokens, evenly spaced pieces are searched.
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
    """Tokens [N, WINDOW] of any integer type -> uint64 [N]."""
    words = np.ascontiguousarray(windows).view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
    return words @ factors
