"""Checks of what a user hands in, on the host alone: of a traced array, shape and type are looked at.

So they cost a compiled program nothing, and what is traced is checked where it is handed in or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import Tokenizer

Array = jax.Array | np.ndarray


def check_tokens(name: str, tokens: Any, vocab_size: int, axes: str) -> Array:
    """`tokens` as an array of integers with these `axes`, such as "B, L".

    Raises UsageError, which calls them `name`, for another shape or type, where there are none, and for one that is not
    among 0 .. vocab_size - 1.
    """
    if not isinstance(tokens, jax.Array):
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise UsageError(f"{name} has rows of different lengths; give integers [{axes}]") from None
    if not tokens.size:
        raise UsageError(f"{name} is empty; give at least one token, such as the tokenizer's bos_id")
    if tokens.ndim != len(axes.split(",")) or not jnp.issubdtype(tokens.dtype, jnp.integer):
        found = "text" if tokens.dtype.kind in "US" else f"{tokens.dtype} {list(tokens.shape)}"
        raise UsageError(f"{name} is {found}; give integers [{axes}], as a tokenizer encodes them")
    if _readable(tokens) and not _all_below(tokens, vocab_size):
        values = np.asarray(tokens)
        raise UsageError(
            f"{name} has tokens outside 0 .. {vocab_size - 1}, the model's vocabulary ({values.min()} .. "
            f"{values.max()}); encode with the model's own tokenizer"
        )
    return tokens


def _readable(array: Array) -> bool:
    """Whether this process has its values: not those of a traced array, nor what lies on others' devices."""
    return isinstance(array, np.ndarray) or (not isinstance(array, jax.core.Tracer) and array.is_fully_addressable)


def _all_below(tokens: Array, vocab_size: int) -> bool:
    limits = np.iinfo(tokens.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return True  # as bytes are: a text on disk need not be read for this
    values = np.asarray(tokens)
    return bool(values.min() >= 0 and values.max() < vocab_size)


def token_mask(name: str, tokens: int | Iterable[int], vocab_size: int) -> np.ndarray:
    """bool [V], true at each of `tokens`, one or several or none. Raises UsageError as `check_tokens`."""
    mask = np.zeros(vocab_size, bool)
    # An array of no axes calls itself Iterable, and is one token.
    listed = list(tokens) if isinstance(tokens, Iterable) and getattr(tokens, "shape", None) != () else [tokens]
    if listed:
        mask[np.asarray(check_tokens(name, listed, vocab_size, "n"))] = True
    return mask


def check_tokenizer(tokenizer: Tokenizer, config: HourglassConfig) -> None:
    """Raises UsageError for one that is not of the model's size."""
    if tokenizer.vocab_size != config.tokenizer_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {config.tokenizer_size}; give the one it "
            "was trained with"
        )


def check_mask(mask: Any, shape: tuple[int, ...], config: HourglassConfig) -> Array:
    """`mask` as bool of this shape; raises UsageError for another shape or type, and for a causal model."""
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if config.causal:
        raise UsageError("mask: a causal model sees nothing that comes later, and needs none; leave it out")
    if mask.dtype != bool or mask.shape != shape:
        raise UsageError(
            f"mask is {mask.dtype} {list(mask.shape)}; give bool {list(shape)}, True for tokens that count"
        )
    return mask


def check_causal(config: HourglassConfig, problem: str) -> None:
    """Raises UsageError, with the problem, for a model that sees both sides."""
    if not config.causal:
        raise UsageError(f"causal=False: the model sees both sides, {problem}")


def check_decodes(config: HourglassConfig) -> None:
    """Raises UsageError for a model that sees both sides, or has LSH attention."""
    check_causal(config, "so each new token would change all before it, and there is no decoding; choose causal=True")
    if not config.decodes:
        raise UsageError("token_attention='lsh' has no decoding: later tokens move what a position sees; choose 'full'")


def check_key(key: Any) -> None:
    """Raises UsageError unless this is one random key, typed or raw."""
    if isinstance(key, Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.ndim:
            return
        raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        if (key.dtype, key.shape) == (raw.dtype, raw.shape):
            return
        given = f"{key.dtype} {list(key.shape)}"
    else:
        given = type(key).__name__
    raise UsageError(f"key is {given}, not a random key; give one such as jax.random.key(0)")


def check_symbolic_length(config: HourglassConfig) -> None:
    """Raises UsageError unless the model can be exported for sequences of any length."""
    if config.attention != "plain" or config.token_attention != "full" or config.event_levels:
        raise UsageError(
            "a symbolic length needs attention='plain', token_attention='full' and boundaries='fixed', not "
            f"{config.attention!r}, {config.token_attention!r} and {config.boundaries!r}; change them or fix it"
        )


def check_x64(config: HourglassConfig) -> None:
    """Raises UsageError where JAX would compute in float32 what is to be float64."""
    if jax.dtypes.canonicalize_dtype(config.dtype) != config.dtype:
        raise UsageError(
            f"dtype={config.dtype!r} would be float32 here; set JAX_ENABLE_X64=1, or go within jax.enable_x64(True)"
        )


def check_returned(module: nnx.Module, vectors: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises UsageError where a shortening or an upsampling, as one of one's own, returns vectors of another shape."""
    if vectors.shape != shape:
        raise UsageError(f"{type(module).__name__} returned {list(vectors.shape)}; it must return {list(shape)}")


def check_prompts(prompts: Any, config: HourglassConfig, max_tokens: int) -> list[np.ndarray]:
    """Each prompt as int32 [n].

    Raises UsageError for what is no list of token lists, for a prompt that is empty, has unknown tokens, or would
    outgrow learned positions.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | Array):
        raise UsageError(
            f"prompts is {type(prompts).__name__}; give a list of token lists, such as [tokenizer.encode('an old')]"
        )
    rows = []
    for i, prompt in enumerate(prompts):
        row = np.asarray(check_tokens(f"prompt {i}", prompt, config.vocab_size, "n"), np.int32)
        if len(row) + max_tokens > config.position_limit:
            raise UsageError(
                f"prompt and new tokens make {len(row) + max_tokens}, but learned positions end at "
                f"max_length={config.max_length}; ask for fewer tokens"
            )
        rows.append(row)
    return rows
