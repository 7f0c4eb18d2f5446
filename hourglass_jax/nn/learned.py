"""Boundaries that are learned: by a router (H-Net), by relaxed sampling or from entropies (dynamic pooling).

Each rule scores a position from its vector and the one before it; where the score is above 0 an event is wanted, and p
says how likely that was, which is where gradient enters (see `nn.groups.Decision`). A loss of the rule's own holds the
rate near one event in k positions, or teaches it where to cut. All is decided in float32 at least.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.special import gammaln

from hourglass_jax.config import HourglassConfig
from hourglass_jax.hierarchy import Level
from hourglass_jax.nn.boundaries import BOUNDARIES, Boundaries, Position
from hourglass_jax.nn.groups import Decision, EventGroups
from hourglass_jax.nn.layers import Linear, at_least_float32, kernel_init
from hourglass_jax.nn.transformer import ACTIVATIONS


class LearnedBoundaries(Boundaries):
    """A rule with `score`, of which it makes p and a loss."""

    loss_weight = 1.0  # in its paper

    def score(self, here: Position, before: Position) -> jax.Array:
        """float [B, L], above 0 where an event is wanted; at a row's first position it does not matter."""
        raise NotImplementedError

    def probability(self, score: jax.Array) -> jax.Array:
        """More than 1/2 where the score is above 0, and where its gradient comes from."""
        raise NotImplementedError

    def noise(self, row_keys: jax.Array, score: jax.Array) -> jax.Array | float:
        """What is added to the score [B, L] in training; each row has a key of its own [B]."""
        return 0.0

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        """float []; each position has a weight, and the entropy of what the model predicts there: float [B, L]."""
        raise NotImplementedError

    def decide(self, here: Position, before: Position, row_keys: jax.Array | None = None) -> Decision:
        score = self.score(here, before)
        if row_keys is not None:
            score += self.noise(row_keys, score)
        first = here.place == 0
        return Decision((score > 0) | first, jnp.where(first, 1, self.probability(score)), score)


class RouterBoundaries(LearnedBoundaries):
    """An event where neighbours differ: p = (1 - cos(Wq x[t-1], Wk x[t])) / 2 (H-Net)."""

    loss_weight = 0.03

    def __init__(self, config: HourglassConfig, level: Level, *, rngs: nnx.Rngs):
        super().__init__(config, level, rngs=rngs)
        self.query, self.key = (deciding(config, config.d_model, config.d_model, identity, rngs=rngs) for _ in range(2))

    def score(self, here: Position, before: Position) -> jax.Array:
        return -cosine(self.query(before.x), self.key(here.x))

    def probability(self, score: jax.Array) -> jax.Array:
        return (1 + score) / 2

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        wants, p, _ = groups.decision
        return ratio_loss(mean(wants, weights), mean(p, weights), self.k)


class PredictedBoundaries(LearnedBoundaries):
    """Scored by a feed-forward network of the position's vector (dynamic pooling)."""

    temperature = 1.0  # of the gradient alone

    def __init__(self, config: HourglassConfig, level: Level, *, rngs: nnx.Rngs):
        super().__init__(config, level, rngs=rngs)
        self.up = deciding(config, config.d_model, config.d_ff, kernel_init(config), bias=True, rngs=rngs)
        self.down = deciding(config, config.d_ff, 1, kernel_init(config), bias=True, rngs=rngs)
        self.activation = config.activation

    def score(self, here: Position, before: Position) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(here.x)))[..., 0]

    def probability(self, score: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(score / self.temperature)


class GumbelBoundaries(PredictedBoundaries):
    """An event is drawn with probability sigmoid(score) in training, and where that is above 1/2 otherwise.

    The number of them in a row is held near a binomial distribution's, of one event in k positions.
    """

    temperature = 0.5

    def __init__(self, config: HourglassConfig, level: Level, *, rngs: nnx.Rngs):
        super().__init__(config, level, rngs=rngs)
        self.deterministic = False

    def noise(self, row_keys: jax.Array, score: jax.Array) -> jax.Array | float:
        """Logistic, a function of the row's key, the level and the position; none after `model.eval()`."""
        if self.deterministic:
            return 0.0

        def of_row(key: jax.Array) -> jax.Array:
            return jax.random.logistic(jax.random.fold_in(key, self.unit), score.shape[1:], score.dtype)

        return jax.vmap(of_row)(row_keys)

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        wants, p, _ = groups.decision
        drawn = wants.astype(p.dtype) + p - lax.stop_gradient(p)
        return binomial_loss((drawn * weights).sum(axis=1), weights.sum(axis=1), 1 / self.k)


class EntropyBoundaries(PredictedBoundaries):
    """Learns to tell where the entropy of the model's own prediction rises, which comes out too late to decide by."""

    def probability(self, score: jax.Array) -> jax.Array:
        return lax.stop_gradient(super().probability(score))  # it learns from its own loss alone

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        score = groups.decision.score
        losses = jax.nn.softplus(score) - spikes(entropy).astype(score.dtype) * score
        return mean(losses, weights.at[:, 0].set(0))  # where an event fires anyway


def deciding(
    config: HourglassConfig, d_in: int, d_out: int, init: nnx.Initializer, *, bias: bool = False, rngs: nnx.Rngs
) -> Linear:
    """A projection in float32 at least, so that the same text is cut at the same places however it is computed."""
    dtype, exact = at_least_float32(config.dtype), lax.Precision.HIGHEST
    return Linear(d_in, d_out, use_bias=bias, kernel_init=init, dtype=dtype, precision=exact, rngs=rngs)


def identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Of a square matrix."""
    return jnp.eye(shape[0], dtype=dtype)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of the angle between vectors [..., D] -> [...]; 0 where one of them is 0."""
    norms = (x * x).sum(axis=-1) * (y * y).sum(axis=-1)
    return (x * y).sum(axis=-1) * lax.rsqrt(jnp.maximum(norms, 1e-24))


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """[] of values [B, L], weighted."""
    return (values.astype(weights.dtype) * weights).sum() / jnp.maximum(weights.sum(), 1)


def ratio_loss(fired: jax.Array, likely: jax.Array, k: int) -> jax.Array:
    """H-Net's: 1 where both the share of events `fired` and the mean p, `likely`, are 1 / k.

    Its derivative by `likely` has the sign of fired - 1 / k: it pushes p, until the events follow.
    """
    return k / (k - 1) * ((k - 1) * fired * likely + (1 - fired) * (1 - likely))


def binomial_loss(count: jax.Array, n: jax.Array, prior: float) -> jax.Array:
    """Mean over rows of -log P(`count` [B] of `n` [B] positions) / n, each with probability `prior`."""
    n = jnp.maximum(n, 1)
    ways = gammaln(n + 1) - gammaln(count + 1) - gammaln(n - count + 1)
    return -((ways + count * jnp.log(prior) + (n - count) * jnp.log1p(-prior)) / n).mean()


def spikes(entropy: jax.Array) -> jax.Array:
    """bool [B, L]: whether it is higher than at both positions before it, as far as there are any."""
    before = jnp.pad(entropy, ((0, 0), (2, 0)), constant_values=-jnp.inf)
    return (entropy > before[:, 1:-1]) & (entropy > before[:, :-2])


def entropies(logits: jax.Array) -> jax.Array:
    """Of the predictions, in nats, without derivatives: [..., V] -> [...]."""
    log_p = jax.nn.log_softmax(lax.stop_gradient(logits))
    return -(jnp.exp(log_p) * log_p).sum(axis=-1)


BOUNDARIES |= {
    "router": RouterBoundaries,
    "gumbel": GumbelBoundaries,
    "entropy": EntropyBoundaries,
}
