"""The model that all suites on a CPU time, here and in the PyPI package hourglass-transformer-pytorch."""

from __future__ import annotations

import math
from typing import Any

from hourglass_jax import HourglassConfig, UsageError

SIZES = {"vocab_size": 256, "hierarchy": "2@1 4@4 2@1", "d_model": 256, "n_heads": 8, "d_ff": 1024}
# The peer's resampling with learned positions is the same architecture; `relative` is this library's default.
METHODS = {
    "learned": {"shortening": "attention_average", "upsampling": "attention_repeat", "positions": "learned"},
    "relative": {"shortening": "attention_average", "upsampling": "attention_linear", "positions": "relative"},
}
PEER = "hourglass-transformer-pytorch"


def config(name: str, **options: Any) -> HourglassConfig:
    return HourglassConfig(**SIZES, **METHODS[name], **options)


def find_peer() -> Any:
    """The peer's module; raises UsageError where it is not installed."""
    try:
        import hourglass_transformer_pytorch.hourglass_transformer_pytorch as peer
    except ImportError as error:
        raise UsageError(f"{error}; pip install -e '.[bench]', or give --nopeer") from None
    peer.math = math  # which it uses without importing it, at lengths that are no multiple of its factor
    return peer


def make_peer(max_length: int) -> Any:
    """The peer's language model at the same sizes, a torch module."""
    return find_peer().HourglassTransformerLM(
        num_tokens=256,
        dim=256,
        max_seq_len=max_length,
        depth=(2, 4, 2),
        shorten_factor=4,
        heads=8,
        dim_head=32,
    )
