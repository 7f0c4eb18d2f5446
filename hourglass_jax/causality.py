"""Does a model see the future? The classic bug of hierarchical language models: wonderful loss, garbage samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import check_tokens
from hourglass_jax.config import check_range
from hourglass_jax.model import HourglassLM


class CausalityError(AssertionError):
    """A prediction depends on a token it may not see; the message names the first such pair. See `check_causality`."""


@jax.jit
def _gradient_norms(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)

    def probe(x):
        logits = model.from_embeddings(x[None])[0]
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


def check_causality(model: HourglassLM, length: int | None = None) -> None:
    """Raises CausalityError unless d logits_t / d token_{>t} is exactly zero (section 2 of the paper: the shift).

    `length` in tokens, of random ones; by default two whole groups of the innermost level and one position more. Takes
    seconds, most of them to compile, so do it once before training a new method or mask.
    """
    if length is None:
        length = 2 * model.config.parsed_hierarchy.total_factor + 1
        if model.positions is not None:
            length = min(length, model.config.max_length)
    check_range("length", length, 1, model.config.position_limit)
    tokens = jax.random.randint(jax.random.key(1), (length,), 0, model.config.vocab_size)
    leaks = np.argwhere(np.triu(influence(model, tokens), k=1) != 0)
    if len(leaks):
        t, s = leaks[0]
        raise CausalityError(
            f"the prediction at position {t} depends on token {s}, which comes later ({len(leaks)} such pairs "
            f"among {length} positions); check the shift and the masks of the resampling methods"
        )
