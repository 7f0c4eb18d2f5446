"""The training step as a pure function, and the loop around it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

from hourglass_jax.config import OptimizerConfig, TrainConfig
from hourglass_jax.data.pipeline import Batch, BatchAt, stream
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import Evaluation, evaluate_batches, score
from hourglass_jax.model import HourglassLM
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.metrics import CurveWriter
from hourglass_jax.training.optimizer import learning_rate_schedule, make_optimizer

LOG_INTERVAL = 10  # steps between records of the training loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes."""

    step: jax.Array  # int32 []
    params: nnx.State
    opt_state: Any


TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, seed: int) -> TrainStep:
    """A jitted (state, tokens [B, L + 1], weights [B, L]) -> (state, metrics); the state's buffers are donated.

    Dropout draws from (seed, step) alone.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, tokens: jax.Array, weights: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def mean_loss(params):
            return -(score(nnx.merge(graph, params), tokens, key) * weights).sum() / weights.sum()

        loss, gradients = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"train_loss": loss, "gradient_norm": optax.global_norm(gradients)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def fit(
    model: HourglassLM,
    batch_at: BatchAt,
    validation: Sequence[Batch],
    directory: Path,
    *,
    optimizer_config: OptimizerConfig,
    train_config: TrainConfig,
) -> Evaluation:
    """Trains `model` in place to `train_config.steps` and returns its evaluation on the whole validation set.

    Goes on from the latest checkpoint under `directory` if there is one. Writes checkpoints and curves there.
    On return the model holds the parameters of lowest validation loss.
    """
    steps = train_config.steps
    optimizer = make_optimizer(optimizer_config, steps)
    schedule = learning_rate_schedule(optimizer_config, steps)
    model.train()
    graph, params = nnx.split(model)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    store = CheckpointStore(directory)
    start = store.latest_step() or 0
    if start:
        state = TrainState(
            jnp.asarray(start, jnp.int32), **store.restore(start, params=params, opt_state=state.opt_state)
        )
    curves = CurveWriter(directory, start)
    train_step = make_train_step(graph, optimizer, train_config.seed)

    def evaluate_now(batches: Sequence[Batch]) -> Evaluation:
        current = nnx.merge(graph, state.params)
        current.eval()
        return evaluate_batches(current, batches)

    progress = tqdm(
        zip(range(start + 1, steps + 1), stream(batch_at, start, steps), strict=True),
        total=steps,
        initial=start,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
    )
    shown: dict[str, str] = {}
    logged_at, characters = time.perf_counter(), 0
    for step, (tokens, weights) in progress:
        state, metrics = train_step(state, tokens, weights)
        characters += int(weights.sum())
        if step % LOG_INTERVAL == 0 or step == steps:
            values = {name: float(value) for name, value in metrics.items()}
            now = time.perf_counter()
            rate = characters / (now - logged_at)
            logged_at, characters = now, 0
            curves.write(step, **values, learning_rate=float(schedule(step - 1)), characters_per_second=rate)
            shown |= {"loss": f"{values['train_loss']:.3f}", "char/s": f"{rate:,.0f}"}
            progress.set_postfix(shown, refresh=False)
        if step % train_config.eval_interval == 0 or step == steps:
            result = evaluate_now(validation[: train_config.eval_batches])
            curves.write(step, valid_loss=result.loss, valid_bpc=result.bits_per_character)
            store.save(step, state.params, state.opt_state, result.loss)
            shown["valid BPC"] = f"{result.bits_per_character:.3f}"
            progress.set_postfix(shown)
            logged_at, characters = time.perf_counter(), 0
    curves.close()
    best = store.best_step()
    if best is None:
        raise UsageError(f"{directory}: no checkpoint to evaluate; train for at least one step")
    nnx.update(model, store.restore(best, params=state.params)["params"])
    store.close()
    model.eval()
    return evaluate_batches(model, validation)
