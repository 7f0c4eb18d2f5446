"""Loss, perplexity, and bits per character or per image dimension."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import Array, check_causal, check_tokens
from hourglass_jax.data.pipeline import consecutive_windows, sliding_windows
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM
from hourglass_jax.objective import Task, task_of
from hourglass_jax.ranges import check_range

Sums = tuple[jax.Array, jax.Array]  # weighted sum of a metric over a batch, and the sum of the weights


@dataclass(frozen=True)
class Evaluation:
    """Mean `loss` in nats per token over `n_characters` predictions."""

    loss: float
    n_characters: int

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_character(self) -> float:
        """loss / ln 2: BPC for characters, bits per byte for bytes."""
        return self.loss / math.log(2)

    bits_per_dim = bits_per_character  # the same for images: a prediction is one channel of a pixel

    def summary(self, unit: str = "BPC") -> str:
        """Return one line; `unit` names the bits per prediction."""
        return f"loss {self.loss:.4f} | perplexity {self.perplexity:.3f} | {unit} {self.bits_per_character:.4f}"

    def __str__(self) -> str:
        return self.summary()


def mean_evaluation(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Return the mean loss of evaluations of the same predictions."""
    evaluations = list(evaluations)
    return Evaluation(statistics.mean(each.loss for each in evaluations), evaluations[0].n_characters)


def score(model: HourglassLM, tokens: Array, key: jax.Array | None = None) -> jax.Array:
    """Return log p(token t + 1 | tokens <= t) in nats: int [B, L + 1] -> float [B, L].

    `key` turns dropout on, if the model is in training mode. Raises UsageError for tokens outside the vocabulary, for
    more tokens than learned positions, and for a model with causal=False.

    Compile it for many calls with `nnx.jit(hg.score)`; then tokens are not checked. If threads share a model, use
    `graph, params = nnx.split(model)` and `jax.jit(lambda params, tokens: hg.score(nnx.merge(graph, params), tokens))`,
    because nnx.jit empties and refills the modules it receives.
    """
    _check_predicts(model)
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "B, L + 1"))
    if not isinstance(tokens.shape[1], int):  # symbolic: JAX cannot compare products of length - 1
        return log_probabilities(model(tokens, key), jnp.roll(tokens, -1, axis=1))[:, :-1]
    if tokens.shape[1] < 2:
        raise UsageError("tokens has rows of 1 token; give at least 2, an input and a target")
    return log_probabilities(model(tokens[:, :-1], key), tokens[:, 1:])


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the log probability of `tokens` [B, L] under `logits` [B, L, V], in nats."""
    target = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return target - jax.nn.logsumexp(logits, axis=-1)


def _forward_task(model: HourglassLM, tokens: Array, weights: Array) -> tuple[Task, jax.Array]:
    """Return the task of a batch and the model's logits."""
    task = task_of(model.config, jnp.asarray(tokens), jnp.asarray(weights))
    return task, model(task.inputs, mask=task.mask)


@jax.jit
def _batch_losses(graph: nnx.GraphDef, params: nnx.State, tokens: Array, weights: Array) -> Sums:
    task, logits = _forward_task(nnx.merge(graph, params), tokens, weights)
    weights = task.weights.astype(logits.dtype)
    return -(log_probabilities(logits, task.targets) * weights).sum(), weights.sum()


def evaluate_batches(model: HourglassLM, batches: Iterable[tuple[Array, ...]]) -> Evaluation:
    """Return the mean loss over `batches` of tokens int [B, L + 1] and weights [B, L]; see `data.pipeline`.

    With causal=False it is the loss of masked tokens, with a deterministic mask; see `objective`. Raises UsageError if
    there are no predictions.
    """
    loss, count = _total(_batch_losses, model, batches)
    return Evaluation(loss / count, int(count))


@jax.jit
def _batch_hits(graph: nnx.GraphDef, params: nnx.State, tokens: Array, weights: Array) -> Sums:
    task, logits = _forward_task(nnx.merge(graph, params), tokens, weights)
    hits = logits.argmax(axis=-1) == task.targets
    return (hits.astype(task.weights.dtype) * task.weights).sum(), task.weights.sum()


def accuracy(model: HourglassLM, batches: Iterable[tuple[Array, ...]]) -> float:
    """Return the weighted accuracy of the most likely token; raises like `evaluate_batches`."""
    hits, count = _total(_batch_hits, model, batches)
    return hits / count


def _total(sums: Callable[..., Sums], model: HourglassLM, batches: Iterable[tuple[Array, ...]]) -> tuple[float, float]:
    """Return the weighted sum of a metric over all batches, and the sum of the weights."""
    split = nnx.split(model)
    total = count = 0.0
    for batch in batches:
        placed = [part if isinstance(part, jax.Array) else jax.device_put(part) for part in batch]
        batch_total, weight = jax.device_get(sums(*split, *placed))
        total, count = total + float(batch_total), count + float(weight)
    if not count:
        raise UsageError("there is nothing to predict: no batches, or only weights of 0; give at least one prediction")
    return total, count


def evaluate(model: HourglassLM, tokens: np.ndarray, *, block_size: int, batch_size: int = 16) -> Evaluation:
    """Evaluate a text int [N] in consecutive windows of `block_size` predictions, without context before a window.

    Every token except the first is predicted once; a text may be memory-mapped. `evaluate_sliding` gives predictions
    more context, at a higher cost. Raises UsageError for fewer than 2 tokens, tokens outside the vocabulary, or a model
    with causal=False.
    """
    _check_predicts(model)
    check_range("block_size", block_size, 1)
    check_range("batch_size", batch_size, 1)
    tokens = check_text(tokens, model)
    return evaluate_batches(model, consecutive_windows(tokens, block_size, batch_size))


def evaluate_sliding(
    model: HourglassLM, tokens: np.ndarray, *, window: int = 4096, step: int = 128, batch_size: int = 1
) -> Evaluation:
    """Evaluate a text int [N] in overlapping windows, the paper's test protocol (section 3).

    Windows of `window` predictions start every `step` tokens. All predictions of the first window count, and the last
    `step` predictions of the others, which see more than `window - step` tokens. So every token except the first is
    predicted once. The last window ends with the text. `step=window` equals `evaluate` with `block_size=window`.

    The cost is N / step forward passes over a window, `batch_size` at a time; a text may be memory-mapped. Raises
    UsageError for a step above the window, fewer than 2 tokens, a window longer than learned positions, and a model
    with causal=False.
    """
    _check_predicts(model)
    check_range("window", window, 1)
    check_range("step", step, 1, window)
    check_range("batch_size", batch_size, 1)
    tokens = check_text(tokens, model)
    if window > model.config.position_limit:
        raise UsageError(
            f"window={window} is longer than the learned positions, max_length={model.config.max_length}; choose a "
            "smaller window"
        )
    return evaluate_batches(model, sliding_windows(tokens, window, step, batch_size))


def _check_predicts(model: HourglassLM) -> None:
    """Raise UsageError for a model with causal=False."""
    check_causal(model.config, "including the token to predict; use `evaluation.evaluate_batches`, which masks tokens")


def check_text(tokens: Array, model: HourglassLM) -> np.ndarray:
    """Return the text as an array [N]. Raises UsageError for fewer than 2 tokens or tokens outside the vocabulary."""
    tokens = np.asarray(check_tokens("the text", tokens, model.config.vocab_size, "N"))
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} token; give at least 2, since the first one is not predicted")
    return tokens
