"""Reuse the parameters of a model under another configuration: other shorten factors, a larger vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import check_causal, check_tokenizer
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM
from hourglass_jax.ranges import check_range
from hourglass_jax.tokenizers import CharTokenizer, TextTokenizer, boundary_tokens

Tokenizer = TypeVar("Tokenizer", bound=TextTokenizer)

_STREAM = 0xF  # separates these draws from those of batches, which also depend on (seed, step)


def at_shorten_factor(model: HourglassLM, shorten_factor: int) -> HourglassLM:
    """Return a model with another shorten factor, which shares the parameters of `model` (section 4.1).

    Raises UsageError unless the hierarchy has exactly one shortening, and no parameter has the size of the factor.
    Supported: average | select | attention_average and repeat | smooth | attention | attention_repeat.
    """
    check_range("shorten_factor", shorten_factor, 2)
    hierarchy = model.config.parsed_hierarchy.with_shorten_factor(shorten_factor)
    config = replace(model.config, hierarchy=str(hierarchy))
    try:
        return model.reconfigured(config)
    except UsageError as error:
        raise UsageError(
            f"shortening={config.shortening!r} with upsampling={config.upsampling!r} has parameters that depend on the "
            "shorten factor; choose average, select or attention_average, and repeat, smooth, attention or "
            "attention_repeat"
        ) from error


def drawn_factor(factors: Sequence[int], seed: int, step: int) -> int:
    """Draw the shorten factor of a training step uniformly from `factors`."""
    return int(np.random.default_rng((seed, step, _STREAM)).choice(factors))


def extend_vocabulary(model: HourglassLM, tokenizer: Tokenizer, text: str) -> tuple[HourglassLM, Tokenizer]:
    """Return a model and a tokenizer with the unknown characters of `text` added; the originals stay unchanged.

    Rows of new tokens, appended to embedding and head, are the mean of the old rows. So logits of old tokens do not
    change. Boundaries that depend on text include the new characters. Without unknown characters the originals are
    returned.

    Raises UsageError for a tokenizer whose size differs from the model's, and for a model that is not causal.
    """
    check_tokenizer(tokenizer, model.config)
    new = tokenizer.unknown(text)
    if not new or not isinstance(tokenizer, CharTokenizer):
        return model, tokenizer
    check_causal(model.config, "and no token can follow the mask token, the last one; give a text of known characters")
    extended = type(tokenizer)([*tokenizer.characters, *new], clean=tokenizer.clean)
    config = replace(model.config, vocab_size=extended.vocab_size)
    if config.boundary_tokens == boundary_tokens(tokenizer, config.boundaries):  # not a user's own list
        config = replace(config, boundary_tokens=boundary_tokens(extended, config.boundaries))
    larger = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    larger.eval() if model.dropout.deterministic else larger.train()
    graph, shapes = nnx.split(larger)
    return nnx.merge(graph, jax.tree.map(pad_with_mean, nnx.state(model), shapes)), extended


def pad_with_mean(array: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Pad an array to the shape of `target`, which is larger along at most one axis, with the mean of that axis."""
    larger = [axis for axis in range(array.ndim) if array.shape[axis] != target.shape[axis]]
    if not larger:
        return array
    [axis] = larger
    mean = array.mean(axis, keepdims=True)
    return jnp.concatenate([array, jnp.repeat(mean, target.shape[axis] - array.shape[axis], axis)], axis)
