"""What makes two trainings the same run: settings, and fingerprints of what they read; never where, never how fast."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hourglass_jax.config import HourglassConfig
from hourglass_jax.run_config import DataConfig, OptimizerConfig, TrainConfig

PATHS = ("path", "valid_path", "data_path", "pretrained")  # names of settings that say where something lies
MEANS = ("attention", "remat", "max_unrolled_layers")  # how a model is computed, which leaves what is computed alone
DEFAULTS = {"model": HourglassConfig, "data": DataConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
N_PIECES, PIECE = 64, 65_536  # of a long text's fingerprint; PIECE in tokens


def fingerprint(tokens: np.ndarray) -> int:
    """Tells two texts, or one text in two vocabularies, apart in a run's settings, whatever the integer type.

    Of a long text, only its length and evenly spaced pieces with both ends count: 100 GB take no time.
    """
    tokens = tokens.reshape(-1)
    crc, starts, length = 0, [0], len(tokens)
    if len(tokens) > N_PIECES * PIECE:
        crc, length = zlib.crc32(str(len(tokens)).encode()), PIECE
        starts = [i * (len(tokens) - PIECE) // (N_PIECES - 1) for i in range(N_PIECES)]
    for start in starts:
        crc = zlib.crc32(np.ascontiguousarray(tokens[start : start + length], np.int32).data, crc)
    return crc


def of_first_batch(tokens: np.ndarray) -> dict[str, int]:
    """What a run's settings say of its first batch: beside a text's own fingerprint, how it is split and ordered."""
    return {"first_batch_fingerprint": fingerprint(tokens)}


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's settings says which run it is: all but PATHS and MEANS.

    Options that it is older than have their defaults.
    """
    known = json.loads(json.dumps(settings))
    for name, cls in DEFAULTS.items():
        if isinstance(known.get(name), dict):
            # A value that this process cannot check, such as a plugin's shortening, is compared as it stands.
            defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
            known[name] = json.loads(json.dumps(defaults)) | known[name]
    return {
        name: identity(value) if isinstance(value, dict) else value
        for name, value in known.items()
        if name not in PATHS + MEANS
    }


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves in which two JSON values differ: {"a.b": (1, 2)}; None where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found |= differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        return found
    return {} if old == new else {name: (old, new)}


def described(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """'a.b: 1 -> 2, c: 3 -> 4'."""
    return ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changes.items())
