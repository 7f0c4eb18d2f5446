"""The resampling methods by name: `HourglassConfig(shortening=..., upsampling=...)` chooses among them.

`nn.resampling` has the interface and fills both. A new method is one class and one entry, from anywhere:
`SHORTENINGS["gated"] = GatedShortening`.
"""

from collections.abc import Callable
from typing import Any

SHORTENINGS: dict[str, Callable[..., Any]] = {}
UPSAMPLINGS: dict[str, Callable[..., Any]] = {}
