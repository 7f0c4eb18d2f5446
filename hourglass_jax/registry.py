"""The resampling methods by name. `nn.resampling` fills both; a new method is one class and one entry."""

from collections.abc import Callable
from typing import Any

SHORTENINGS: dict[str, Callable[..., Any]] = {}
UPSAMPLINGS: dict[str, Callable[..., Any]] = {}
