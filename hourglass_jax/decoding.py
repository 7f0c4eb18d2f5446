"""Generation with a hierarchical cache: token layers run once a token, a level at factor f once every f tokens.

Exact, because the shortened vector of group g is complete the moment the group's first position is known
(section 2 of the paper: the shift by k-1). See `nn.cache` for how ragged prompts share one clock.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import check_decodes, check_key, check_prompts, token_mask
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM
from hourglass_jax.nn.cache import Cache, forgotten
from hourglass_jax.nn.transformer import Stack
from hourglass_jax.ranges import check_range
from hourglass_jax.sampling import Sampler, row_keys

MAX_NEW_TOKENS = 10**9  # positions are int32
BLOCK = 64  # tokens between two returns from the jitted loop
STREAM_BLOCK = 8  # the same when someone is watching
MIN_CACHE = 256  # tokens; a cache grows with its text, since every step attends over all of it
ROWS_PER_CORE = 4  # on a CPU, where a step of few rows keeps one core busy, larger batches are split over the cores


def init_cache(model: HourglassLM, batch: int, max_length: int) -> Cache:
    """An empty cache for `batch` rows of at least `max_length` tokens, prompt included.

    `logits, cache = model.step(tokens, cache)` takes one token a row, int [B] -> [B, V]; `model.prefill` reads prompts
    in one pass. `generate` does both. `costs.cache_bytes` says how large it is. Raises UsageError below 1, for more
    than learned positions reach, and for a model that sees both sides or has LSH attention.
    """
    check_range("batch", batch, 1)
    check_range("max_length", max_length, 1, model.config.position_limit)
    return model.init_cache(batch, round_up(max_length, model.config.shared_factor))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def bucket(n: int, smallest: int) -> int:
    """The first of smallest, 1.5 times, 2, 3, 4, 6 ... times that is at least n: few programs serve all lengths."""
    while smallest < n:
        if smallest + smallest // 2 >= n:
            return smallest + smallest // 2
        smallest *= 2
    return smallest


@dataclasses.dataclass(frozen=True)
class AlignedPrompts:
    """Ragged prompts, cut where all rows are at the same place in their groups.

    read: [B, M], what is read in one pass, M a multiple of K; row b begins at start[b].
    origin: [B], start[b] less what is too old to be read.
    rest: [B, K], the last 1 to K tokens of each prompt, which go through the loop.
    lengths: [B], tokens of each prompt.
    """

    read: np.ndarray
    start: np.ndarray
    origin: np.ndarray
    rest: np.ndarray
    lengths: np.ndarray

    @classmethod
    def align(cls, prompts: Sequence[np.ndarray], factor: int, context: int) -> AlignedPrompts:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        ends = (lengths - 1) // factor * factor
        skipped = forgotten(ends, context, factor)
        longest = int((ends - skipped).max())
        width = min(bucket(longest, factor), context) if longest else 0
        read = np.zeros((len(prompts), width), np.int32)
        rest = np.zeros((len(prompts), factor), np.int32)
        start = (width - (ends - skipped)).astype(np.int32)
        for i, prompt in enumerate(prompts):
            read[i, start[i] :] = prompt[skipped[i] : ends[i]]
            rest[i, : len(prompt) - ends[i]] = prompt[ends[i] :]
        return cls(read, start, start - skipped, rest, lengths)

    @property
    def n_rest(self) -> np.ndarray:
        return self.lengths - (self.lengths - 1) // self.rest.shape[1] * self.rest.shape[1]


class NewText:
    """Of what a row samples, step by step, the tokens that count: from step `begin` to `end`, or to a stop token."""

    def __init__(self, begin: int, end: int, stops: np.ndarray):
        """`stops`: bool [V], which tokens are stop tokens."""
        self.begin, self.end, self.stops = begin, end, stops
        self.parts: list[np.ndarray] = []

    def take(self, sampled: np.ndarray, step: int) -> np.ndarray:
        """The tokens that count among those sampled from `step` on."""
        part = sampled[max(self.begin - step, 0) : max(self.end - step, 0)]
        [stops] = np.nonzero(self.stops[part])
        if len(stops):
            part, self.end = part[: stops[0]], step
        self.parts.append(part)
        return part

    def tokens(self) -> np.ndarray:
        return np.concatenate(self.parts)


@jax.jit
def _unstacked(graph: nnx.GraphDef, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The model with its layers apart; see `Stack.unstack`."""
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


@partial(jax.jit, static_argnames=("graph", "sampler"), donate_argnames="cache")
def _extend(graph, params, cache, token, done, rest, lengths, keys, banned, stops, max_tokens, steps, *, sampler):
    """Steps steps[0] .. steps[1] - 1, at most BLOCK; ends early when every row is done.

    token [B]: the newest of each row, done [B]; rest, lengths: see AlignedPrompts; banned, stops: bool [V].
    Returns cache, token, done and what each step sampled [B, BLOCK], for prompt tokens too.
    """
    model = nnx.merge(graph, params)

    def unfinished(carry):
        step, _, _, done, _ = carry
        return (step < steps[1]) & ~done.all()

    def extend(carry):
        step, cache, token, done, sampled = carry
        length = cache.clock.time - cache.clock.origin
        given = rest[:, jnp.minimum(step, rest.shape[1] - 1)]
        logits, cache = model.step(jnp.where(length < lengths, given, token), cache)
        token = sampler(jnp.where(banned, -jnp.inf, logits), jax.vmap(jax.random.fold_in)(keys, length + 1))
        n_new = length + 2 - lengths
        done |= (stops[token] & (n_new >= 1)) | (n_new >= max_tokens)
        return step + 1, cache, token, done, sampled.at[:, step - steps[0]].set(token)

    sampled = jnp.zeros((len(keys), BLOCK), jnp.int32)
    return jax.lax.while_loop(unfinished, extend, (steps[0], cache, token, done, sampled))[1:]


_drop = jax.jit(Cache.drop, donate_argnums=0)


@partial(jax.jit, static_argnames=("graph", "max_length"))
def _grow(graph, params, cache, *, max_length):
    """The cache with room for `max_length` tokens."""
    model = nnx.merge(graph, params)
    larger = model.init_cache(len(cache.clock.start), max_length, cache.context)
    return larger.filled_from(cache)


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
    stream: Callable[[list[np.ndarray]], None] | None = None,
    max_context: int | None = None,
) -> list[np.ndarray]:
    """Continues each prompt; returns the new tokens of each row, int32 [n], up to and without a stop token.

    Levels run once a group, from caches: the logits are those of the whole text in one forward pass.

    prompts: token lists of any lengths, each at least one token, e.g. `[tokenizer.encode("an old")]`.
    max_tokens: new tokens a row at most.
    key: such as `jax.random.key(0)`; a row's sample is the same whatever batch it sits in, and equal prompts differ.
    temperature: 0 is greedy; top_k, top_p: cut the tempered distribution to the likeliest tokens.
    stop_token: one or several, each of which ends a row.
    banned_tokens: never sampled.
    stream: called every few tokens with what each row has gained since the last call; what it raises ends it all.
    max_context: the most tokens a row sees (default: the model's `max_length`). A longer text forgets its oldest
        groups, a quarter of the context at a time and at every level alike, so memory stays constant.

    On a CPU, many rows are taken in parts, side by side in threads; with a `stream`, or where settings of JAX hold for
    this thread alone (`with jax.enable_x64(True)`), all are one part, in this thread. A KeyboardInterrupt ends it at
    the next block of 64 tokens. Threads may share one model.

    Raises UsageError for empty prompts, tokens outside the vocabulary, options out of range, a text that would outgrow
    learned positions, and a model that sees both sides or has LSH attention.
    """
    check_decodes(model.config)
    check_range("max_tokens", max_tokens, 1, MAX_NEW_TOKENS)
    check_key(key)
    sampler = Sampler(temperature, top_k, top_p)
    config = model.config
    rows = check_prompts(prompts, config, max_tokens)
    stops = token_mask("stop_token", () if stop_token is None else stop_token, config.vocab_size)
    banned = token_mask("banned_tokens", banned_tokens, config.vocab_size)
    if banned.all():
        raise UsageError(f"all {len(banned)} tokens are among banned_tokens; leave at least one to sample")
    if not rows:
        return []
    context = config.max_length if max_context is None else max_context
    check_range("max_context", context, 1)
    factor = config.shared_factor
    stopped = threading.Event()
    graph, params = _unstacked(*nnx.split(model))
    row_texts = partial(
        _continue_rows,
        graph,
        params,
        factor=factor,
        context=round_up(context, factor),
        max_tokens=max_tokens,
        stops=stops,
        banned=jax.device_put(banned),
        sampler=sampler,
        stream=stream,
        stopped=stopped,
    )
    keys = row_keys(key, [row.tolist() for row in rows])
    n_parts = 1 if stream or jax.default_backend() != "cpu" else os.cpu_count() or 1
    n_parts = min(n_parts, len(rows) // ROWS_PER_CORE)
    if n_parts <= 1:
        return row_texts(rows, keys)
    with ThreadPoolExecutor(n_parts) as pool:
        if pool.submit(lambda: jax.config.values).result() != jax.config.values:
            return row_texts(rows, keys)  # under settings of this thread alone, such as `with jax.enable_x64(True)`
        bounds = np.linspace(0, len(rows), n_parts + 1).astype(int)
        try:
            parts = [pool.submit(row_texts, rows[i:j], keys[i:j]) for i, j in itertools.pairwise(bounds)]
            return [text for part in parts for text in part.result()]
        finally:
            stopped.set()  # an interrupt or an error: the pool waits for all parts, which look here at every block


def _continue_rows(
    graph: nnx.GraphDef,
    params: nnx.State,
    rows: Sequence[np.ndarray],
    keys: jax.Array,
    *,
    factor: int,
    context: int,
    max_tokens: int,
    stops: np.ndarray,
    banned: jax.Array,
    sampler: Sampler,
    stream: Callable[[list[np.ndarray]], None] | None,
    stopped: threading.Event,
) -> list[np.ndarray]:
    """The new tokens of each row: one pass over the prompts, then blocks of the jitted loop."""
    aligned = AlignedPrompts.align(rows, factor, context)
    n_steps = aligned.n_rest.max() - 1 + max_tokens
    time, block = aligned.read.shape[1], STREAM_BLOCK if stream else BLOCK
    limit = round_up(context + max(context // 4, BLOCK + factor), factor)

    def room(n: int) -> int:
        """A capacity for n tokens."""
        return min(round_up(bucket(n, MIN_CACHE), factor), limit)

    prompt = jax.device_put((aligned.read, aligned.start, aligned.origin))
    cache = _prefill(graph, params, *prompt, max_length=room(time + min(block, n_steps)), context=context)
    extend = partial(
        _extend,
        graph,
        params,
        rest=jax.device_put(aligned.rest),
        lengths=jax.device_put(aligned.lengths),
        keys=keys,
        banned=banned,
        stops=jax.device_put(stops),
        max_tokens=jax.device_put(np.int32(max_tokens)),
        sampler=sampler,
    )
    texts = [NewText(n - 1, n - 1 + max_tokens, stops) for n in aligned.n_rest]
    token, done = jax.device_put((np.zeros(len(rows), np.int32), np.zeros(len(rows), bool)))
    for start in range(0, n_steps, block):
        end = min(start + block, n_steps)
        if time + end - start > limit:
            unseen = (time - context) // factor * factor
            cache, time = _drop(cache, jax.device_put(np.int32(unseen))), time - unseen
        if time + end - start > cache.max_length:
            cache = _grow(graph, params, cache, max_length=room(time + end - start))
        cache, token, done, sampled = extend(cache, token, done, steps=jax.device_put(np.array([start, end], np.int32)))
        time += end - start
        new_tokens, finished = jax.device_get((sampled, done))
        parts = [text.take(row[: end - start], start) for text, row in zip(texts, new_tokens, strict=True)]
        if stream:
            stream(parts)
        if finished.all() or stopped.is_set():
            break
    return [text.tokens() for text in texts]
