"""Checks of options: one line with the given value and the allowed ones."""

from __future__ import annotations

import numbers
import os
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from hourglass_jax.errors import UsageError


def take_plain_values(config: Any) -> None:
    """Convert NumPy scalars, dtypes and paths in a frozen dataclass to Python values that JSON supports."""
    for name, value in vars(config).items():
        object.__setattr__(config, name, plain(value))


def plain(value: Any) -> Any:
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def literals(cls: type) -> dict[str, tuple[Any, ...]]:
    """Return the allowed values of each field of Literal type in a dataclass."""
    hints = get_type_hints(cls)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def check_literals(config: Any) -> None:
    """Raise UsageError for a field of Literal type with another value."""
    for name, allowed in literals(type(config)).items():
        check_choice(name, getattr(config, name), allowed)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")


def check_range(
    name: str,
    value: float,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise UsageError unless low <= value <= high; if `low` is an int, `value` must be. An open end is excluded."""
    kind, wanted = (numbers.Integral, "a whole number of ") if isinstance(low, int) else (numbers.Real, "")
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low) or (open_high and value == high):
        bounds = f"{'more than' if open_low else 'at least'} {low:g}"
        bounds += "" if high == float("inf") else f" and {'below' if open_high else 'at most'} {high:g}"
        raise UsageError(f"{name}={value!r} is out of range; it must be {wanted}{bounds}")
