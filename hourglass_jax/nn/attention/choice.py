"""Which implementation computes attention: chosen here alone, by name and by what the platform has a kernel for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.attention.blocked import blocked_attention
from hourglass_jax.nn.attention.fused import fused_attention
from hourglass_jax.nn.attention.kernel import kernel_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.plain import plain_attention
from hourglass_jax.nn.platform import n_devices, platform

IMPLEMENTATIONS: dict[str, Callable[[Pattern, Inputs, jax.Array | None, jax.Array | None], jax.Array]] = {
    "blocked": blocked_attention,
    "plain": plain_attention,
    "fused": fused_attention,
    "kernel": kernel_attention,
}
LARGEST_HEAD = 128  # numbers; of larger ones a GPU's shared memory has no room for a tile


def attend(
    name: str, pattern: Pattern, inputs: Inputs, padding: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """-> [B, H, G P, K]. For `padding` see `Pattern`; `key` turns dropout on."""
    more = {"relative positions": inputs.r is not None, "padding": padding is not None, "dropout": key is not None}
    q = inputs.q
    name, _ = choose(name, q.dtype, q.shape[-1], tuple(what for what, wanted in more.items() if wanted), pattern.causal)
    return IMPLEMENTATIONS[name](pattern, inputs, padding, key)


def choose(name: str, dtype: Any, size: int, more: tuple[str, ...] = (), causal: bool = True) -> tuple[str, str]:
    """The implementation for heads of so many numbers, and why; `more` is what fused attention knows nothing of."""
    if name == "auto":
        not_causal = "blocked", "the kernels are causal"
        name, reason = best(platform(), jnp.dtype(dtype), size, more) if causal else not_causal
        say(f"attention: {name} ({reason})")
        return name, reason
    if name == "fused" and more:
        return "blocked", f"fused knows no {' or '.join(more)}"
    if name == "fused" and not has_fused(platform(), size):
        what = "one device of a TPU alone" if platform() == "tpu" else f"no heads of {size}"
        return "blocked", f"fused takes {what}"
    return name, "as asked for"


def best(platform: str, dtype: Any, size: int, more: tuple[str, ...]) -> tuple[str, str]:
    where = f"{platform}, {dtype}, heads of {size}" + "".join(f", {what}" for what in more)
    if platform == "cpu":
        return "blocked", where
    if platform == "gpu" and dtype not in (jnp.bfloat16, jnp.float16):
        return "blocked", f"{where}: the kernels are for bfloat16"
    if size > LARGEST_HEAD:
        return "blocked", f"{where}: the kernels are for at most {LARGEST_HEAD}"
    return "kernel" if more or not has_fused(platform, size) else "fused", where


def has_fused(platform: str, size: int) -> bool:
    """cuDNN has restrictions, and JAX's TPU kernel does not know how to divide itself among devices."""
    if platform == "gpu":
        return size % 8 == 0 and size <= LARGEST_HEAD
    return platform == "cpu" or n_devices() == 1


@functools.cache
def say(words: str) -> None:
    """In the log, once."""
    logging.info(words)


def describe(config: HourglassConfig) -> str:
    """What `config.attention` means on this platform in training, in words."""
    more = {"relative positions": config.positions == "relative", "dropout": config.dropout > 0}
    wanted = tuple(what for what, is_wanted in more.items() if is_wanted)
    name, reason = choose(config.attention, config.dtype, config.head_dim, wanted, config.causal)
    window = f", window {config.window} on the tokens" if config.window else ""
    return f"attention: {config.attention}" + (f" = {name}, {reason}" if name != config.attention else "") + window
