"""Learned boundaries: a router (H-Net), relaxed sampling, or entropies (dynamic pooling).

Each rule scores a position from its vector and the previous one. A score above 0 means a boundary, and gradients enter
through its probability (see `nn.event_groups.Decision`). The rule's own loss keeps the rate near one boundary in k
positions, or teaches where to cut. Decisions are computed in float32 at least.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.special import gammaln

from hourglass_jax.config import HourglassConfig, LevelConfig
from hourglass_jax.hierarchy import Level
from hourglass_jax.nn.boundaries import BOUNDARIES, Boundaries, Position
from hourglass_jax.nn.event_groups import Decision, EventGroups
from hourglass_jax.nn.layers import Linear, at_least_float32, kernel_init
from hourglass_jax.nn.transformer import ACTIVATIONS


class LearnedBoundaries(Boundaries):
    """Base class: computes boundaries, their probability and a loss from `score`."""

    loss_weight = 1.0  # as in the rule's paper

    def score(self, here: Position, before: Position) -> jax.Array:
        """Return float [B, L], above 0 at boundaries; ignored at a row's first position."""
        raise NotImplementedError

    def probability(self, score: jax.Array) -> jax.Array:
        """Map the score to a probability, above 1/2 where the score is above 0; passes gradients to the score."""
        raise NotImplementedError

    def noise(self, row_keys: jax.Array, score: jax.Array) -> jax.Array | float:
        """Return the noise added to the score [B, L] in training, from one key for each row [B]."""
        return 0.0

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        """Return float []; `weights` of positions and `entropy` of the model's predictions are float [B, L]."""
        raise NotImplementedError

    def decide(self, here: Position, before: Position, row_keys: jax.Array | None = None) -> Decision:
        score = self.score(here, before)
        if row_keys is not None:
            score += self.noise(row_keys, score)
        first = here.place == 0
        return Decision((score > 0) | first, jnp.where(first, 1, self.probability(score)), score)


class RouterBoundaries(LearnedBoundaries):
    """A boundary where neighbors differ: p = (1 - cos(Wq x[t-1], Wk x[t])) / 2 (H-Net)."""

    loss_weight = 0.03

    def __init__(self, config: LevelConfig, level: Level, *, rngs: nnx.Rngs):
        super().__init__(config, level, rngs=rngs)
        self.query, self.key = (deciding(config, config.d_model, config.d_model, identity, rngs=rngs) for _ in range(2))

    def score(self, here: Position, before: Position) -> jax.Array:
        return -cosine(self.query(before.x), self.key(here.x))

    def probability(self, score: jax.Array) -> jax.Array:
        return (1 + score) / 2

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        mask, prob, _ = groups.decision
        return ratio_loss(mean(mask, weights), mean(prob, weights), self.k)


class PredictedBoundaries(LearnedBoundaries):
    """Base class: the score is a feed-forward network of the position's vector (dynamic pooling)."""

    temperature = 1.0  # affects gradients only

    def __init__(self, config: LevelConfig, level: Level, *, rngs: nnx.Rngs):
        super().__init__(config, level, rngs=rngs)
        self.up = deciding(config, config.d_model, config.d_ff, kernel_init(config), bias=True, rngs=rngs)
        self.down = deciding(config, config.d_ff, 1, kernel_init(config), bias=True, rngs=rngs)
        self.activation = config.activation

    def score(self, here: Position, before: Position) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(here.x)))[..., 0]

    def probability(self, score: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(score / self.temperature)


class GumbelBoundaries(PredictedBoundaries):
    """Boundaries sampled with probability sigmoid(score) in training, and thresholded at 1/2 otherwise.

    The loss is the negative log-likelihood of their number in a row: binomial, one in k positions.
    """

    temperature = 0.5

    def __init__(self, config: LevelConfig, level: Level, *, rngs: nnx.Rngs):
        super().__init__(config, level, rngs=rngs)
        self.deterministic = False

    def noise(self, row_keys: jax.Array, score: jax.Array) -> jax.Array | float:
        """Return logistic noise that depends on the row's key, the level and the position; 0 after `model.eval()`."""
        if self.deterministic:
            return 0.0

        def of_row(key: jax.Array) -> jax.Array:
            return jax.random.logistic(jax.random.fold_in(key, self.tokens_per_position), score.shape[1:], score.dtype)

        return jax.vmap(of_row)(row_keys)

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        mask, prob, _ = groups.decision
        drawn = mask.astype(prob.dtype) + prob - lax.stop_gradient(prob)
        return binomial_loss((drawn * weights).sum(axis=1), weights.sum(axis=1), 1 / self.k)


class EntropyBoundaries(PredictedBoundaries):
    """Boundaries where the entropy of predictions is expected to rise; the entropy itself is known too late."""

    def probability(self, score: jax.Array) -> jax.Array:
        return lax.stop_gradient(super().probability(score))  # only the rule's own loss trains it

    def loss(self, groups: EventGroups, weights: jax.Array, entropy: jax.Array) -> jax.Array:
        score = groups.decision.score
        losses = jax.nn.softplus(score) - spikes(entropy).astype(score.dtype) * score
        return mean(losses, weights.at[:, 0].set(0))  # the first position is always a boundary


def deciding(
    config: HourglassConfig, d_in: int, d_out: int, init: nnx.Initializer, *, bias: bool = False, rngs: nnx.Rngs
) -> Linear:
    """Return a projection in float32 at least, so that boundaries do not depend on the compute dtype."""
    dtype, exact = at_least_float32(config.dtype), lax.Precision.HIGHEST
    return Linear(d_in, d_out, use_bias=bias, kernel_init=init, dtype=dtype, precision=exact, rngs=rngs)


def identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return the identity as initial value of a square kernel."""
    return jnp.eye(shape[0], dtype=dtype)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cosine of the angle between vectors, [..., D] -> [...]; 0 for zero vectors."""
    norms = (x * x).sum(axis=-1) * (y * y).sum(axis=-1)
    return (x * y).sum(axis=-1) * lax.rsqrt(jnp.maximum(norms, 1e-24))


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted mean of values [B, L]."""
    return (values.astype(weights.dtype) * weights).sum() / jnp.maximum(weights.sum(), 1)


def ratio_loss(fired: jax.Array, likely: jax.Array, k: int) -> jax.Array:
    """Return H-Net's ratio loss: 1 if the share of boundaries `fired` and the mean probability `likely` are both 1 / k.

    Its derivative with respect to `likely` has the sign of fired - 1 / k.
    """
    return k / (k - 1) * ((k - 1) * fired * likely + (1 - fired) * (1 - likely))


def binomial_loss(count: jax.Array, n: jax.Array, prior: float) -> jax.Array:
    """Return the mean over rows of -log P(count) / n, where `count` [B] is binomial(`n` [B], `prior`)."""
    n = jnp.maximum(n, 1)
    ways = gammaln(n + 1) - gammaln(count + 1) - gammaln(n - count + 1)
    return -((ways + count * jnp.log(prior) + (n - count) * jnp.log1p(-prior)) / n).mean()


def spikes(entropy: jax.Array) -> jax.Array:
    """Return whether the entropy is higher than at both previous positions, bool [B, L]."""
    before = jnp.pad(entropy, ((0, 0), (2, 0)), constant_values=-jnp.inf)
    return (entropy > before[:, 1:-1]) & (entropy > before[:, :-2])


def entropies(logits: jax.Array) -> jax.Array:
    """Return the entropy of predictions in nats, [..., V] -> [...], without gradients."""
    log_p = jax.nn.log_softmax(lax.stop_gradient(logits))
    return -(jnp.exp(log_p) * log_p).sum(axis=-1)


BOUNDARIES |= {
    "router": RouterBoundaries,
    "gumbel": GumbelBoundaries,
    "entropy": EntropyBoundaries,
}
