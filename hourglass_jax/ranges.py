"""Checks of single options: one line with what was given and what is allowed."""

from __future__ import annotations

import numbers
from collections.abc import Collection

from hourglass_jax.errors import UsageError


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")


def check_range(name: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raises unless low <= value <= high (low < value with `open_low`), and `value` is whole where `low` is an int."""
    kind, wanted = (numbers.Integral, "a whole number of ") if isinstance(low, int) else (numbers.Real, "")
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low):
        bounds = f"{'more than' if open_low else 'at least'} {low:g}"
        bounds += "" if high == float("inf") else f" and at most {high:g}"
        raise UsageError(f"{name}={value!r} is out of range; it must be {wanted}{bounds}")
