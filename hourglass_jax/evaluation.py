"""Loss, perplexity and bits per character, or per dimension of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourglass_jax.checks import Array, check_causal, check_tokens
from hourglass_jax.data.pipeline import consecutive_windows, sliding_windows
from hourglass_jax.errors import UsageError
from hourglass_jax.masking import Task, task_of
from hourglass_jax.model import HourglassLM
from hourglass_jax.ranges import check_range

Sums = tuple[jax.Array, jax.Array]  # of a batch: a figure, and the weight that it is of


@dataclass(frozen=True)
class Evaluation:
    """Mean over `n_characters` predictions: `loss` in nats a token."""

    loss: float
    n_characters: int

    @property
    def perplexity(self) -> float:
        """exp(loss), of a token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_character(self) -> float:
        """loss / ln 2: BPC where a token is a character, bits a byte where it is a byte."""
        return self.loss / math.log(2)

    bits_per_dim = bits_per_character  # its name where a prediction is a channel of a pixel

    def summary(self, unit: str = "BPC") -> str:
        """One line, with bits a prediction called `unit`."""
        return f"loss {self.loss:.4f} | perplexity {self.perplexity:.3f} | {unit} {self.bits_per_character:.4f}"

    def __str__(self) -> str:
        return self.summary()


def score(model: HourglassLM, tokens: Array, key: jax.Array | None = None) -> jax.Array:
    """log p(token t + 1 | tokens <= t) in nats: int [B, L + 1] -> float [B, L].

    `key` turns dropout on, in a model that trains. Raises UsageError for tokens outside the vocabulary, for more than
    `max_length` of them to read with learned positions, and for a model that sees both sides.

    Compile it for many calls, which is when tokens are no longer looked at: `nnx.jit(hg.score)`. Where threads share
    a model, compile it on a split one, since nnx.jit empties and refills the modules it is given:
    `graph, params = nnx.split(model)` and `jax.jit(lambda params, tokens: hg.score(nnx.merge(graph, params), tokens))`.
    """
    _check_predicts(model)
    tokens = jnp.asarray(check_tokens("tokens", tokens, model.config.vocab_size, "B, L + 1"))
    if not isinstance(tokens.shape[1], int):  # symbolic: JAX cannot compare products of length - 1
        return log_probabilities(model(tokens, key), jnp.roll(tokens, -1, axis=1))[:, :-1]
    if tokens.shape[1] < 2:
        raise UsageError("tokens has rows of 1 token; score needs at least 2, one to read and one to predict")
    return log_probabilities(model(tokens[:, :-1], key), tokens[:, 1:])


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of `tokens` [B, L] by `logits` [B, L, V], in nats."""
    target = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return target - jax.nn.logsumexp(logits, axis=-1)


def _answer(model: HourglassLM, tokens: Array, weights: Array) -> tuple[Task, jax.Array]:
    """What a batch asks for, and the model's answer."""
    task = task_of(model.config, jnp.asarray(tokens), jnp.asarray(weights))
    return task, model(task.inputs, mask=task.mask)


@jax.jit
def _batch_losses(graph: nnx.GraphDef, params: nnx.State, tokens: Array, weights: Array) -> Sums:
    task, logits = _answer(nnx.merge(graph, params), tokens, weights)
    weights = task.weights.astype(logits.dtype)
    return -(log_probabilities(logits, task.targets) * weights).sum(), weights.sum()


def evaluate_batches(model: HourglassLM, batches: Iterable[tuple[Array, ...]]) -> Evaluation:
    """The mean loss over `batches` of tokens int [B, L + 1] and weights [B, L]; see `data.pipeline`.

    Of a model that sees both sides, over masked tokens, of a text always the same ones; see `masking`. Raises
    UsageError where there is nothing to predict.
    """
    loss, count = _total(_batch_losses, model, batches)
    return Evaluation(loss / count, int(count))


@jax.jit
def _batch_hits(graph: nnx.GraphDef, params: nnx.State, tokens: Array, weights: Array) -> Sums:
    task, logits = _answer(nnx.merge(graph, params), tokens, weights)
    hits = logits.argmax(axis=-1) == task.targets
    return (hits.astype(task.weights.dtype) * task.weights).sum(), task.weights.sum()


def accuracy(model: HourglassLM, batches: Iterable[tuple[Array, ...]]) -> float:
    """The weighted share of what `batches` ask for that is the most likely token; raises as `evaluate_batches`."""
    hits, count = _total(_batch_hits, model, batches)
    return hits / count


def _total(sums: Callable[..., Sums], model: HourglassLM, batches: Iterable[tuple[Array, ...]]) -> tuple[float, float]:
    """What `sums` has of all batches together: a figure, and the weight that it is of."""
    split = nnx.split(model)
    figure = count = 0.0
    for batch in batches:
        of_batch, weight = jax.device_get(sums(*split, *jax.device_put(batch)))
        figure, count = figure + float(of_batch), count + float(weight)
    if not count:
        raise UsageError("there is nothing to predict: no batch, or none whose weights are above 0")
    return figure, count


def evaluate(model: HourglassLM, tokens: np.ndarray, *, block_size: int, batch_size: int = 16) -> Evaluation:
    """A text int [N] in consecutive windows of `block_size` predictions, each without context before it.

    Every token but the first is predicted once. `batch_size` windows go at once; a text may be memory-mapped. Raises
    UsageError for fewer than 2 tokens, some outside the vocabulary, or a model that sees both sides. See
    `evaluate_sliding` for more context, at more cost.
    """
    _check_predicts(model)
    check_range("block_size", block_size, 1)
    check_range("batch_size", batch_size, 1)
    tokens = check_text(tokens, model)
    return evaluate_batches(model, consecutive_windows(tokens, block_size, batch_size))


def evaluate_sliding(
    model: HourglassLM, tokens: np.ndarray, *, window: int = 4096, step: int = 128, batch_size: int = 1
) -> Evaluation:
    """A text int [N] in overlapping windows, the paper's test protocol (section 3): every token but the first once.

    Windows of `window` predictions start every `step` tokens. The first counts whole, since nothing comes before it;
    each of the others counts its last `step` predictions, which so see more than `window - step` tokens. The last one
    ends early, with the text: what a prediction sees does not depend on what follows. With `step=window` this is
    `evaluate` with `block_size=window`.

    It costs N / step forward passes over a window, `batch_size` at a time; a text may be memory-mapped. Raises
    UsageError for a step beyond the window, a text of fewer than 2 tokens, a window longer than learned positions, and
    a model that sees both sides.
    """
    _check_predicts(model)
    check_range("window", window, 1)
    check_range("step", step, 1, window)
    check_range("batch_size", batch_size, 1)
    tokens = check_text(tokens, model)
    if window > model.config.position_limit:
        raise UsageError(
            f"window={window} is longer than the learned positions, which end at max_length="
            f"{model.config.max_length}; choose a smaller window"
        )
    return evaluate_batches(model, sliding_windows(tokens, window, step, batch_size))


def _check_predicts(model: HourglassLM) -> None:
    """Raises UsageError for a model that sees what it would be asked to predict."""
    check_causal(
        model.config, "and so what it would be asked to predict; `evaluation.evaluate_batches` masks tokens first"
    )


def check_text(tokens: Array, model: HourglassLM) -> np.ndarray:
    """The text as an array [N]; raises UsageError where it is too short, or in another vocabulary."""
    tokens = np.asarray(check_tokens("the text", tokens, model.config.vocab_size, "N"))
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens; evaluation needs at least 2")
    return tokens
