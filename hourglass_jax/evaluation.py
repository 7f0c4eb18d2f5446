"""Loss, perplexity and bits per character, or per dimension of an image."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.data.pipeline import Batch, consecutive_windows
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM


@dataclass(frozen=True)
class Evaluation:
    """Mean over `n_characters` predictions: `loss` in nats."""

    loss: float
    n_characters: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_character(self) -> float:
        return self.loss / math.log(2)

    bits_per_dim = bits_per_character  # its name where a prediction is a channel of a pixel

    def summary(self, unit: str = "BPC") -> str:
        return f"loss {self.loss:.4f} | perplexity {self.perplexity:.3f} | {unit} {self.bits_per_character:.4f}"

    def __str__(self) -> str:
        return self.summary()


def score(model: HourglassLM, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """log p(token t + 1 | tokens <= t) in nats: int [B, L + 1] -> float [B, L]; `key` turns dropout on."""
    logits = model(jnp.asarray(tokens)[:, :-1], key)
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return target - jax.nn.logsumexp(logits, axis=-1)


@nnx.jit
def _batch_sums(model: HourglassLM, tokens: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return -(score(model, tokens) * weights).sum(), weights.sum()


def evaluate_batches(model: HourglassLM, batches: Iterable[Batch]) -> Evaluation:
    """The weighted mean loss over `batches`."""
    loss = count = 0.0
    for tokens, weights in batches:
        batch_loss, batch_count = _batch_sums(model, tokens, weights)
        loss, count = loss + float(batch_loss), count + float(batch_count)
    return Evaluation(loss / count, int(count))


@nnx.jit
def _batch_hits(model: HourglassLM, tokens: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    hits = model(tokens[:, :-1]).argmax(axis=-1) == tokens[:, 1:]
    return (hits * weights).sum(), weights.sum()


def accuracy(model: HourglassLM, batches: Iterable[Batch]) -> float:
    """The weighted share of `batches`' tokens that are the most likely ones."""
    hits, count = np.sum([[float(part) for part in _batch_hits(model, *batch)] for batch in batches], axis=0)
    return float(hits / count)


def evaluate(model: HourglassLM, tokens: np.ndarray, *, block_size: int, batch_size: int = 16) -> Evaluation:
    """A text int [N] in consecutive windows of `block_size` predictions, each without context before it."""
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens; evaluation needs at least 2")
    return evaluate_batches(model, consecutive_windows(tokens, block_size, batch_size))
