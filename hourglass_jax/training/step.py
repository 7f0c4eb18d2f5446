"""The training step as a pure function of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hourglass_jax.evaluation import score
from hourglass_jax.training.selection import ALL, Filter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes."""

    step: jax.Array  # int32 []
    params: nnx.State
    opt_state: Any


def first_state(params: nnx.State, optimizer: optax.GradientTransformation, trained: Filter = ALL) -> TrainState:
    """Before any step; the optimizer's state is of the parameters that are `trained`."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(nnx.filter_state(params, trained)))


TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    accumulate: int = 1,
    shardings: TrainState | None = None,
    trained: Filter = ALL,
) -> TrainStep:
    """A jitted (state, tokens [B, L + 1], weights [B, L]) -> (state, metrics); the state's buffers are donated.

    `accumulate` takes the batch in so many parts, one after another: the gradient of the whole in the memory of a
    part. Dropout draws from (seed, step) alone. `shardings` pins where the new state lies. Gradients, updates and
    norms are of the parameters that are `trained`.
    """

    def weighted_loss(
        params: nnx.State, frozen: nnx.State, tokens: jax.Array, weights: jax.Array, key: jax.Array
    ) -> jax.Array:
        params = nnx.merge_state(params, frozen)
        if shardings is None:
            return -(score(nnx.merge(graph, params), tokens, key) * weights).sum()
        # Parameters whole, as the step's number is, or XLA may divide activations as it divides them.
        params = jax.lax.with_sharding_constraint(params, shardings.step)
        with jax.sharding.use_abstract_mesh(jax.tree.leaves(shardings)[0].mesh.abstract_mesh):
            return -(score(nnx.merge(graph, params), tokens, key) * weights).sum()

    def accumulated(
        params: nnx.State, frozen: nnx.State, tokens: jax.Array, weights: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        def add_part(total, part):
            tokens, weights, index = part
            loss = jax.value_and_grad(weighted_loss)(params, frozen, tokens, weights, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, loss), None

        # Every accumulate-th row: so each device keeps the rows it has.
        tokens, weights = (x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1) for x in (tokens, weights))
        nothing = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        return jax.lax.scan(add_part, nothing, (tokens, weights, jnp.arange(accumulate)))[0]

    @partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def train_step(state: TrainState, tokens: jax.Array, weights: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient_of = jax.value_and_grad(weighted_loss) if accumulate == 1 else accumulated
        params, frozen = nnx.split_state(state.params, trained, ...)
        loss, gradients = gradient_of(params, frozen, tokens, weights, key)
        n_predictions = weights.sum()
        loss, gradients = jax.tree.map(lambda total: total / n_predictions, (loss, gradients))
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics = {
            "train_loss": loss,
            "gradient_norm": optax.global_norm(gradients),
            "parameter_norm": optax.global_norm(params),
        }
        return TrainState(state.step + 1, nnx.merge_state(params, frozen), opt_state), metrics

    return train_step
