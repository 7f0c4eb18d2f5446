"""The resampling methods by name: `HourglassConfig(shortening=..., upsampling=..., boundaries=...)` chooses among them.

`nn.resampling`, `nn.boundaries` and `nn.learned` have the interfaces and fill them. A new method is one class and one
entry, from anywhere: `SHORTENINGS["gated"] = GatedShortening`.
"""

from collections.abc import Callable
from typing import Any

SHORTENINGS: dict[str, Callable[..., Any]] = {}
UPSAMPLINGS: dict[str, Callable[..., Any]] = {}
BOUNDARIES: dict[str, Callable[..., Any]] = {}
