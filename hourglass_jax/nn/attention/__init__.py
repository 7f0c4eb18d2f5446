"""Attention between groups: the module `Attention`, and one file for each implementation of the same formula.

`plain` states the formula, `pattern` the mask; `choice` selects the implementation.
"""

from hourglass_jax.nn.attention.module import Attention as Attention
