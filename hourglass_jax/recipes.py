"""Recipes: options of model and optimizer that belong together; sizes, lengths and rates are separate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """Options of HourglassConfig and OptimizerConfig that differ from their defaults."""

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]


RECIPES = {
    "paper": Recipe({}, {}),
    "modern": Recipe(
        {
            "normalization": "rms",
            "qk_norm": True,
            "activation": "relu_squared",
            "residual_init": "zero",
            "logit_softcap": 15.0,
            "input_residual": True,
            "ngram_sizes": (2, 3, 4),
        },
        {"optimizer": "muon"},
    ),
    # of the PyTorch project that this library grew out of
    "original": Recipe(
        {
            "shortening": "linear",
            "upsampling": "repeat",
            "positions": "learned",
            "activation": "relu",
            "norm": "final",
            "shift": "original",
        },
        {},
    ),
}
