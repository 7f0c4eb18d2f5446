"""Which implementation computes attention: chosen here alone, by its name in the configuration."""

from __future__ import annotations

from collections.abc import Callable

import jax

from hourglass_jax.nn.attention.blocked import blocked_attention
from hourglass_jax.nn.attention.fused import fused_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.plain import plain_attention

IMPLEMENTATIONS: dict[str, Callable[[Pattern, Inputs, jax.Array | None, jax.Array | None], jax.Array]] = {
    "blocked": blocked_attention,
    "plain": plain_attention,
    "fused": fused_attention,
}


def attend(
    name: str, pattern: Pattern, inputs: Inputs, first: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """-> [B, H, G P, K]. Groups before `first` [B] are padding, seen by themselves alone; `key` turns dropout on."""
    one_slot = pattern.query_slots == pattern.key_slots == 1  # so that there are as many queries as keys
    if name == "fused" and not (one_slot and inputs.r is first is key is None):
        name = "blocked"
    return IMPLEMENTATIONS[name](pattern, inputs, first, key)
