"""Tensors of a .pth file, read without running any code from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hourglass_jax.errors import UsageError

STATE_KEYS = ("model_state_dict", "state_dict", "model", "net", "weights")


def read_state_dict(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> tensors by name, floating ones as float32, and what the file holds beside them.

    The file is a state dict, or a dictionary with one under one of `STATE_KEYS`. Raises UsageError where it is not,
    is damaged, or would need code of its own to be run.
    """
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{error}; pip install -e '.[torch]'") from None
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, as the damage
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise UsageError(f"{path}: not a file of weights alone, or damaged; nothing in it was run ({reason})") from None

    def is_state(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(map(torch.is_tensor, value.values()))

    def to_numpy(tensor: Any) -> np.ndarray:
        tensor = tensor.detach().to_dense()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    rest = {}
    if not is_state(content):
        keys = [key for key in STATE_KEYS if isinstance(content, Mapping) and is_state(content.get(key))]
        if not keys:
            raise UsageError(f"{path}: holds no state dict, neither itself nor under {', '.join(STATE_KEYS)}")
        rest = {key: value for key, value in content.items() if key != keys[0]}
        content = content[keys[0]]
    return {str(name): to_numpy(tensor) for name, tensor in content.items()}, rest
