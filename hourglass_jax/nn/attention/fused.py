"""Attention in a vendor's kernel: cuDNN's on GPUs, JAX's splash attention on TPUs; elsewhere XLA's plain formula.

None of them knows groups, relative positions, padding or dropout. Groups fit all the same: query slots are further
heads of one key head, and where a group has several keys its query stands at the last of them, between queries that
nobody reads. Lengths are padded to what the kernel takes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.platform import platform

TPU_BLOCK = 512  # of queries and of keys; shorter sequences are one block
TPU_LANES = 128


def fused_attention(
    pattern: Pattern, inputs: Inputs, first: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """-> [B, H, G P, K]; for inputs without relative positions, padding and dropout."""
    assert inputs.r is None and first is None and key is None
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


def pad_length(x: jax.Array, length: int) -> jax.Array:
    """Zeros behind, which no query of the text sees: cuDNN takes even lengths alone, splash attention whole blocks."""
    multiple = 2
    if platform() == "tpu":
        multiple = min(TPU_BLOCK, -(-length // TPU_LANES) * TPU_LANES)
    return jnp.pad(x, [(0, 0), (0, 0), (0, -length % multiple), (0, 0)])


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int) -> jax.Array:
    """q [B, H P, L, K], k and v [B, H, L, K] -> as q."""
    cudnn = platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    out = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)),
        scale=1.0,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn" if cudnn else "xla",
    )
    return out.swapaxes(1, 2)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, interpret: bool = False) -> jax.Array:
    """As `dot_product_attention`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, share = q.shape[2], q.shape[1] // k.shape[1]
    shape = length, length
    if window:
        mask: Any = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask(shape)
    block = min(TPU_BLOCK, length)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([mask] * share),
        block_sizes=splash_attention_kernel.BlockSizes(*[block] * 8),  # type: ignore[arg-type]
        interpret=interpret,
    )
    of_heads = jax.vmap(jax.vmap(kernel))
    return of_heads(q.reshape(*k.shape[:2], share, *q.shape[2:]), k, v).reshape(q.shape)
