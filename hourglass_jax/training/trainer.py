"""The loop around the training step: logs, evaluates, samples, saves, and goes on after anything."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from hourglass_jax.config import OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.costs import training_flops
from hourglass_jax.data.pipeline import Batch, BatchAt, stream
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import Evaluation, evaluate_batches
from hourglass_jax.factors import at_shorten_factor, drawn_factor
from hourglass_jax.model import HourglassLM
from hourglass_jax.training import sharding
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.metrics import CurveWriter, matmul_ceiling, peak_memory_bytes
from hourglass_jax.training.optimizer import learning_rate_schedule, make_optimizer
from hourglass_jax.training.signals import Interrupted, Signals
from hourglass_jax.training.step import TrainState, first_state, make_train_step

LOG_INTERVAL = 10  # steps between records of the training loss


def fit(
    model: HourglassLM,
    batch_at: BatchAt,
    validation: Sequence[Batch],
    directory: Path,
    *,
    optimizer_config: OptimizerConfig,
    train_config: TrainConfig,
    runtime_config: RuntimeConfig | None = None,
    sample: Callable[[HourglassLM], str] | None = None,
    unit: str = "BPC",
    signals: Signals | None = None,
) -> Evaluation:
    """Trains `model` in place to `train_config.steps` and returns its evaluation on the whole validation set.

    Goes on from the newest whole checkpoint under `directory` if there is one. Writes checkpoints and curves there,
    and what `sample` returns; shows bits a prediction as `unit`. On return the model holds the parameters of lowest
    validation loss. With `shorten_factors`, validation is at each of them and its loss their mean.

    Raises Interrupted, after a checkpoint, where `signals` noted one; UsageError for a loss that is not finite, a
    checkpoint that cannot be written, or devices that the batch cannot be divided among.
    """
    runtime_config = runtime_config or RuntimeConfig()
    return _Training(
        model, batch_at, validation, directory, optimizer_config, train_config, runtime_config, sample, unit, signals
    ).run()


class _Training:
    """One run, from where its directory stands to its last step."""

    def __init__(
        self,
        model: HourglassLM,
        batch_at: BatchAt,
        validation: Sequence[Batch],
        directory: Path,
        optimizer_config: OptimizerConfig,
        train_config: TrainConfig,
        runtime_config: RuntimeConfig,
        sample: Callable[[HourglassLM], str] | None,
        unit: str,
        signals: Signals | None,
    ):
        self.model, self.batch_at, self.validation, self.directory = model, batch_at, validation, directory
        self.config, self.runtime = train_config, runtime_config
        self.sample, self.unit, self.signals = sample, unit, signals or Signals()
        self.schedule = learning_rate_schedule(optimizer_config, train_config.steps)
        optimizer = make_optimizer(optimizer_config, train_config.steps)

        self.mesh = sharding.make_mesh(runtime_config)
        self.batch_sharding = sharding.batch_sharding(self.mesh)
        self.batch_size, self.block_size = batch_at(0)[1].shape
        sharding.check_batch(self.mesh, self.batch_size, runtime_config.accumulate)
        self.rows = sharding.local_rows(self.batch_sharding, self.batch_size)

        model.train()
        factors = train_config.shorten_factors
        models: dict[int | None, HourglassLM] = {k: at_shorten_factor(model, k) for k in factors} or {None: model}
        self.graphs = {k: nnx.split(model_at_k)[0] for k, model_at_k in models.items()}
        self.graph, params = nnx.split(model)
        params = jax.device_get(params)  # host arrays may go to the devices of any process

        start = partial(first_state, optimizer=optimizer)
        state = jax.eval_shape(start, params)
        shardings = sharding.state_shardings(self.mesh, state)
        self.store = CheckpointStore(directory, for_training=True)
        self.saved_step = self.store.sound_step()
        self.step = self.saved_step or 0
        self.store.rewind(self.step)
        if self.saved_step is None:
            self.state = jax.jit(start, out_shardings=shardings)(params)
        else:
            places = sharding.abstract(state, shardings)
            items = self.store.restore(self.step, params=places.params, opt_state=places.opt_state)
            self.state = TrainState(jax.device_put(np.int32(self.step), shardings.step), **items)
        make_step = partial(
            make_train_step,
            optimizer=optimizer,
            seed=train_config.seed,
            accumulate=runtime_config.accumulate,
            shardings=shardings,
        )
        self.train_steps = {k: make_step(graph) for k, graph in self.graphs.items()}
        self.curves = CurveWriter(directory, self.step) if jax.process_index() == 0 else None
        flops = [training_flops(model_at_k.config, self.block_size) for model_at_k in models.values()]
        self.flops = statistics.mean(flops) * self.batch_size
        self.ceiling = matmul_ceiling(model.config.dtype) * jax.device_count()
        self.recent: list[tuple[int, dict[str, jax.Array]]] = []  # metrics not yet looked at
        self.shown: dict[str, str] = {}
        self.start_clock()

    def run(self) -> Evaluation:
        steps = range(self.step + 1, self.config.steps + 1)
        batches = stream(self.batch_at, self.step, self.config.steps, self.rows)
        self.progress = tqdm(
            total=self.config.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            **({"disable": True} if jax.process_index() else {}),  # of the first process, TQDM_DISABLE=1 decides
        )
        try:
            self.check_signals()
            for step, batch in zip(steps, batches, strict=True):
                self.train_on(step, batch)
                self.check_signals()
        except Interrupted as interruption:
            if self.saved_step != self.step:
                self.save()
            raise Interrupted(
                f"{interruption} after step {self.step}, which is saved in {self.directory}; the same command goes on"
            ) from None
        finally:
            self.progress.close()
            if self.curves:
                self.curves.close()
            self.store.close()
        return self.finish()

    def train_on(self, step: int, batch: Batch) -> None:
        first, last = self.runtime.profiled
        if step == first:
            jax.profiler.start_trace(str(self.directory / "profile"))
        placed = sharding.place(batch, self.batch_sharding, self.batch_size)
        factors = self.config.shorten_factors
        factor = drawn_factor(factors, self.config.seed, step) if factors else None
        self.state, metrics = self.train_steps[factor](self.state, *placed)
        self.step = step
        self.recent.append((step, metrics))
        self.characters += np.count_nonzero(batch[1]) * jax.process_count()
        if step == last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()

        def due(interval: int) -> bool:
            return bool(interval) and step % interval == 0

        finished = step == self.config.steps
        if due(LOG_INTERVAL) or finished:
            self.log()
        self.progress.update()
        if due(self.runtime.sample_interval) and self.sample:
            self.write_sample(self.sample)
        if due(self.config.eval_interval) or finished:
            self.save(self.evaluate())
        elif due(self.runtime.checkpoint_interval):
            self.save()

    def check_signals(self) -> None:
        """Several processes stop together, at the steps at which they log: to ask the others costs time."""
        if jax.process_count() == 1:
            self.signals.check()
        elif self.step % LOG_INTERVAL == 0 and sharding.any_process(self.signals.received is not None):
            raise Interrupted("stopped by a signal")

    def start_clock(self) -> None:
        self.started, self.characters, self.clock_step = time.perf_counter(), 0, self.step

    def look(self) -> dict[str, float]:
        """The newest metrics. Raises UsageError at the first step, since the last look, with one that is not finite."""
        values: dict[str, float] = {}
        for step, metrics in self.recent:
            values = {name: float(value) for name, value in metrics.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise UsageError(
                        f"step {step}: {name} is {value}, on batch {step - 1} in the order of seed {self.config.seed}; "
                        f"the last good checkpoint is that of step {self.saved_step} in {self.directory}; lower the "
                        "learning rate or set a clip_norm"
                    )
        self.recent = []
        return values

    def log(self) -> None:
        values = self.look()
        seconds = (time.perf_counter() - self.started) / max(self.step - self.clock_step, 1)
        rate = self.characters / (time.perf_counter() - self.started)
        if self.curves:
            self.curves.write(
                self.step,
                **values,
                learning_rate=float(self.schedule(self.step - 1)),
                characters_per_second=rate,
                step_seconds=seconds,
                flop_utilisation=self.flops / seconds / self.ceiling,
                peak_memory_bytes=peak_memory_bytes(),
            )
        self.show(loss=f"{values['train_loss']:.3f}", **{"tokens/s": f"{rate:,.0f}"})
        self.start_clock()

    def show(self, **figures: str) -> None:
        self.shown |= figures
        self.progress.set_postfix(self.shown, refresh=False)

    def placed(self, batches: Sequence[Batch]) -> Iterator[tuple[jax.Array, ...]]:
        """Validation batches on the mesh, with rows of no weight added where the devices do not divide them."""
        for batch in batches:
            self.check_signals()
            size = -(-len(batch[0]) // self.mesh.size) * self.mesh.size
            padded = [np.pad(part, [(0, size - len(part)), (0, 0)]) for part in batch]
            rows = sharding.local_rows(self.batch_sharding, size)
            yield sharding.place(tuple(part[rows] for part in padded), self.batch_sharding, size)

    def at_each_factor(self, params: nnx.State, batches: Sequence[Batch]) -> dict[int | None, Evaluation]:
        results: dict[int | None, Evaluation] = {}
        for factor, graph in self.graphs.items():
            model = nnx.merge(graph, params)
            model.eval()
            results[factor] = evaluate_batches(model, self.placed(batches))
        return results

    def evaluate(self) -> float:
        results = self.at_each_factor(self.state.params, self.validation[: self.config.eval_batches])
        result = mean(results)
        if self.curves:
            each = {f"valid_bpc_at_{k}": at_k.bits_per_character for k, at_k in results.items() if k is not None}
            self.curves.write(self.step, valid_loss=result.loss, valid_bpc=result.bits_per_character, **each)
        self.show(**{f"valid {self.unit}": f"{result.bits_per_character:.3f}"})
        self.start_clock()
        return result.loss

    def write_sample(self, sample: Callable[[HourglassLM], str]) -> None:
        model = nnx.merge(self.graph, sharding.gather(self.state.params))
        model.eval()
        text = sample(model) if jax.process_index() == 0 else ""
        if self.curves:
            self.curves.write_text(self.step, text)
        self.progress.write(f"step {self.step}: {text}")
        self.start_clock()

    def save(self, valid_loss: float | None = None) -> None:
        self.look()  # nothing that is not finite may replace a good checkpoint
        self.store.save(self.step, self.state.params, self.state.opt_state, valid_loss)
        self.saved_step = self.step
        self.start_clock()

    def finish(self) -> Evaluation:
        """Puts the best parameters into the model and evaluates them on all of the validation data."""
        store = CheckpointStore(self.directory)
        params = self.state.params
        places = sharding.abstract(params, jax.tree.map(lambda leaf: leaf.sharding, params))
        step = store.sound_step(best=True)
        assert step is not None  # the last one was saved
        params = store.restore(step, params=places)["params"]
        store.close()
        result = mean(self.at_each_factor(params, self.validation))
        self.model.eval()
        nnx.update(self.model, sharding.gather(params))
        return result


def mean(results: Mapping[int | None, Evaluation]) -> Evaluation:
    """Over the shorten factors, of the same predictions."""
    evaluations = list(results.values())
    return Evaluation(statistics.mean(each.loss for each in evaluations), evaluations[0].n_characters)
