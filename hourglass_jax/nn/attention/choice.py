"""Choice of the attention implementation, by name and by platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.attention.biased import biased_attention
from hourglass_jax.nn.attention.blocked import blocked_attention
from hourglass_jax.nn.attention.fused import fused_attention
from hourglass_jax.nn.attention.kernel import kernel_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.plain import plain_attention
from hourglass_jax.nn.attention.stored import stored_attention
from hourglass_jax.nn.platform import n_devices, platform

IMPLEMENTATIONS: dict[str, Callable[[Pattern, Inputs, jax.Array | None, jax.Array | None], jax.Array]] = {
    "blocked": blocked_attention,
    "plain": plain_attention,
    "fused": fused_attention,
    "kernel": kernel_attention,
}
EXPERIMENTS = {"biased": biased_attention, "stored": stored_attention}  # relative attention on GPUs
LARGEST_HEAD = 128  # head_dim; larger tiles do not fit into a GPU's shared memory


def attend(
    name: str, pattern: Pattern, inputs: Inputs, padding: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """Compute attention with the implementation `name`; `Pattern` describes `padding`. `key` turns dropout on."""
    options = {"relative positions": inputs.r is not None, "padding": padding is not None, "dropout": key is not None}
    used = tuple(option for option, is_used in options.items() if is_used)
    name, _ = choose(name, inputs.q.dtype, inputs.q.shape[-1], used, pattern.causal)
    return (IMPLEMENTATIONS | EXPERIMENTS)[name](pattern, inputs, padding, key)


def choose(name: str, dtype: Any, head_dim: int, used: tuple[str, ...] = (), causal: bool = True) -> tuple[str, str]:
    """Return the name of the implementation to run, and the reason.

    used: the options in use that fused attention does not support.
    """
    if name == "auto":
        not_causal = "blocked", "the kernels support only causal attention"
        name, reason = best(platform(), jnp.dtype(dtype), head_dim, used) if causal else not_causal
        log_once(f"attention: {name} ({reason})")
        return name, reason
    if name == "biased":
        return choose_biased(dtype, head_dim, used)
    if name == "fused" and used:
        return "blocked", f"fused does not support {' or '.join(used)}"
    if name == "fused" and not has_fused(platform(), head_dim):
        limit = "several TPU devices" if platform() == "tpu" else f"head_dim {head_dim}"
        return "blocked", f"fused does not support {limit}"
    return name, "as configured"


def choose_biased(dtype: Any, head_dim: int, used: tuple[str, ...]) -> tuple[str, str]:
    """Return `biased`, or what replaces it: `fused` without relative positions, `blocked` for unsupported options."""
    if "relative positions" not in used:
        return choose("fused", dtype, head_dim, used)
    if "dropout" in used or n_devices() > 1:
        return "blocked", f"biased does not support {'dropout' if 'dropout' in used else 'several devices'}"
    return "biased", "as configured"


def best(platform: str, dtype: Any, head_dim: int, used: tuple[str, ...]) -> tuple[str, str]:
    """Return the fastest implementation on a platform, and the reason."""
    case = ", ".join([platform, str(dtype), f"head_dim {head_dim}", *used])
    if platform == "cpu":
        return "blocked", case
    if platform == "gpu" and dtype not in (jnp.bfloat16, jnp.float16):
        return "blocked", f"{case}: the kernels require bfloat16 or float16"
    if head_dim > LARGEST_HEAD:
        return "blocked", f"{case}: the kernels require head_dim <= {LARGEST_HEAD}"
    return "kernel" if used or not has_fused(platform, head_dim) else "fused", case


def has_fused(platform: str, head_dim: int) -> bool:
    """Return whether fused attention supports these heads; JAX's TPU kernel supports one device only."""
    if platform == "gpu":
        return head_dim % 8 == 0 and head_dim <= LARGEST_HEAD
    return platform == "cpu" or n_devices() == 1


@functools.cache
def log_once(message: str) -> None:
    """Log a message once per process."""
    logging.info(message)


def describe(config: HourglassConfig) -> str:
    """Return a line for the summary: the implementation that training uses on this platform, and why."""
    options = {"relative positions": config.positions == "relative", "dropout": config.dropout > 0}
    used = tuple(option for option, is_used in options.items() if is_used)
    name, reason = choose(config.attention, config.dtype, config.at_level(0).head_dim, used, config.causal)
    windows = config.by_level("window")
    window = f", window {windows[0]} on the tokens" if windows[0] else ""
    window += f", {' and '.join(map(str, windows[1:]))} on deeper levels (0: all)" if any(windows[1:]) else ""
    return f"attention: {config.attention}" + (f" = {name}, {reason}" if name != config.attention else "") + window
