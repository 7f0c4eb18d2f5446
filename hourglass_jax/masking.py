"""What a model is asked to predict: the next token, or where it sees both sides, masked ones.

The second is BERT's (arXiv:1810.04805, section 3.1). The mask token is the last one of the model's vocabulary, and its
tokenizer has none. As in BERT it is in the softmax like all others; since it is never the answer, it soon gets no
probability.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hourglass_jax.config import HourglassConfig
from hourglass_jax.nn.layers import hashed, threefry

SHARE = 0.15  # of the tokens, chosen to be predicted
MASKED, REPLACED = 0.8, 0.1  # of the chosen: the mask token instead, a random token instead; the others stay
EVALUATION_SEED = 0
_STREAM = 0x4D41534B  # sets the draws apart from dropout's of the same step


class Task(NamedTuple):
    """Of a batch, what is read and what is predicted at each position, all [B, L].

    inputs, targets: int.
    weights: float, how much each prediction counts.
    mask: bool, which inputs are no padding; None where the model is causal.
    """

    inputs: jax.Array
    targets: jax.Array
    weights: jax.Array
    mask: jax.Array | None = None


def task_of(config: HourglassConfig, tokens: jax.Array, weights: jax.Array, key: jax.Array | None = None) -> Task:
    """Of tokens [B, L + 1] and weights [B, L], as `data.pipeline` has them: the last L from the first, or masked ones.

    `key` draws those; without it, as in evaluation, they are always the same. What has no weight is padding then.
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
    """int [B, L] -> what is read instead, int32 [B, L], and which of them were chosen to be predicted, bool [B, L].

    Of each row's tokens a `share` is chosen, at least one; `mask` bool [B, L] leaves out padding. Of the chosen 80 %
    become the mask token, 10 % a random one below it, 10 % stay. Drawn from `key` and the row's own tokens: the same
    whatever batch it sits in.
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
