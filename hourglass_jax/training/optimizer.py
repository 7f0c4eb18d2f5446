"""AdamW and its learning-rate schedule, through optax."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax

from hourglass_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at `steps`, or peak * sqrt(warmup / step), or constant.

    All of it times a line from 1 to 0 over the last `decay_steps`: up to there, a constant rate is the same whatever
    `steps` is, so that one long run can be branched off into shorter ones (warm-up, stable, decay).
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rise = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    elif config.schedule == "inverse_sqrt":
        after = partial(_inverse_sqrt, peak, max(warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    schedule = optax.join_schedules([rise, after], [warmup])
    if not config.decay_steps:
        return schedule
    return lambda step: schedule(step) * jnp.clip((steps - step) / config.decay_steps, 0, 1)


def _inverse_sqrt(peak: float, warmup: int, step: jax.Array) -> jax.Array:
    """`step` counts from the end of the warm-up; join_schedules also asks for negative ones, and drops them."""
    return peak * jnp.sqrt(warmup / jnp.maximum(warmup + step, 1))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return adamw
