"""Resampling methods by name, for `HourglassConfig(shortening=..., upsampling=..., boundaries=...)`.

`nn.resampling`, `nn.boundaries` and `nn.learned` define the interfaces and register their methods. A new method is one
class and one entry, in any module: `SHORTENINGS["gated"] = GatedShortening`.
"""

from collections.abc import Callable
from typing import Any

SHORTENINGS: dict[str, Callable[..., Any]] = {}
UPSAMPLINGS: dict[str, Callable[..., Any]] = {}
BOUNDARIES: dict[str, Callable[..., Any]] = {}
