"""What a configuration costs, before it is built."""

from __future__ import annotations

import jax
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.model import HourglassLM


def count_parameters(config: HourglassConfig) -> int:
    """Trainable parameters, embeddings and head included; allocates nothing."""
    abstract = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))


def decoding_flops(config: HourglassConfig, length: int) -> dict[int, float]:
    """Floating-point operations of matrix products each time a level runs, by its factor f: once every f tokens.

    With `length` tokens in the cache; the shortening that feeds a level counts as its own, the head as the tokens'.
    So a token costs the sum of flops / factor: the point of the hierarchy.
    """
    d = config.d_model
    feed_forward = 4 * d * config.d_ff
    projection = 2 * d * d
    products = 6 if config.positions == "relative" else 4  # with keys, values and relative keys, 2 d each

    def attend(rows: float) -> float:
        """Query, output, scores and feed-forward of one position; keys and values come extra."""
        return 2 * projection + products * d * rows + feed_forward

    flops = {}
    k = 1
    for level, inner in zip(config.parsed_hierarchy.levels, (*config.parsed_hierarchy.levels[1:], None), strict=True):
        n_layers = level.pre_layers + level.post_layers
        total = n_layers * (attend(length / level.factor) + 2 * projection)
        if level.factor > 1:  # what comes in is shortened, what goes out is made ready for upsampling
            total += k * projection * (config.shortening.endswith("linear") + config.upsampling.endswith("linear"))
            if config.shortening.startswith("attention"):
                total += attend(length * k / level.factor) + 2 * k * projection
            if config.upsampling.startswith("attention"):
                total += 2 * projection
        if inner is not None and config.upsampling.startswith("attention"):
            total += attend(length / inner.factor)
        flops[level.factor] = total
        k = level.shorten_factor
    flops[1] += 2 * d * config.vocab_size
    return flops
