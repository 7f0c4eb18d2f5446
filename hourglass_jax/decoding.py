"""Sampling text from a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.config import check_range
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM

STREAM_BLOCK = 8  # tokens between two calls of `stream`


def filter_logits(logits: jax.Array, temperature: float, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits [..., V] of the distribution to sample from: tempered, then cut to top_k, then to top_p."""
    logits = logits / max(temperature, 1e-6)
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        # A token stays while those before it hold less than top_p, so the likeliest one always does.
        probabilities = jax.nn.softmax(ordered, axis=-1)
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        lowest = jnp.where(stays, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


@partial(nnx.jit, static_argnames=("temperature", "top_k", "top_p"))
def _extend(model, tokens, lengths, done, keys, banned, stop_token, steps, *, temperature, top_k, top_p):
    """Runs steps[0] .. steps[1] - 1 of every row not done: step i writes tokens [B, L] at lengths + i."""
    rows = jnp.arange(len(tokens))

    def unfinished(carry):
        step, _, done = carry
        return (step < steps[1]) & ~done.all()

    def extend(carry):
        step, tokens, done = carry
        position = lengths + step
        logits = jnp.where(banned, -jnp.inf, model(tokens)[rows, position - 1])
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            step_keys = jax.vmap(jax.random.fold_in)(keys, position)
            token = jax.vmap(jax.random.categorical)(step_keys, filter_logits(logits, temperature, top_k, top_p))
        token = jnp.where(done, stop_token, token)
        return step + 1, tokens.at[rows, position].set(token), done | (token == stop_token)

    _, tokens, done = jax.lax.while_loop(unfinished, extend, (steps[0], tokens, done))
    return tokens, done


def row_keys(key: jax.Array, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """A key for each row [B]: it depends on `key` and on how many earlier rows have the same prompt.

    So a row's sample is the same whatever batch it sits in, and equal prompts still get different samples.
    """
    seen: dict[tuple[int, ...], int] = {}
    counts = []
    for prompt in prompts:
        counts.append(seen.get(tuple(prompt), 0))
        seen[tuple(prompt)] = counts[-1] + 1
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.array(counts))


def generate(
    model: HourglassLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    banned_tokens: Sequence[int] = (),
    stream: Callable[[list[np.ndarray]], None] | None = None,
) -> list[np.ndarray]:
    """Continues each prompt; returns the new tokens of each row, up to and without `stop_token`.

    prompts: token lists of any lengths, each at least one token.
    max_tokens: new tokens a row at most.
    key: typed PRNG key; see `row_keys` for what a row draws.
    temperature: 0 is greedy; top_k, top_p: cut the tempered distribution to the likeliest tokens.
    banned_tokens: never sampled.
    stream: called every few tokens with what each row has gained since the last call.

    Raises UsageError for empty prompts, tokens outside the vocabulary, options out of range, and a text that
    would outgrow learned positions.
    """
    check_range("max_tokens", max_tokens, 1)
    check_range("temperature", temperature, 0)
    if top_k is not None:
        check_range("top_k", top_k, 1)
    if top_p is not None:
        check_range("top_p", top_p, 0, 1, open_low=True)
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    vocab_size = model.config.vocab_size
    for i, row in enumerate(rows):
        if not len(row):
            raise UsageError(f"prompt {i} is empty; give at least one token, such as the tokenizer's bos_id")
        if row.min() < 0 or row.max() >= vocab_size:
            raise UsageError(f"prompt {i} has tokens outside 0 .. {vocab_size - 1}, the model's vocabulary")
    if not rows:
        return []
    lengths = np.array([len(row) for row in rows])
    total = int(lengths.max()) + max_tokens
    limit = model.config.position_limit
    if total > limit:
        raise UsageError(
            f"prompt and new tokens make {total}, but learned positions end at max_length={limit}; ask for fewer tokens"
        )
    total = int(min(-(-total // 64) * 64, limit))  # one compilation for many prompt lengths
    tokens = np.zeros((len(rows), total), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    stop = -1 if stop_token is None else stop_token
    sample = partial(
        _extend,
        model,
        lengths=jnp.asarray(lengths),
        keys=row_keys(key, [row.tolist() for row in rows]),
        banned=jnp.asarray(np.isin(np.arange(vocab_size), banned_tokens)),
        stop_token=stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )

    def new_tokens(start: int, end: int) -> list[np.ndarray]:
        """What steps start .. end - 1 gave each row, up to its stop token."""
        sampled = np.asarray(buffer)
        parts = [sampled[i, n : n + end] for i, n in enumerate(lengths)]
        return [part[: np.argmax(part == stop) if stop in part else end][start:] for part in parts]

    buffer, done = jnp.asarray(tokens), jnp.zeros(len(rows), bool)
    block = STREAM_BLOCK if stream else max_tokens
    for start in range(0, max_tokens, block):
        end = min(start + block, max_tokens)
        buffer, done = sample(tokens=buffer, done=done, steps=jnp.array([start, end]))
        if stream:
            stream(new_tokens(start, end))
        if done.all():
            break
    return new_tokens(0, max_tokens)
