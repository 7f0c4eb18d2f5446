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
