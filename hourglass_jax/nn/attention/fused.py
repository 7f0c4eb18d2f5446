"""JAX's own attention: a cuDNN kernel on GPUs, for bfloat16 and float16; elsewhere plain XLA."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.platform import platform


def fused_attention(
    pattern: Pattern, inputs: Inputs, first: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """-> [B, H, G, K]; for one slot, and neither relative positions nor padding nor dropout."""
    assert pattern.query_slots == pattern.key_slots == 1 and inputs.r is first is key is None
    q, k, v = (x.swapaxes(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    out = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation=kernel(q.dtype))
    return out.swapaxes(1, 2)


def kernel(dtype: jnp.dtype) -> Literal["cudnn", "xla"]:
    """The implementation of `jax.nn.dot_product_attention` for this type and platform."""
    return "cudnn" if platform() == "gpu" and dtype in (jnp.bfloat16, jnp.float16) else "xla"
