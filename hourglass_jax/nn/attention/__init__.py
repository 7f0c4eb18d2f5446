"""Attention at group granularity: `Attention`, the module; one formula, in one file for each way to compute it.

`pattern` says who sees whom, `choice` which implementation computes it.
"""

from hourglass_jax.nn.attention.module import Attention as Attention
