"""Training objective: predict the next token, or masked tokens if the model is not causal.

Masking follows BERT (arXiv:1810.04805, section 3.1). The mask token is the last one of the model's vocabulary, and
not in the tokenizer's. The softmax includes it, as in BERT; it is never a target, so its probability soon vanishes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.layers import hashed, threefry

SHARE = 0.15  # share of tokens to predict
MASKED, REPLACED = 0.8, 0.1  # shares of these that become the mask token, or a random one; others stay
EVALUATION_SEED = 0
_STREAM = 0x4D41534B  # separates these draws from those of dropout in the same step


class Task(NamedTuple):
    """Model inputs and prediction targets of a batch, all [B, L].

    inputs, targets: int.
    weights: float, loss weight of each prediction.
    mask: bool, False for padding; None for a causal model.
    """

    inputs: jax.Array
    targets: jax.Array
    weights: jax.Array
    mask: jax.Array | None = None


def task_of(config: HourglassConfig, tokens: jax.Array, weights: jax.Array, key: jax.Array | None = None) -> Task:
    """Return the task for tokens [B, L + 1] and weights [B, L] of `data.pipeline`.

    A causal model predicts each next token. Otherwise some of the last L tokens are masked and predicted; tokens of
    weight 0 are padding. `key` draws the masked tokens; without a key, as in evaluation, they are always the same.
    """
    if config.causal:
        return Task(tokens[:, :-1], tokens[:, 1:], weights)
    key = jax.random.key(EVALUATION_SEED) if key is None else jax.random.fold_in(key, _STREAM)
    text, mask = tokens[:, 1:], weights > 0
    inputs, chosen = corrupt(text, key, config.tokenizer_size, mask)
    return Task(inputs, text, weights * chosen.astype(weights.dtype), mask)


def corrupt(
    tokens: jax.Array, key: jax.Array, mask_token: int, mask: jax.Array | None = None, *, share: float = SHARE
) -> tuple[jax.Array, jax.Array]:
    """Mask tokens int [B, L] as BERT does: return model inputs int32 [B, L], and which to predict, bool [B, L].

    mask: bool [B, L], False for padding.
    share: of a row's tokens to predict, at least one token. 80 % of these become the mask token, 10 % a random token;
        10 % stay.

    The draws of a row depend on `key` and its tokens, not on other rows.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    hashes = hashed(tokens.astype(jnp.uint32), jnp.arange(tokens.shape[1], dtype=jnp.uint32)[None])
    of_rows = jnp.where(mask, hashes, 0).sum(axis=1, dtype=jnp.uint32)
    keys = jax.vmap(partial(jax.random.fold_in, threefry(key)))(of_rows)
    return jax.vmap(partial(_corrupt_row, mask_token=mask_token, share=share))(tokens, mask, keys)


def _corrupt_row(
    tokens: jax.Array, mask: jax.Array, key: jax.Array, *, mask_token: int, share: float
) -> tuple[jax.Array, jax.Array]:
    choice_key, fate_key, token_key = jax.random.split(key, 3)
    order = jnp.argsort(jnp.where(mask, jax.random.uniform(choice_key, tokens.shape), 1))
    n_chosen = jnp.maximum(jnp.round(share * mask.sum().astype(float)), 1).astype(int)
    chosen = mask & (jnp.argsort(order) < n_chosen)
    fate = jax.random.uniform(fate_key, tokens.shape)
    others = jax.random.randint(token_key, tokens.shape, 0, mask_token, jnp.int32)
    instead = jnp.where(fate < MASKED, mask_token, jnp.where(fate < MASKED + REPLACED, others, tokens))
    return jnp.where(chosen, instead, tokens), chosen
