"""AdamW and Muon with a learning-rate schedule (optax), and which parameters are trained and decayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from hourglass_jax.errors import UsageError
from hourglass_jax.run_config import OptimizerConfig

# Coefficients of Muon's Newton-Schulz iterations, from Polar Express (arXiv:2505.16932). Given one tuple per iteration,
# optax scans them; its default, five equal iterations, is unrolled.
NEWTON_SCHULZ = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
Filter = Callable[[Sequence[Any], Any], bool]  # maps path and value of a parameter to bool, as in Flax


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW (arXiv:1711.05101) or Muon (arXiv:2502.16982) with all other options of `config`."""
    rate = learning_rate_schedule(config, steps)
    if config.optimizer == "muon":
        # Updates of kernels are orthogonal, scaled to the size of Adam's: one learning rate serves both.
        optimizer = optax.contrib.muon(
            rate,
            ns_coeffs=NEWTON_SCHULZ,
            ns_steps=len(NEWTON_SCHULZ),
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
    else:
        optimizer = optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(rate),
        )
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.level_rates:
        optimizer = optax.chain(optimizer, scale_by_level(config.level_rates))
    return with_average(optimizer, config.ema) if config.ema else optimizer


def scale_by_level(rates: Sequence[float]) -> optax.GradientTransformation:
    """Return a transformation that scales the updates of each level of the hierarchy by its rate."""
    return optax.stateless(lambda updates, _: jax.tree.map_with_path(lambda p, u: rates[level_of(p)] * u, updates))


def level_of(path: Sequence[Any]) -> int:
    """Return the level of a parameter, 0 for the outermost: hourglass.inner.inner... is level 2."""
    names = [getattr(key, "key", key) for key in path[1:]]
    return sum(1 for _ in itertools.takewhile(lambda name: name == "inner", names))


class AveragedState(NamedTuple):
    """State of an optimizer, number of its updates, and the average of the parameters."""

    inner: Any
    step: jax.Array  # int32 []
    average: Any


def with_average(optimizer: optax.GradientTransformation, ema: float) -> optax.GradientTransformation:
    """Return `optimizer` with an exponential moving average of the parameters in its state.

    The average starts at the initial parameters. The decay of update t = 0, 1, ... is min(ema, (1 + t) / (10 + t)), so
    that the average of a short run covers about its last tenth.
    """

    def init(params: Any) -> AveragedState:
        return AveragedState(optimizer.init(params), jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(gradients: Any, state: AveragedState, params: Any = None) -> tuple[Any, AveragedState]:
        updates, inner = optimizer.update(gradients, state.inner, params)
        step_size = 1 - jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(optax.apply_updates(params, updates), state.average, step_size)
        average = jax.tree.map(lambda new, old: new.astype(old.dtype), average, state.average)
        return updates, AveragedState(inner, state.step + 1, average)

    return optax.GradientTransformation(init, update)


def muon_dimensions(params: Any) -> Any:
    """Return the input and output axes of the kernels that Muon updates, None for parameters that Adam updates.

    Muon updates the kernels of all linear layers but the head; stacked layers are a batch of matrices.
    """

    def dimensions(path: Sequence[Any], param: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [getattr(key, "key", None) for key in path]
        if "kernel" not in names or names[0] == "head":
            return None
        return optax.contrib.MuonDimensionNumbers(param.ndim - 2, param.ndim - 1)

    return jax.tree.map_with_path(dimensions, params)


def optimizer_flops(config: OptimizerConfig, params: Any) -> int:
    """Return the FLOPs of matrix products in an update: for Muon, Newton-Schulz iterations for each kernel."""
    if config.optimizer != "muon":
        return 0

    def flops(param: Any, dimensions: optax.contrib.MuonDimensionNumbers | None) -> int:
        if dimensions is None:
            return 0
        short, long = sorted(param.shape[-2:])  # an iteration computes A = X X', A A and B X
        return len(NEWTON_SCHULZ) * (4 * short**2 * long + 2 * short**3) * (param.size // (short * long))

    return sum(jax.tree.leaves(jax.tree.map(flops, params, muon_dimensions(params))))


def describe_optimizer(config: OptimizerConfig, params: nnx.State) -> str:
    """Return the name, the result of `optimizer_flops` and the size of the state of an optimizer for `params`."""
    trained = nnx.filter_state(params, trained_parameters(params, config))
    state = jax.eval_shape(make_optimizer(config, 1).init, trained)
    megabytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 1e6
    megaflops = optimizer_flops(config, trained) / 1e6
    return f"optimizer: {config.optimizer}, {megaflops:,.1f} MFLOPs a step, {megabytes:,.1f} MB of state"


def decay_mask(params: Any) -> Any:
    """Return True for parameters with weight decay: the kernels of linear layers.

    minGPT and big_vision do the same: biases, norms, embeddings and positions do not decay. The mask selects by
    name, because the biases of stacked layers have as many axes as a matrix.
    """
    return jax.tree.map_with_path(lambda path, _: any(getattr(key, "key", None) == "kernel" for key in path), params)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return a linear warmup, then a cosine to 0 at `steps`, peak * sqrt(warmup / step), or a constant.

    Over the last `decay_steps` the rate is multiplied by a factor that falls linearly from 1 to 0. Before them, a
    constant rate does not depend on `steps`, so shorter runs can branch off one long run.
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
    decay_steps = decay_length(config, steps)
    if not decay_steps:
        return schedule
    return lambda step: schedule(step) * jnp.clip((steps - step) / decay_steps, 0, 1)


def decay_length(config: OptimizerConfig, steps: int) -> int:
    """Return the length of the final linear decay: `decay_steps`, by default a fifth of `steps` for wsd."""
    return config.decay_steps or (steps // 5 if config.schedule == "wsd" else 0)


def describe_schedule(config: OptimizerConfig, steps: int) -> str:
    """Return `learning_rate_schedule` in words."""
    warmup, peak = config.warmup_steps, config.learning_rate
    after = {"cosine": f"cosine to 0 at step {steps}", "inverse_sqrt": "peak * sqrt(warmup / step)"}
    decay_steps = decay_length(config, steps)
    end = f", falling to 0 over the last {decay_steps}" if decay_steps else ""
    return f"{warmup} warmup steps to {peak:g}, then {after.get(config.schedule, 'constant')}{end}"


def _inverse_sqrt(peak: float, warmup: int, step: jax.Array) -> jax.Array:
    """`step` counts from the end of the warmup; join_schedules also evaluates, and discards, negative steps."""
    return peak * jnp.sqrt(warmup / jnp.maximum(warmup + step, 1))


def ALL(path: Sequence[Any], value: Any) -> bool:
    """Select every parameter."""
    return True


def trained_parameters(params: nnx.State, config: OptimizerConfig) -> Filter:
    """Return a filter for the parameters in the modules named in `config.train_only`; empty: all parameters.

    train_only: comma-separated module paths, e.g. "hourglass.post,head". The layers of a stack share one array, so they
    are trained together.
    Raises UsageError for a module without parameters, if Muon has no kernel to train, and if the number of
    `level_rates` is not that of the levels.
    """
    n_rates, n_levels = len(config.level_rates), 1 + max(level_of(path) for path, _ in nnx.to_flat_state(params))
    if n_rates not in (0, n_levels):
        raise UsageError(
            f"level_rates={config.level_rates} has {n_rates} factors, but the model has {n_levels} levels; give one "
            "for each level, outermost first"
        )
    if not config.train_only:
        return ALL
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    chosen = [tuple(name.strip().split(".")) for name in config.train_only.split(",")]
    for name in chosen:
        if not any(_within(path, name) for path in paths):
            modules = sorted({".".join(path[: max(1, min(len(path) - 1, 3))]) for path in paths})
            raise UsageError(
                f"train_only={'.'.join(name)!r} has no parameters; choose from {', '.join(modules)}, or from the "
                "modules that contain these or are part of them"
            )

    def trained(path: Sequence[Any], _: Any) -> bool:
        return any(_within(tuple(map(str, path)), name) for name in chosen)

    if config.optimizer == "muon" and not optimizer_flops(config, nnx.filter_state(params, trained)):
        raise UsageError(
            f"optimizer='muon' has no kernel to train in train_only={config.train_only!r}; use optimizer='adamw'"
        )
    return trained


def _within(path: tuple[str, ...], module: tuple[str, ...]) -> bool:
    return path[: len(module)] == module
