"""Checks of user input on the host; for traced arrays only shape and dtype are checked."""

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
    """Return `tokens` as an integer array with these `axes`, e.g. "B, L".

    Raises UsageError, with `name`, for another shape or dtype, an empty array, and tokens outside 0 .. vocab_size - 1.
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
    """Return whether this process can read the values. Tracers and other processes' shards are not readable."""
    return isinstance(array, np.ndarray) or (not isinstance(array, jax.core.Tracer) and array.is_fully_addressable)


def _all_below(tokens: Array, vocab_size: int) -> bool:
    limits = np.iinfo(tokens.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return True  # e.g. bytes: no need to read a memory-mapped text
    values = np.asarray(tokens)
    return bool(values.min() >= 0 and values.max() < vocab_size)


def token_mask(name: str, tokens: int | Iterable[int], vocab_size: int) -> np.ndarray:
    """Return bool [V], True for each of `tokens`. Raises UsageError like `check_tokens`."""
    mask = np.zeros(vocab_size, bool)
    # A 0-d array passes the isinstance check, but is a single token.
    listed = list(tokens) if isinstance(tokens, Iterable) and getattr(tokens, "shape", None) != () else [tokens]
    if listed:
        mask[np.asarray(check_tokens(name, listed, vocab_size, "n"))] = True
    return mask


def check_tokenizer(tokenizer: Tokenizer, config: HourglassConfig) -> None:
    """Raise UsageError unless the tokenizer has the model's vocabulary size."""
    if tokenizer.vocab_size != config.tokenizer_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has {config.tokenizer_size}; use the "
            "tokenizer that it was trained with"
        )


def check_mask(mask: Any, shape: tuple[int, ...], config: HourglassConfig) -> Array:
    """Return `mask`. Raises UsageError unless it is bool of this shape, and for a causal model."""
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if config.causal:
        raise UsageError(
            "mask: a causal model does not support a mask; omit it, since padding at the end changes no other position"
        )
    if mask.dtype != bool or mask.shape != shape:
        raise UsageError(f"mask is {mask.dtype} {list(mask.shape)}; give bool {list(shape)}, False for padding")
    return mask


def check_causal(config: HourglassConfig, problem: str) -> None:
    """Raise UsageError for a model with causal=False; the message ends with `problem`."""
    if not config.causal:
        raise UsageError(f"causal=False: predictions see the tokens on both sides, {problem}")


def check_decodes(config: HourglassConfig) -> None:
    """Raise UsageError for a model that does not support decoding: causal=False or LSH attention."""
    check_causal(config, "so the model does not support decoding; choose causal=True")
    if not config.decodes:
        raise UsageError(
            "token_attention='lsh' does not support decoding, because later tokens change earlier predictions; choose "
            "'full'"
        )


def check_key(key: Any) -> None:
    """Raise UsageError unless `key` is one random key, typed or raw."""
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
    """Raise UsageError unless the model can be exported with a symbolic length."""
    if config.attention != "plain" or config.token_attention != "full" or config.event_levels:
        raise UsageError(
            "a symbolic length requires attention='plain', token_attention='full' and boundaries='fixed', not "
            f"{config.attention!r}, {config.token_attention!r} and {config.boundaries!r}; change them or use a fixed "
            "length"
        )


def check_x64(config: HourglassConfig) -> None:
    """Raise UsageError for float64 if JAX would compute in float32."""
    if jax.dtypes.canonicalize_dtype(config.dtype) != config.dtype:
        raise UsageError(
            f"dtype={config.dtype!r} would be float32 here; set JAX_ENABLE_X64=1, or use jax.enable_x64(True)"
        )


def check_returned(module: nnx.Module, vectors: jax.Array, shape: tuple[int, ...]) -> None:
    """Raise UsageError if a shortening or an upsampling returned vectors of another shape."""
    if vectors.shape != shape:
        raise UsageError(f"{type(module).__name__} returned {list(vectors.shape)}; it must return {list(shape)}")


def check_prompts(prompts: Any, config: HourglassConfig, max_tokens: int) -> list[np.ndarray]:
    """Return each prompt as int32 [n].

    Raises UsageError unless `prompts` is a list of token lists. Each must have a token and no token outside the
    vocabulary, and fit learned positions together with its new tokens.
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
                f"prompt {i} and max_tokens={max_tokens} are {len(row) + max_tokens} tokens, more than the learned "
                f"positions, max_length={config.max_length}; lower max_tokens"
            )
        rows.append(row)
    return rows
