"""The model of the CPU suites, in this library and in the PyPI package hourglass-transformer-pytorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from hourglass_jax import HourglassConfig, HourglassLM, UsageError, generate

SIZES = {"vocab_size": 256, "hierarchy": "2@1 4@4 2@1", "d_model": 256, "n_heads": 8, "d_ff": 1024}
WIDTH = f"d_model {SIZES['d_model']}, {SIZES['n_heads']} heads"
# `learned` is the peer's architecture; `relative` is this library's default.
METHODS = {
    "learned": {"shortening": "attention_average", "upsampling": "attention_repeat", "positions": "learned"},
    "relative": {"shortening": "attention_average", "upsampling": "attention_linear", "positions": "relative"},
}
PEER = "hourglass-transformer-pytorch"


def config(name: str, **options: Any) -> HourglassConfig:
    return HourglassConfig(**SIZES, **METHODS[name], **options)


def generation(model: HourglassLM, batch: int, length: int) -> Callable[[], Any]:
    """Return a run that generates `length` tokens for each row of a batch, from prompts of one token."""
    prompts = [[i % 256] for i in range(batch)]
    return partial(generate, model, prompts, max_tokens=length, key=jax.random.key(0))


def make_peer(max_length: int) -> Any:
    """Return the peer's language model at the same sizes, a torch module. Raises UsageError if it is not installed."""
    try:
        import hourglass_transformer_pytorch.hourglass_transformer_pytorch as peer
    except ImportError as error:
        raise UsageError(f"{error}; pip install -e '.[bench]', or give --nopeer") from None
    peer.math = math  # the peer uses math without importing it
    sizes = {"num_tokens": 256, "dim": 256, "depth": (2, 4, 2), "shorten_factor": 4, "heads": 8, "dim_head": 32}
    return peer.HourglassTransformerLM(max_seq_len=max_length, **sizes)
