"""Generation with a hierarchical cache: layers at factor f run once every f tokens.

The logits equal those of the full forward pass, because the shortened vector of a group is complete at the group's
first position (section 2 of the paper: the shift by k - 1). `nn.cache` explains the common clock of a batch.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import check_decodes, check_key, check_prompts, token_mask
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM
from hourglass_jax.nn.cache import Cache
from hourglass_jax.nn.transformer import Stack
from hourglass_jax.prompts import AlignedPrompts, round_up, row_keys, size_bucket
from hourglass_jax.ranges import check_range

MAX_NEW_TOKENS = 10**9  # positions are int32
BLOCK = 64  # tokens for each call of the jitted loop
STREAM_BLOCK = 8  # the same with a `stream`
MIN_CACHE = 256  # tokens; a cache grows with its text, since each step attends to the full cache
ROWS_PER_CORE = 4  # least rows per thread on a CPU; a step with so few rows occupies only one core

Parts = list[np.ndarray]  # the new tokens of each row
Split = tuple[nnx.GraphDef, nnx.State]  # a model, as `nnx.split` returns it


@dataclass(frozen=True)
class Sampler:
    """Map logits to tokens.

    temperature: 0 is greedy; infinity makes all tokens equally likely.
    top_k, top_p: keep only the most likely tokens of the tempered distribution.

    Raises UsageError for options out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0)
        if self.top_k is not None:
            check_range("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_range("top_p", self.top_p, 0.0, 1, open_low=True)

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Sample int [B] from logits [B, V]; row b uses keys[b] only."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, self.filter(logits)).astype(jnp.int32)

    def filter(self, logits: jax.Array) -> jax.Array:
        """Return the logits [..., V] of the distribution to sample from: top_k, then temperature, then top_p."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        # Without the `where`, an infinite temperature would turn the -inf of a banned token into nan.
        logits = jnp.where(jnp.isneginf(logits), -jnp.inf, logits / max(self.temperature, 1e-6))
        if self.top_p is not None and self.top_p < 1:
            ordered = -jnp.sort(-logits, axis=-1)
            # Keep a token if the more likely ones sum to less than top_p; always keep the most likely one.
            probabilities = jax.nn.softmax(ordered, axis=-1)
            kept = (jnp.cumsum(probabilities, axis=-1) - probabilities < self.top_p).at[..., 0].set(True)
            lowest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        return logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingPlan:
    """Options of one `generate` call, the same for all rows.

    max_tokens: new tokens for each row.
    stops, banned: bool [V], tokens that end a row, and tokens that are never sampled.
    context: tokens that a row attends to, a multiple of `factor`.
    factor: K, `HourglassConfig.shared_factor`.
    """

    max_tokens: int
    stops: np.ndarray
    banned: np.ndarray
    sampler: Sampler = field(metadata={"static": True})
    context: int = field(metadata={"static": True})
    factor: int = field(metadata={"static": True})

    @property
    def max_cache(self) -> int:
        """Tokens that a cache holds at most; when it is full, tokens beyond the context are dropped."""
        return round_up(self.context + max(self.context // 4, BLOCK + self.factor), self.factor)

    def cache_length(self, n: int) -> int:
        """Return the size of a cache for n tokens."""
        return min(round_up(size_bucket(n, MIN_CACHE), self.factor), self.max_cache)


class _Rows(NamedTuple):
    """Inputs of the decoding loop for each row: `tail` and `lengths` of AlignedPrompts, and a random key [B]."""

    tail: jax.Array
    lengths: jax.Array
    keys: jax.Array


class _State(NamedTuple):
    """State of the decoding loop: the cache, the newest token of each row, int [B], and the rows that ended."""

    cache: Cache
    token: jax.Array
    done: jax.Array


class _NewText:
    """The new tokens of one row: those sampled from step `begin` up to step `end` or a stop token."""

    def __init__(self, begin: int, end: int, stops: np.ndarray):
        self.begin, self.end, self.stops = begin, end, stops
        self.parts: list[np.ndarray] = []

    def take(self, sampled: np.ndarray, step: int) -> np.ndarray:
        """Return the new tokens among those sampled from `step` on."""
        part = sampled[max(self.begin - step, 0) : max(self.end - step, 0)]
        [stops] = np.nonzero(self.stops[part])
        if len(stops):
            part, self.end = part[: stops[0]], step
        self.parts.append(part)
        return part

    def tokens(self) -> np.ndarray:
        return np.concatenate(self.parts)


def init_cache(model: HourglassLM, batch: int, max_length: int) -> Cache:
    """Return an empty cache for `batch` rows of at least `max_length` tokens, prompt included.

    `logits, cache = model.step(tokens, cache)` maps one token for each row, int [B], to logits [B, V]; `model.prefill`
    reads prompts in one pass. `costs.cache_bytes` returns its size. Raises UsageError for sizes below 1, for more
    tokens than learned positions, and for models that do not support decoding (causal=False, LSH attention).
    """
    check_range("batch", batch, 1)
    check_range("max_length", max_length, 1, model.config.position_limit)
    return model.init_cache(batch, round_up(max_length, model.config.shared_factor))


def generate(
    model: HourglassLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | Iterable[int] | None = None,
    banned_tokens: Iterable[int] = (),
    stream: Callable[[Parts], None] | None = None,
    max_context: int | None = None,
) -> list[np.ndarray]:
    """Continue each prompt; return the new tokens of each row, int32 [n], up to and excluding a stop token.

    prompts: token lists of any lengths, at least one token each, e.g. `[tokenizer.encode("an old")]`.
    max_tokens: maximum number of new tokens for each row.
    key: e.g. `jax.random.key(0)`. A row's sample does not depend on its batch; rows with equal prompts differ.
    temperature: 0 is greedy; top_k, top_p: keep only the most likely tokens of the tempered distribution.
    stop_token: one or several tokens, each of which ends a row.
    banned_tokens: tokens that are never sampled.
    stream: called every few tokens with the new tokens of each row since the last call; an exception ends generation.
    max_context: number of tokens that a row attends to (default: the model's `max_length`). Longer texts drop their
        oldest groups at all levels, a quarter of the context at a time, so memory stays constant.

    On a CPU large batches are split over threads, except with a `stream` or under settings of JAX that apply to the
    current thread (`with jax.enable_x64(True)`). KeyboardInterrupt ends generation after at most 64 tokens. Threads may
    share a model.

    Raises UsageError for empty prompts, tokens outside the vocabulary, options out of range, texts longer than learned
    positions, and models that do not support decoding (causal=False, LSH attention).
    """
    config = model.config
    check_decodes(config)
    check_range("max_tokens", max_tokens, 1, MAX_NEW_TOKENS)
    check_key(key)
    sampler = Sampler(temperature, top_k, top_p)
    rows = check_prompts(prompts, config, max_tokens)
    stops = token_mask("stop_token", () if stop_token is None else stop_token, config.vocab_size)
    banned = token_mask("banned_tokens", banned_tokens, config.vocab_size)
    if banned.all():
        raise UsageError(f"banned_tokens contains all {len(banned)} tokens; leave at least one to sample")
    context = config.max_length if max_context is None else max_context
    check_range("max_context", context, 1)
    if not rows:
        return []
    factor = config.shared_factor
    plan = SamplingPlan(max_tokens, stops, banned, sampler, round_up(context, factor), factor)
    split, keys = _unstacked(*nnx.split(model)), row_keys(key, [row.tolist() for row in rows])
    if stream:
        return _continue_rows(split, plan, rows, keys, STREAM_BLOCK, stream)
    return _split_over_cores(partial(_continue_rows, split, plan), rows, keys)


def _split_over_cores(continue_rows: Callable[..., Parts], rows: Sequence[np.ndarray], keys: jax.Array) -> Parts:
    """Run `continue_rows(rows, keys, block, after_block)`; on a CPU, parts of a large batch run in parallel threads."""
    n_cores = os.cpu_count() or 1 if jax.default_backend() == "cpu" else 1
    n_parts = min(n_cores, len(rows) // ROWS_PER_CORE)
    stopped = threading.Event()

    def after_block(_: Parts) -> None:
        if stopped.is_set():
            raise CancelledError

    if n_parts <= 1:
        return continue_rows(rows, keys, BLOCK, after_block)
    with ThreadPoolExecutor(n_parts) as pool:
        if pool.submit(lambda: jax.config.values).result() != jax.config.values:
            return continue_rows(rows, keys, BLOCK, after_block)  # settings of this thread, such as jax.enable_x64
        bounds = np.linspace(0, len(rows), n_parts + 1).astype(int)
        try:
            parts = [
                pool.submit(continue_rows, rows[i:j], keys[i:j], BLOCK, after_block)
                for i, j in itertools.pairwise(bounds)
            ]
            return [text for part in parts for text in part.result()]
        finally:
            stopped.set()  # after an interrupt or an error; the pool waits until all parts have ended


def _continue_rows(
    split: Split,
    plan: SamplingPlan,
    rows: Sequence[np.ndarray],
    keys: jax.Array,
    block: int,
    after_block: Callable[[Parts], None],
) -> Parts:
    """Return the new tokens of each row: one pass over the prompts, then the jitted loop, `block` tokens at a time."""
    prompts = AlignedPrompts.align(rows, plan.factor, plan.context)
    n_steps = int(prompts.tail_lengths.max()) - 1 + plan.max_tokens
    texts = [_NewText(n - 1, n - 1 + plan.max_tokens, plan.stops) for n in prompts.tail_lengths]
    inputs = _Rows(jax.device_put(prompts.tail), jax.device_put(prompts.lengths), keys)
    placed_plan = jax.device_put(plan)
    length = prompts.prefix.shape[1]
    cache = _prefill(
        *split,
        *jax.device_put((prompts.prefix, prompts.start, prompts.origin)),
        max_length=plan.cache_length(length + min(block, n_steps)),
        context=plan.context,
    )
    state = _State(cache, *jax.device_put((np.zeros(len(rows), np.int32), np.zeros(len(rows), bool))))
    for start in range(0, n_steps, block):
        n_new = min(block, n_steps - start)
        cache = state.cache
        if length + n_new > plan.max_cache:
            dropped = (length - plan.context) // plan.factor * plan.factor
            cache, length = _drop(cache, jax.device_put(np.int32(dropped))), length - dropped
        if length + n_new > cache.max_length:
            cache = _grow(*split, cache, max_length=plan.cache_length(length + n_new))
        steps = jax.device_put(np.array([start, start + n_new], np.int32))
        state, sampled = _extend(*split, placed_plan, inputs, state._replace(cache=cache), steps)
        length += n_new
        new_tokens, done = jax.device_get((sampled, state.done))
        after_block([text.take(row[:n_new], start) for text, row in zip(texts, new_tokens, strict=True)])
        if done.all():
            break
    return [text.tokens() for text in texts]


@jax.jit
def _unstacked(graph: nnx.GraphDef, params: nnx.State) -> Split:
    """Return the model in evaluation mode with its layers as lists, see `Stack.unstack`."""
    model = nnx.merge(graph, params)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Stack):
            module.unstack()
    model.eval()
    return nnx.split(model)


@partial(jax.jit, static_argnames=("graph", "max_length", "context"))
def _prefill(graph, params, tokens, start, origin, *, max_length, context):
    model = nnx.merge(graph, params)
    cache = model.init_cache(len(tokens), max_length, context)
    return model.prefill(tokens, start, cache, origin)[1]


@partial(jax.jit, static_argnames="graph", donate_argnames="state")
def _extend(graph, params, plan: SamplingPlan, rows: _Rows, state: _State, steps) -> tuple[_State, jax.Array]:
    """Decode steps steps[0] .. steps[1] - 1, at most BLOCK, or until all rows have ended.

    Return the state and the tokens that each step sampled, int [B, BLOCK]; steps within a prompt also sample.
    """
    model = nnx.merge(graph, params)

    def unfinished(carry):
        step, state, _ = carry
        return (step < steps[1]) & ~state.done.all()

    def extend(carry):
        step, (cache, token, done), sampled = carry
        length = cache.clock.time - cache.clock.origin
        given = rows.tail[:, jnp.minimum(step, rows.tail.shape[1] - 1)]
        logits, cache = model.step(jnp.where(length < rows.lengths, given, token), cache)
        keys = jax.vmap(jax.random.fold_in)(rows.keys, length + 1)
        token = plan.sampler(jnp.where(plan.banned, -jnp.inf, logits), keys)
        n_new = length + 2 - rows.lengths
        done |= (plan.stops[token] & (n_new >= 1)) | (n_new >= plan.max_tokens)
        return step + 1, _State(cache, token, done), sampled.at[:, step - steps[0]].set(token)

    sampled = jnp.zeros((len(rows.keys), BLOCK), jnp.int32)
    return jax.lax.while_loop(unfinished, extend, (steps[0], state, sampled))[1:]


_drop = jax.jit(Cache.drop, donate_argnums=0)


@partial(jax.jit, static_argnames=("graph", "max_length"))
def _grow(graph, params, cache, *, max_length):
    """Return a larger copy of the cache, for `max_length` tokens."""
    model = nnx.merge(graph, params)
    larger = model.init_cache(len(cache.clock.start), max_length, cache.context)
    return larger.filled_from(cache)
