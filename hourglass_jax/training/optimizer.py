"""AdamW and its learning-rate schedule, through optax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hourglass_jax.run_config import OptimizerConfig


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


def schedule_in_words(config: OptimizerConfig, steps: int) -> str:
    """What `learning_rate_schedule` does, for people."""
    warmup, peak = config.warmup_steps, config.learning_rate
    after = {"cosine": f"cosine to 0 at step {steps}", "inverse_sqrt": "peak * sqrt(warm-up / step)"}
    end = f", falling to 0 over the last {config.decay_steps}" if config.decay_steps else ""
    return f"{warmup} steps of warm-up to {peak:g}, then {after.get(config.schedule, config.schedule)}{end}"


def _inverse_sqrt(peak: float, warmup: int, step: jax.Array) -> jax.Array:
    """`step` counts from the end of the warm-up; join_schedules also asks for negative ones, and drops them."""
    return peak * jnp.sqrt(warmup / jnp.maximum(warmup + step, 1))


def is_decayed(path: Sequence[Any]) -> bool:
    """Whether weight decay shrinks the parameter at `path`: the kernels of linear layers, and nothing else.

    Biases, the scales of norms, embeddings, learned positions and the two biases of relative attention are where they
    are for other reasons than fitting noise, and a decayed scale is only a slower network. So does minGPT
    (`configure_optimizers`: linear weights decay; biases, LayerNorm and embeddings do not) and big_vision (`wd_mults`:
    ".*/kernel$"), after BERT, which excludes LayerNorm and biases. By name: the layers of a stack lie along an axis of
    their own, so that a bias has as many axes as a matrix.
    """
    return any(getattr(entry, "key", None) == "kernel" for entry in path)


def add_decay(weight_decay: float) -> optax.GradientTransformation:
    """AdamW's decoupled weight decay of what `is_decayed`.

    As `optax.add_decayed_weights` with a mask, but its state is empty, as that without one: checkpoints of both go on.
    """

    def update(updates: Any, params: Any) -> Any:
        def decayed(path: Sequence[Any], update: jax.Array, param: jax.Array) -> jax.Array:
            return update + weight_decay * param if is_decayed(path) else update

        return jax.tree.map_with_path(decayed, updates, params)

    return optax.stateless(update)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), its gradients clipped before and its rate scheduled."""
    adamw = optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        add_decay(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return adamw
