"""Does a model see the future? The classic bug of hierarchical language models: wonderful loss, garbage samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import check_tokens
from hourglass_jax.model import HourglassLM
from hourglass_jax.ranges import check_range

DISTURBANCES = 8  # texts of which the ends replace another's


class CausalityError(AssertionError):
    """A prediction depends on a token it may not see; the message names the first such pair. See `check_causality`."""


class NotStrictlyCausal(CausalityError):
    """Nothing leaks through derivatives, but it is known of the configuration that later tokens move predictions."""


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
    """How much each prediction depends on each token: int [L] -> float [L, L].

    Entry (t, s) is the largest absolute derivative, over the embedding's coordinates, of a random projection of
    `logits[t]` with respect to the embedding of token s. Exactly zero means: no dependence. Memory is that of L
    backward passes at once. Raises UsageError for tokens outside the vocabulary.
    """
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "L"))
    return np.asarray(_gradient_norms(*nnx.split(model), tokens))


@jax.jit
def _moved(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, others: jax.Array) -> jax.Array:
    """bool [L + 1, 2, L]: which logits of two rows [2, L] move when the first row is one of others [n, L] from s on."""
    model, length = nnx.merge(graph, params), tokens.shape[1]

    def disturbed(at):
        s, other = at
        return model(tokens.at[0].set(jnp.where(jnp.arange(length) < s, tokens[0], other)))

    starts = jnp.tile(jnp.arange(length + 1), len(others))
    logits = jax.lax.map(disturbed, (starts, jnp.repeat(others, length + 1, axis=0)))
    moved = (logits != logits[-1:]).any(-1)  # the last one is disturbed nowhere
    return moved.reshape(len(others), length + 1, 2, length).any(0)


@jax.jit
def _logits(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(tokens)


def check_causality(model: HourglassLM, length: int | None = None) -> None:
    """Raises CausalityError unless d logits_t / d token_{>t} is exactly zero (section 2 of the paper: the shift).

    LSH attention passes that and raises NotStrictlyCausal, which says what it is (section 3.3). A model that sees both
    sides by choice, with causal=False, is told so.

    Derivatives do not see what is decided. So where events end the groups, other tokens from position s on must also
    move no logit before s, and none of another row, by a single bit; and a part of a text must have the logits that it
    has in the whole.

    `length` in tokens, of random ones; by default two whole groups of the innermost level and one position more, or
    twice that where events end them. Takes seconds, most of them to compile, so do it once before training a new method
    or mask.
    """
    config = model.config
    if not config.causal:
        raise CausalityError(
            "causal=False: the model sees both sides by choice, so that predictions depend on later tokens, too"
        )
    if length is None:
        length = (4 if config.event_levels else 2) * config.parsed_hierarchy.total_factor + 1
        length = int(min(length, config.position_limit))
    check_range("length", length, 1, config.position_limit)
    tokens = jax.random.randint(jax.random.key(1), (length,), 0, config.vocab_size)
    leaks = np.argwhere(np.triu(influence(model, tokens), k=1) != 0)
    if len(leaks):
        t, s = leaks[0]
        raise CausalityError(
            f"the prediction at position {t} depends on token {s}, which comes later ({len(leaks)} such pairs "
            f"among {length} positions); check the shift and the masks of the resampling methods"
        )
    if config.token_attention == "lsh":
        raise NotStrictlyCausal(
            "token_attention='lsh' is not strictly causal: no prediction attends to a later token, but later tokens "
            "decide which earlier ones share its chunk"
        )
    if config.event_levels:
        _check_decisions(model, length)


def _check_decisions(model: HourglassLM, length: int) -> None:
    """Raises CausalityError where what is decided at a position depends on later ones, other rows or the length."""
    split, config = nnx.split(model), model.config
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (2 + DISTURBANCES, length))
    for row in tokens[2:]:
        row[:] = rng.choice(row[:2], length)  # of other statistics
    at_boundary = getattr(model.hourglass.boundaries, "tokens", ())
    if at_boundary:  # rare among random tokens
        tokens = np.where(rng.random(tokens.shape) < 0.3, rng.choice(at_boundary, tokens.shape), tokens)
    rows, others = jnp.asarray(tokens[:2]), jnp.asarray(tokens[2:])
    moved = np.array(_moved(*split, rows, others))
    later = np.arange(length + 1)[:, None] <= np.arange(length)
    moved[:, 0] &= ~later
    for s, row, t in np.argwhere(moved):
        where = f"token {s}, which comes later" if row == 0 else "another row of the batch"
        raise CausalityError(
            f"the prediction at position {t} depends on {where}, through a decision that no derivative shows; check "
            f"that boundaries={config.boundaries!r} decide from a position and those before it"
        )
    n = length - length // 3
    whole, part = (np.asarray(_logits(*split, text)) for text in (rows, rows[:, :n]))
    tolerance = 0.1 if config.dtype == "bfloat16" else 1e-3
    differs = np.abs(whole[:, :n] - part).max((0, 2)) > tolerance * np.abs(whole).max()
    if differs.any():
        raise CausalityError(
            f"the prediction at position {differs.argmax()} is another in a text of {n} tokens than in one of "
            f"{length}; check that boundaries={config.boundaries!r} decide from a position and those before it alone"
        )
