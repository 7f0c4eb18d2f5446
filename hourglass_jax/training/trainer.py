"""The training loop: restores a run, trains, logs, samples, saves and evaluates."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from hourglass_jax.costs import training_flops
from hourglass_jax.data.files import FileChanged
from hourglass_jax.data.pipeline import Batch, BatchAt, evenly_spaced, stream
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import Evaluation, evaluate_batches, mean_evaluation
from hourglass_jax.files import optional_output
from hourglass_jax.memory import release_memory
from hourglass_jax.model import HourglassLM
from hourglass_jax.run_config import OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.training import sharding
from hourglass_jax.training.hooks import (
    Hook,
    Patience,
    Profile,
    Progress,
    ReleaseMemory,
    ShowProgress,
    WarnOfSuppression,
    WriteCurves,
)
from hourglass_jax.training.identity import first_batch_fingerprint
from hourglass_jax.training.metrics import matmul_ceiling, peak_memory_bytes
from hourglass_jax.training.optimizer import learning_rate_schedule, make_optimizer, optimizer_flops, trained_parameters
from hourglass_jax.training.run import Run
from hourglass_jax.training.signals import Interrupted, Signals
from hourglass_jax.training.step import TrainState, compile_step, first_state, make_train_step
from hourglass_jax.transfer import at_shorten_factor, drawn_factor

LOG_INTERVAL = 10  # steps between records of the training loss


class Diverged(UsageError):
    """The loss, a gradient or a parameter is not finite."""


def fit(
    model: HourglassLM,
    batch_at: BatchAt,
    validation: Sequence[Batch],
    run: Run | str | Path,
    *,
    optimizer_config: OptimizerConfig,
    train_config: TrainConfig,
    runtime_config: RuntimeConfig | None = None,
    sample: Callable[[HourglassLM], str] | None = None,
    hooks: Sequence[Hook] = (),
    unit: str = "BPC",
    signals: Signals | None = None,
) -> Evaluation:
    """Train `model` in place to `train_config.steps`; return its evaluation on all of `validation`.

    run: a run or its directory. Training resumes from the newest complete checkpoint if model, configurations and first
        batch are those of the run; only `steps` may grow. Checkpoints and curves are written there. Call
        `Run(directory).start(config, tokenizer)` first to store a tokenizer for `load`.
    sample: returns a text to show and log every `runtime_config.sample_interval` steps.
    hooks: see `Hook`.
    unit: the name of bits per prediction in the progress line.

    At the end the model has the parameters of lowest validation loss. With `shorten_factors`, validation runs at each
    factor, and its loss is their mean.

    Raises Interrupted, after a checkpoint, if `signals` received one; Diverged if the loss is not finite; FileChanged,
    after a checkpoint, if a memory-mapped text was changed in place; UsageError for a run with other settings, a run in
    which another process trains, an empty validation, a checkpoint that cannot be written, or a batch that the devices
    cannot divide.
    """
    if not len(validation):
        raise UsageError("validation has no batch; give at least one")
    training = _Training(
        model,
        batch_at,
        validation,
        run if isinstance(run, Run) else Run(run),
        optimizer_config,
        train_config,
        runtime_config or RuntimeConfig(),
        sample,
        list(hooks),
        unit,
        signals or Signals(),
    )
    with training.run.training() if jax.process_index() == 0 else nullcontext():
        return training.train()


@dataclasses.dataclass(eq=False)
class _Training:
    """The arguments of `fit`, and the state of training."""

    model: HourglassLM
    batch_at: BatchAt
    validation: Sequence[Batch]
    run: Run
    optimizer_config: OptimizerConfig
    config: TrainConfig
    runtime: RuntimeConfig
    sample: Callable[[HourglassLM], str] | None
    hooks: list[Hook]
    unit: str
    signals: Signals

    def __post_init__(self) -> None:
        self.mesh = sharding.make_mesh(self.runtime)
        self.batch_sharding = sharding.batch_sharding(self.mesh)
        tokens, weights = self.batch_at(0)
        self.batch_size, self.block_size = weights.shape
        self.settings = {
            "optimizer": dataclasses.asdict(self.optimizer_config),
            "train": dataclasses.asdict(self.config),
            **first_batch_fingerprint(tokens),
        }
        sharding.check_batch(self.mesh, self.batch_size, self.runtime.accumulate)
        self.rows = sharding.local_rows(self.batch_sharding, self.batch_size)
        self.trained = trained_parameters(nnx.state(self.model), self.optimizer_config)
        self.model.train()
        factors = self.config.shorten_factors
        models: dict[int | None, HourglassLM] = {k: at_shorten_factor(self.model, k) for k in factors}
        models = models or {None: self.model}
        self.graphs = {k: nnx.split(model_at_k)[0] for k, model_at_k in models.items()}
        flops = [training_flops(model_at_k.config, self.block_size) for model_at_k in models.values()]
        trained = nnx.filter_state(nnx.state(self.model), self.trained)
        self.flops = statistics.mean(flops) * self.batch_size + optimizer_flops(self.optimizer_config, trained)
        self.unread: list[tuple[int, dict[str, jax.Array]]] = []  # metrics of the steps since the last check

    def train(self) -> Evaluation:
        """Train from the newest checkpoint to the last step."""
        self.start_run()
        self.restore()
        self.add_hooks()
        batches = stream(self.batch_at, self.step, self.config.steps, self.rows)
        with self.closing(), self.saving():
            self.check_signals()
            if self.step and self.evaluation_due and not self.store.evaluated(self.step):
                self.evaluate()  # the process ended between this checkpoint and its evaluation
            for step, batch in enumerate(batches, self.step + 1):
                if self.stop:
                    logging.warning("training ends at step %d: %s", self.step, self.stop)
                    break
                self.train_on(step, batch)
                if self.due(LOG_INTERVAL) or self.is_last_step:
                    self.log()
                if self.sample and self.due(self.runtime.sample_interval):
                    self.write_sample(self.sample)
                if self.evaluation_due or self.due(self.runtime.checkpoint_interval):
                    self.save()
                if self.evaluation_due:
                    self.evaluate()
                self.check_signals()
        return self.take_best_parameters()

    def start_run(self) -> None:
        """Create the run, or check that an existing run has the same settings."""
        if jax.process_index() == 0:
            self.run.start(self.model.config, settings=self.settings)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the run has started")
        warmup, steps = self.optimizer_config.warmup_steps, self.config.steps
        if steps <= warmup:
            problem = "warmup_steps=%d is not less than steps=%d: the learning rate never reaches its peak"
            logging.warning(problem, warmup, steps)

    def restore(self) -> None:
        """Restore the newest complete checkpoint, or create the initial state; make the training steps."""
        self.schedule = jax.jit(learning_rate_schedule(self.optimizer_config, self.config.steps))
        optimizer = make_optimizer(self.optimizer_config, self.config.steps)
        self.graph, params = nnx.split(self.model)
        params = jax.device_get(params)  # host arrays may go to the devices of any process
        start = partial(first_state, optimizer=optimizer, trained=self.trained)
        state = jax.eval_shape(start, params)
        shardings = sharding.state_shardings(self.mesh, state)

        self.store = self.run.checkpoints(for_training=True, keep=self.runtime.keep_checkpoints)
        self.saved_step = self.store.sound_step()
        self.step = self.saved_step or 0
        self.store.rewind(self.step)
        if self.saved_step is None:
            self.state = jax.jit(start, out_shardings=shardings)(params)
        else:
            template = sharding.abstract(state, shardings)
            items = self.store.restore(self.step, params=template.params, opt_state=template.opt_state)
            self.state = TrainState(jax.device_put(np.int32(self.step), shardings.step), **items).exchanged()

        make_step = partial(
            make_train_step,
            optimizer=optimizer,
            seed=self.config.seed,
            accumulate=self.runtime.accumulate,
            shardings=shardings,
            trained=self.trained,
        )
        self.train_steps = {k: make_step(graph) for k, graph in self.graphs.items()}
        self.compiled: dict[int | None, jax.stages.Compiled] = {}
        self.ceiling = matmul_ceiling(self.model.config.dtype) * jax.device_count()
        self.start_clock()

    def add_hooks(self) -> None:
        records = [record for record in self.run.curves() if record["step"] <= self.step]
        self.valid_losses = {record["step"]: record["valid_loss"] for record in records if "valid_loss" in record}
        self.hooks = [
            Profile(self.run.directory / "profile", *self.runtime.profiled),
            Patience(self.config.patience, self.valid_losses),
            WarnOfSuppression(self.model.config),
            ReleaseMemory(),
            *self.hooks,
        ]
        if jax.process_index() == 0:
            progress = Progress(self.config.steps, self.step, self.runtime.log)
            self.hooks = [WriteCurves(self.run.directory, self.step), ShowProgress(progress, self.unit), *self.hooks]

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Call `on_end` of all hooks, then close the checkpoints, even if one of these raises."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as problem:
            error = problem
            raise
        finally:
            with ExitStack() as stack:
                stack.callback(self.store.close)
                for hook in reversed(self.hooks):
                    stack.callback(hook.on_end, error)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save the last step at the end, at an interruption, and if the text was changed."""
        try:
            yield
            if self.saved_step != self.step:
                self.save()
        except Interrupted as interruption:
            if self.saved_step != self.step:
                self.save()
            raise Interrupted(f"{interruption} after step {self.step}, which is saved in {self.run}") from None
        except FileChanged as problem:  # from a later batch; the completed steps have read the original file
            if self.saved_step != self.step and jax.process_count() == 1:
                self.save()
            saved = "no step is saved" if self.saved_step is None else f"step {self.saved_step} is saved in {self.run}"
            raise FileChanged(f"{problem}; {saved}") from None

    def call_hooks(self, event: str, step: int, *arguments: Any) -> None:
        for hook in self.hooks:
            getattr(hook, event)(step, *arguments)

    @property
    def stop(self) -> str:
        """The reason why a hook ends training; empty if none does."""
        return next((hook.stop for hook in self.hooks if hook.stop), "")

    @property
    def is_last_step(self) -> bool:
        return self.step == self.config.steps or bool(self.stop)

    @property
    def evaluation_due(self) -> bool:
        return self.due(self.config.eval_interval) or self.is_last_step

    def due(self, interval: int) -> bool:
        return bool(interval) and self.step % interval == 0

    def check_signals(self) -> None:
        """Raise Interrupted after a signal. Several processes agree only at log steps, since that takes time."""
        if jax.process_count() == 1:
            self.signals.check()
        elif self.step % LOG_INTERVAL == 0 and sharding.any_process(bool(self.signals.reason)):
            raise Interrupted("stopped by a signal")

    def start_clock(self) -> None:
        self.started, self.characters, self.clock_step = time.perf_counter(), 0, self.step

    def train_on(self, step: int, batch: Batch) -> None:
        self.call_hooks("before_step", step)
        placed = sharding.place(batch, self.batch_sharding, self.batch_size)
        factors = self.config.shorten_factors
        factor = drawn_factor(factors, self.config.seed, step) if factors else None
        self.state, metrics = self.compiled_step(factor, placed)(self.state, *placed)
        self.step = step
        self.unread.append((step, metrics))
        self.characters += np.count_nonzero(batch[1]) * jax.process_count()
        self.call_hooks("after_step", step, metrics)

    def compiled_step(self, factor: int | None, batch: tuple[jax.Array, ...]) -> jax.stages.Compiled:
        """Return the step at a shorten factor, compiled before its first call."""
        if factor not in self.compiled:
            self.compiled[factor] = compile_step(self.train_steps[factor], self.state, *batch)
            release_memory()
        return self.compiled[factor]

    def check_metrics(self) -> dict[str, float]:
        """Return the newest metrics. Raises Diverged at the first step since the last check that is not finite."""
        values: dict[str, float] = {}
        for step, metrics in jax.device_get(self.unread):
            values = {name: float(value) for name, value in metrics.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    saved = "there is no checkpoint"
                    if self.saved_step is not None:
                        saved = f"the last good checkpoint is of step {self.saved_step}"
                    raise Diverged(
                        f"step {step}: {name} is {value}, on batch {step - 1} in the order of seed {self.config.seed}; "
                        f"{saved} in {self.run}; lower the learning rate or set a clip_norm"
                    )
        self.unread = []
        return values

    def log(self) -> None:
        metrics = self.check_metrics()
        seconds = time.perf_counter() - self.started
        step_seconds = seconds / max(self.step - self.clock_step, 1)
        metrics |= {
            "learning_rate": float(jax.device_get(self.schedule(jax.device_put(self.step - 1)))),
            "characters_per_second": self.characters / seconds,
            "step_seconds": step_seconds,
            "flop_utilisation": self.flops / step_seconds / self.ceiling,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self.call_hooks("on_log", self.step, metrics)
        self.start_clock()

    def write_sample(self, sample: Callable[[HourglassLM], str]) -> None:
        model = nnx.merge(self.graph, sharding.gather(self.state.exchanged().params))
        model.eval()
        if jax.process_index() == 0:
            with optional_output(self.run.directory):  # a sample may write a picture
                self.call_hooks("on_sample", self.step, sample(model))
        self.start_clock()

    def save(self) -> None:
        self.check_metrics()  # a state that is not finite must not replace a good checkpoint
        state = self.state.exchanged()
        self.store.save(self.step, state.params, state.opt_state)
        self.saved_step = self.step
        self.call_hooks("on_checkpoint", self.step)
        self.start_clock()

    def evaluate(self) -> None:
        """Log the validation loss and add it to the checkpoint of this step."""
        if self.step not in self.valid_losses:  # otherwise an earlier process has logged it
            batches = evenly_spaced(self.validation, self.config.eval_batches)
            results = self.evaluate_factors(self.state.exchanged().params, batches)
            mean = mean_evaluation(results.values())
            metrics = {f"valid_bpc_at_{k}": result.bits_per_character for k, result in results.items() if k is not None}
            metrics = {"valid_loss": mean.loss, "valid_bpc": mean.bits_per_character} | metrics
            self.valid_losses[self.step] = mean.loss
            self.call_hooks("on_evaluation", self.step, metrics)
        self.store.set_valid_loss(self.step, self.valid_losses[self.step])
        self.start_clock()

    def evaluate_factors(self, params: nnx.State, batches: Sequence[Batch]) -> dict[int | None, Evaluation]:
        """Evaluate the model at each of `shorten_factors`; without any, the only key is None."""
        results: dict[int | None, Evaluation] = {}
        for factor, graph in self.graphs.items():
            model = nnx.merge(graph, params)
            model.eval()
            results[factor] = evaluate_batches(model, self.placed(batches))
        return results

    def placed(self, batches: Sequence[Batch]) -> Iterator[tuple[jax.Array, ...]]:
        """Place validation batches on the mesh; rows of weight 0 make them divisible by the number of devices."""
        for batch in batches:
            self.check_signals()
            size = -(-len(batch[0]) // self.mesh.size) * self.mesh.size
            padded = [np.pad(part, [(0, size - len(part)), (0, 0)]) for part in batch]
            rows = sharding.local_rows(self.batch_sharding, size)
            yield sharding.place(tuple(part[rows] for part in padded), self.batch_sharding, size)

    def take_best_parameters(self) -> Evaluation:
        """Copy the parameters of lowest validation loss into the model; evaluate them on all of the validation data."""
        store = self.run.checkpoints()
        params = self.state.params
        template = sharding.abstract(params, jax.tree.map(lambda leaf: leaf.sharding, params))
        step = store.sound_step(best=True)
        assert step is not None  # the last step is saved
        params = store.restore(step, params=template)["params"]
        store.close()
        result = mean_evaluation(self.evaluate_factors(params, self.validation).values())
        self.model.eval()
        nnx.update(self.model, sharding.gather(params))
        return result
