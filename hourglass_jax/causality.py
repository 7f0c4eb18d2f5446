"""Causality check: a leak from the future gives a very low loss and garbage samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import check_tokens
from hourglass_jax.model import HourglassLM
from hourglass_jax.ranges import check_range

N_REPLACEMENTS = 8  # number of texts whose ends replace the end of the checked text


class CausalityError(AssertionError):
    """A prediction depends on a later token; the message names the first such pair. See `check_causality`."""


class NotStrictlyCausal(CausalityError):
    """No derivative leaks, but later tokens can change predictions in this configuration."""


@jax.jit
def _gradient_norms(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)

    def probe(x):
        logits = model.forward(x[None], tokens=tokens[None])[0][0]
        weights = jax.random.normal(jax.random.key(0), logits.shape, logits.dtype)
        return (logits * weights).sum(-1)

    probes, pullback = jax.vjp(probe, model.embed(tokens[None])[0])
    [gradients] = jax.vmap(pullback)(jnp.eye(len(tokens), dtype=probes.dtype))
    return jnp.abs(gradients).max(-1)


def influence(model: HourglassLM, tokens: jax.Array) -> np.ndarray:
    """Return how much each prediction depends on each token: int [L] -> float [L, L].

    Entry (t, s) is the largest absolute derivative of a random projection of `logits[t]` with respect to the embedding
    of token s; exactly 0 means no dependence. Requires the memory of L backward passes. Raises UsageError for tokens
    outside the vocabulary.
    """
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "L"))
    return np.asarray(_gradient_norms(*nnx.split(model), tokens))


@jax.jit
def _moved(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, others: jax.Array) -> jax.Array:
    """Return which logits of tokens [2, L] change if `others` [n, L] replace row 0 from position s on.

    -> bool [L + 1 (s), 2, L].
    """
    model, length = nnx.merge(graph, params), tokens.shape[1]

    def replaced_from(at):
        s, other = at
        return model(tokens.at[0].set(jnp.where(jnp.arange(length) < s, tokens[0], other)))

    starts = jnp.tile(jnp.arange(length + 1), len(others))
    logits = jax.lax.map(replaced_from, (starts, jnp.repeat(others, length + 1, axis=0)))
    moved = (logits != logits[-1:]).any(-1)  # the last start replaces nothing
    return moved.reshape(len(others), length + 1, 2, length).any(0)


@jax.jit
def _logits(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(tokens)


def check_causality(model: HourglassLM, length: int | None = None) -> None:
    """Raise CausalityError unless d logits_t / d token_{>t} is exactly 0 (section 2 of the paper: the shift).

    Raises CausalityError for causal=False too, and NotStrictlyCausal for LSH attention (section 3.3), whose derivatives
    do not leak.

    Derivatives do not reveal discrete decisions, so variable boundaries and n-grams are also checked by replacing
    tokens. New tokens from position s on must leave earlier logits and other rows bit-identical. A prefix must have the
    logits of the full text.

    Parameters of value zero, as in new n-gram tables, would hide a leak; the check replaces them by random numbers.

    length: number of random tokens; default: two groups of the innermost level plus one, or four with variable
        boundaries.

    The check takes seconds, mostly for compilation. Run it once before you train a new method or mask.
    """
    config = model.config
    if not config.causal:
        raise CausalityError("causal=False: predictions depend on later tokens; choose causal=True for a causal model")
    if length is None:
        length = (4 if config.event_levels else 2) * config.parsed_hierarchy.total_factor + 1
        length = int(min(length, config.position_limit))
    check_range("length", length, 1, config.position_limit)
    model = _without_zeros(model)
    tokens = jax.random.randint(jax.random.key(1), (length,), 0, config.vocab_size)
    leaks = np.argwhere(np.triu(influence(model, tokens), k=1) != 0)
    if len(leaks):
        t, s = leaks[0]
        raise CausalityError(
            f"the prediction at position {t} depends on the later token {s} ({len(leaks)} such pairs among {length} "
            "positions); check the shift and the masks of the resampling methods"
        )
    if config.token_attention == "lsh":
        raise NotStrictlyCausal(
            "token_attention='lsh' is not strictly causal: no prediction attends to a later token, but later tokens "
            "change which earlier tokens share its chunk; choose token_attention='full' for a causal model"
        )
    if config.event_levels or config.ngram_sizes:
        _check_decisions(model, length)


def _without_zeros(model: HourglassLM) -> HourglassLM:
    """Return the model with random numbers in place of zeros in its parameters."""
    graph, params = nnx.split(model)
    rng = np.random.default_rng(0)

    def filled(leaf: jax.Array) -> jax.Array:
        values = np.array(leaf)
        zeros = values == 0
        values[zeros] = rng.normal(0, 0.1, zeros.sum())
        return jnp.asarray(values)

    return nnx.merge(graph, jax.tree.map(filled, params))


def _check_decisions(model: HourglassLM, length: int) -> None:
    """Raise CausalityError if a boundary or an n-gram depends on later positions, other rows or the length."""
    split, config = nnx.split(model), model.config
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (2 + N_REPLACEMENTS, length))
    for row in tokens[2:]:
        row[:] = rng.choice(row[:2], length)  # only two distinct tokens, so that statistics differ
    at_boundary = getattr(getattr(model.hourglass, "boundaries", None), "tokens", ())
    if at_boundary:  # otherwise random tokens would contain few boundaries
        tokens = np.where(rng.random(tokens.shape) < 0.3, rng.choice(at_boundary, tokens.shape), tokens)
    rows, others = jnp.asarray(tokens[:2]), jnp.asarray(tokens[2:])
    moved = np.array(_moved(*split, rows, others))
    later = np.arange(length + 1)[:, None] <= np.arange(length)
    moved[:, 0] &= ~later
    for s, row, t in np.argwhere(moved):
        cause = f"the later token {s}" if row == 0 else "another row of the batch"
        raise CausalityError(
            f"the prediction at position {t} depends on {cause} through a discrete decision; check that n-grams and "
            f"boundaries={config.boundaries!r} use only the current and earlier positions"
        )
    n = length - length // 3
    whole, part = (np.asarray(_logits(*split, text)) for text in (rows, rows[:, :n]))
    tolerance = 0.1 if config.dtype == "bfloat16" else 1e-3
    differs = np.abs(whole[:, :n] - part).max((0, 2)) > tolerance * np.abs(whole).max()
    if differs.any():
        raise CausalityError(
            f"the prediction at position {differs.argmax()} differs between texts of {n} and {length} tokens; check "
            f"that n-grams and boundaries={config.boundaries!r} use only the current and earlier positions"
        )
