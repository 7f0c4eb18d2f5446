"""More characters for a model that has been trained on others."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from hourglass_jax.checks import check_causal, check_tokenizer
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import CharTokenizer, TextTokenizer, boundary_tokens

Tokenizer = TypeVar("Tokenizer", bound=TextTokenizer)


def extend_vocabulary(model: HourglassLM, tokenizer: Tokenizer, text: str) -> tuple[HourglassLM, Tokenizer]:
    """A model and tokenizer that also know the characters of `text`; those given stay as they are.

    New tokens come after the old ones. In the embedding and the head they start as the mean of the old ones, so that
    the logits of the old tokens are what they were and those of the new ones never stand out. Boundaries that the text
    decides are told the new characters, too. Where all characters are known, as bytes always are, the two come back.
    Raises UsageError for a tokenizer that is not of the model's size, and for a model that sees both sides.
    """
    check_tokenizer(tokenizer, model.config)
    new = tokenizer.unknown(text)
    if not new or not isinstance(tokenizer, CharTokenizer):
        return model, tokenizer
    check_causal(model.config, "and its mask is the last token, after which none can be added; choose a text it knows")
    extended = type(tokenizer)([*tokenizer.characters, *new], clean=tokenizer.clean)
    config = dataclasses.replace(model.config, vocab_size=extended.vocab_size)
    if config.boundary_tokens == boundary_tokens(tokenizer, config.boundaries):  # and no list of somebody's own
        config = dataclasses.replace(config, boundary_tokens=boundary_tokens(extended, config.boundaries))
    longer = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    longer.eval() if model.dropout.deterministic else longer.train()
    graph, shapes = nnx.split(longer)
    return nnx.merge(graph, jax.tree.map(grow, nnx.state(model), shapes)), extended


def grow(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
    """`old` in the shape of `new`, which may be longer along one axis: there its mean is repeated."""
    longer = [axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis]]
    if not longer:
        return old
    [axis] = longer
    mean = old.mean(axis, keepdims=True)
    return jnp.concatenate([old, jnp.repeat(mean, new.shape[axis] - old.shape[axis], axis)], axis)
