"""One model at several shorten factors (section 4.1): where no parameter depends on the factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM
from hourglass_jax.ranges import check_range

_STREAM = 0xF  # sets the draws apart from those of the batches, which are functions of (seed, step) too


def at_shorten_factor(model: HourglassLM, shorten_factor: int) -> HourglassLM:
    """The same parameters, shared and not copied, in a model that shortens by `shorten_factor`.

    Raises UsageError unless the hierarchy shortens exactly once, by methods without parameters of the factor's size:
    average | select | attention_average and repeat | smooth | attention | attention_repeat.
    """
    check_range("shorten_factor", shorten_factor, 2)
    hierarchy = model.config.parsed_hierarchy.with_shorten_factor(shorten_factor)
    config = replace(model.config, hierarchy=str(hierarchy))
    try:
        return model.reconfigured(config)
    except UsageError as error:
        raise UsageError(
            f"shortening={config.shortening!r} with upsampling={config.upsampling!r} has parameters that depend on the "
            "shorten factor, so that one model cannot be used at several; choose average, select or attention_average, "
            "and repeat, smooth, attention or attention_repeat"
        ) from error


def drawn_factor(factors: Sequence[int], seed: int, step: int) -> int:
    """The factor of a training step, each as likely as any other."""
    return int(np.random.default_rng((seed, step, _STREAM)).choice(factors))
