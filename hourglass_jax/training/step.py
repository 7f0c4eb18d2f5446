"""The training step as a pure function of state and batch."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hourglass_jax.evaluation import log_probabilities
from hourglass_jax.nn.layers import keys_of_rows
from hourglass_jax.objective import Task, task_of
from hourglass_jax.training.optimizer import ALL, AveragedState, Filter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of training that a step updates."""

    step: jax.Array  # int32 []
    params: nnx.State
    opt_state: Any

    def exchanged(self) -> TrainState:
        """Exchange the trained parameters with their moving average; without an average, return the state.

        A checkpoint holds the exchanged state, so its parameters are those for evaluation.
        """
        if not isinstance(self.opt_state, AveragedState):
            return self
        average = self.opt_state.average
        paths = {path for path, _ in nnx.to_flat_state(average)}
        trained, frozen = nnx.split_state(self.params, lambda path, _: path in paths, ...)
        return TrainState(self.step, nnx.merge_state(average, frozen), self.opt_state._replace(average=trained))


def first_state(params: nnx.State, optimizer: optax.GradientTransformation, trained: Filter = ALL) -> TrainState:
    """Return the state before the first step; the optimizer state covers only the `trained` parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(nnx.filter_state(params, trained)))


class Part(NamedTuple):
    """Rows of a batch: targets, the dropout key, and a key for each row for the noise of learned boundaries."""

    task: Task
    key: jax.Array
    row_keys: jax.Array


Metrics = dict[str, jax.Array]
# By default XLA:CPU allocates buffers of the backward pass long before it runs.
CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    accumulate: int = 1,
    shardings: TrainState | None = None,
    trained: Filter = ALL,
) -> jax.stages.Wrapped:
    """Return a jitted (state, tokens [B, L + 1], weights [B, L]) -> (state, metrics) that donates the state.

    accumulate: number of parts of a batch, computed one after another with the memory of one part.
    shardings: of the new state.
    trained: filter for the parameters that have gradients, updates and norms; the others are frozen.

    Random numbers depend on (seed, step) only, not on the devices; with `accumulate`, each part has its own dropout
    key and its own boundary losses. Losses of learned boundaries are minimized too; the metrics report them apart from
    train_loss.
    """

    def loss_of(params: nnx.State, part: Part) -> tuple[jax.Array, Metrics]:
        """Return the total loss and the metrics, summed over predictions."""
        model, task = nnx.merge(graph, params), part.task
        logits, boundary_loss, metrics = model.forward_with_aux(
            task.inputs, part.key, task.weights, mask=task.mask, row_keys=part.row_keys
        )
        weights = task.weights.astype(logits.dtype)
        loss = -(log_probabilities(logits, task.targets) * weights).sum()
        n_predictions = weights.sum()
        metrics = {name: n_predictions * value for name, value in metrics.items()}
        return loss + n_predictions * boundary_loss, {"train_loss": loss} | metrics

    def weighted_loss(params: nnx.State, frozen: nnx.State, part: Part) -> tuple[jax.Array, Metrics]:
        params = nnx.merge_state(params, frozen)
        if shardings is None:
            return loss_of(params, part)
        # All-gather the parameters (`step` is replicated), or XLA may shard activations like parameters.
        params = jax.lax.with_sharding_constraint(params, shardings.step)
        with jax.sharding.use_abstract_mesh(jax.tree.leaves(shardings)[0].mesh.abstract_mesh):
            return loss_of(params, part)

    gradient_of = jax.grad(weighted_loss, has_aux=True)

    def accumulated(params: nnx.State, frozen: nnx.State, whole: Part) -> tuple[nnx.State, Metrics]:
        def add_part(total, part):
            gradients, metrics = gradient_of(params, frozen, part)
            return jax.tree.map(jnp.add, total, gradients), metrics

        # A part takes every accumulate-th row, so no rows move between devices.
        def split(x):
            return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

        task, row_keys = jax.tree.map(split, (whole.task, whole.row_keys))
        zeros = jax.tree.map(jnp.zeros_like, params)
        parts = Part(task, jax.vmap(partial(jax.random.fold_in, whole.key))(jnp.arange(accumulate)), row_keys)
        gradients, metrics = jax.lax.scan(add_part, zeros, parts)
        return gradients, jax.tree.map(lambda values: values.sum(axis=0), metrics)

    @partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def train_step(state: TrainState, tokens: jax.Array, weights: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        task = task_of(nnx.merge(graph, state.params).config, tokens, weights, key)
        params, frozen = nnx.split_state(state.params, trained, ...)
        whole = Part(task, key, keys_of_rows(key, len(tokens)))
        sums = (gradient_of if accumulate == 1 else accumulated)(params, frozen, whole)
        n_predictions = task.weights.sum()
        gradients, metrics = jax.tree.map(lambda total: total / n_predictions.astype(total.dtype), sums)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics |= {"gradient_norm": optax.global_norm(gradients), "parameter_norm": optax.global_norm(params)}
        return TrainState(state.step + 1, nnx.merge_state(params, frozen), opt_state), metrics

    return train_step


def compile_step(train_step: jax.stages.Wrapped, state: TrainState, *batch: jax.Array) -> jax.stages.Compiled:
    """Compile a training step for this state and batch; on a CPU, schedule operations for least memory."""
    devices = jax.tree.leaves(state)[0].sharding.device_set
    return train_step.lower(state, *batch).compile(CPU_OPTIONS if next(iter(devices)).platform == "cpu" else None)
