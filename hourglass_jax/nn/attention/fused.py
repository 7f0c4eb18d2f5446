"""Attention in vendor kernels: cuDNN on GPUs, JAX's splash attention on TPUs, `jax.nn` elsewhere.

Relative positions, padding and dropout are not supported. The kernels have no groups, so groups are mapped to plain
sequences: query slots become additional heads of one key head, and with several key slots, each group's query moves to
its last key, behind dummy queries. `plain` has the formula.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.platform import platform

TPU_BLOCK = 512  # queries and keys in a block; a shorter sequence is one block
TPU_LANES = 128


def fused_attention(
    pattern: Pattern, inputs: Inputs, padding: Array | None = None, key: Array | None = None
) -> Float[Array, "B H GP K"]:
    """Compute attention; `choice` selects it only without relative positions, padding and dropout."""
    assert inputs.r is None and padding is None and key is None
    batch, heads, n_queries, size = inputs.q.shape
    slots, groups = pattern.query_slots, n_queries // pattern.query_slots
    q = inputs.q.reshape(batch, heads, groups, slots, size).swapaxes(2, 3).reshape(batch, -1, groups, size)
    if pattern.key_slots > 1:
        before = [(0, 0)] * 3 + [(pattern.key_slots - 1, 0), (0, 0)]
        q = jnp.pad(q[:, :, :, None], before).reshape(batch, heads * slots, -1, size)
    length = q.shape[2]
    window = pattern.window * pattern.key_slots
    compute = splash if platform() == "tpu" else dot_product_attention
    out = compute(*(pad_length(x, length) for x in (q, inputs.k, inputs.v)), window=window)[:, :, :length]
    out = out[:, :, pattern.key_slots - 1 :: pattern.key_slots]
    return out.reshape(batch, heads, slots, groups, size).swapaxes(2, 3).reshape(inputs.q.shape)


def pad_length(x: Float[Array, "B H L K"], length: int) -> Float[Array, "B H L2 K"]:
    """Append zeros, which the causal mask hides: cuDNN requires even lengths, splash attention whole blocks."""
    multiple = 2
    if platform() == "tpu":
        multiple = min(TPU_BLOCK, -(-length // TPU_LANES) * TPU_LANES)
    return jnp.pad(x, [(0, 0), (0, 0), (0, -length % multiple), (0, 0)])


def dot_product_attention(
    q: Float[Array, "B HP L K"], k: Float[Array, "B H L K"], v: Float[Array, "B H L K"], *, window: int
) -> Float[Array, "B HP L K"]:
    """Compute causal attention, with cuDNN where it supports the dtype."""
    cudnn = platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    out = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)),
        scale=1.0,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn" if cudnn else "xla",
    )
    return out.swapaxes(1, 2)


def splash(
    q: Float[Array, "B HP L K"],
    k: Float[Array, "B H L K"],
    v: Float[Array, "B H L K"],
    *,
    window: int,
    interpret: bool = False,
) -> Float[Array, "B HP L K"]:
    """Compute `dot_product_attention` with JAX's TPU kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads_per_key = q.shape[2], q.shape[1] // k.shape[1]
    shape = length, length
    if window:
        mask: Any = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask(shape)
    block = min(TPU_BLOCK, length)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads_per_key),
        block_sizes=splash_attention_kernel.BlockSizes(*[block] * 8),  # type: ignore[arg-type]
        interpret=interpret,
    )
    batched = jax.vmap(jax.vmap(kernel))
    return batched(q.reshape(*k.shape[:2], heads_per_key, *q.shape[2:]), k, v).reshape(q.shape)
