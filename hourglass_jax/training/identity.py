"""Identity of a run: settings and data fingerprints, except paths and options that affect only speed."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hourglass_jax.config import HourglassConfig
from hourglass_jax.run_config import DataConfig, OptimizerConfig, TrainConfig

PATHS = ("path", "valid_path", "data_path", "pretrained")  # settings that are paths
MEANS = ("attention", "remat", "max_unrolled_layers")  # options that do not change the result
DEFAULTS = {"model": HourglassConfig, "data": DataConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
N_PIECES, PIECE = 64, 65_536  # number of sampled pieces of a long text; tokens per piece


def fingerprint(tokens: np.ndarray) -> int:
    """Return a checksum of tokens of any integer type.

    For a long text it covers the length and evenly spaced pieces, including both ends, which is fast even for 100 GB.
    """
    tokens = tokens.reshape(-1)
    crc, starts, length = 0, [0], len(tokens)
    if len(tokens) > N_PIECES * PIECE:
        crc, length = zlib.crc32(str(len(tokens)).encode()), PIECE
        starts = [i * (len(tokens) - PIECE) // (N_PIECES - 1) for i in range(N_PIECES)]
    for start in starts:
        crc = zlib.crc32(np.ascontiguousarray(tokens[start : start + length], np.int32).data, crc)
    return crc


def first_batch_fingerprint(tokens: np.ndarray) -> dict[str, int]:
    """Return the setting that identifies the split and the order of the data."""
    return {"first_batch_fingerprint": fingerprint(tokens)}


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a run: all except PATHS and MEANS.

    Options that are newer than the run get their defaults.
    """
    known = json.loads(json.dumps(settings))
    for name, cls in DEFAULTS.items():
        if isinstance(known.get(name), dict):
            # Not cls(**stored): it would reject the name of a plugin's shortening that this process has not imported.
            defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
            known[name] = json.loads(json.dumps(defaults)) | known[name]
    return {
        name: identity(value) if isinstance(value, dict) else value
        for name, value in known.items()
        if name not in PATHS + MEANS
    }


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the leaves in which two JSON values differ, {"a.b": (1, 2)}; a missing leaf is None."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found |= differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        return found
    return {} if old == new else {name: (old, new)}


def describe(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the output of `differences` as 'a.b: 1 -> 2, c: 3 -> 4'."""
    return ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changes.items())
