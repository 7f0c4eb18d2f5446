"""The loop around the training step: logs, evaluates, samples, saves, and goes on after anything."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from hourglass_jax.costs import training_flops
from hourglass_jax.data.mapped import FileChanged
from hourglass_jax.data.pipeline import Batch, BatchAt, evenly_spaced, stream
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import Evaluation, evaluate_batches
from hourglass_jax.factors import at_shorten_factor, drawn_factor
from hourglass_jax.files import optional_output
from hourglass_jax.model import HourglassLM
from hourglass_jax.run_config import OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.training import sharding
from hourglass_jax.training.identity import of_first_batch
from hourglass_jax.training.metrics import CurveWriter, matmul_ceiling, peak_memory_bytes
from hourglass_jax.training.optimizer import learning_rate_schedule, make_optimizer
from hourglass_jax.training.progress import Progress
from hourglass_jax.training.run import Run
from hourglass_jax.training.selection import trained_parameters
from hourglass_jax.training.signals import Interrupted, Signals
from hourglass_jax.training.step import TrainState, first_state, make_train_step

LOG_INTERVAL = 10  # steps between records of the training loss
MOST_SUPPRESSED = 0.01  # of the groups' ends that are wanted, without a word


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
    unit: str = "BPC",
    signals: Signals | None = None,
) -> Evaluation:
    """Trains `model` in place to `train_config.steps` and returns its evaluation on the whole validation set.

    run: a run, or its directory. What is not a run yet becomes one; it goes on from its newest whole checkpoint if
    there is one and the model, both configurations and the first batch are those of the run, but that `steps` may
    grow. Writes checkpoints and curves there, and what `sample` returns; shows bits a prediction as `unit`. To make
    the directory one that `load` reads with its tokenizer, `Run(directory).start(config, tokenizer)` first.

    On return the model holds the parameters of lowest validation loss. With `shorten_factors`, validation is at each
    of them and its loss their mean.

    Raises Interrupted, after a checkpoint, where `signals` noted one; UsageError for a run of other settings, another
    process in it, an empty validation, a loss that is not finite (Diverged), a text on disk that is changed in place
    (FileChanged, after a checkpoint), a checkpoint that cannot be written, or devices that the batch cannot be divided
    among.
    """
    runtime_config = runtime_config or RuntimeConfig()
    if not len(validation):
        raise UsageError("validation has no batch; give at least one")
    run = run if isinstance(run, Run) else Run(run)
    training = _Training(
        model, batch_at, validation, run, optimizer_config, train_config, runtime_config, sample, unit, signals
    )
    with run.training() if jax.process_index() == 0 else nullcontext():
        training.begin()
        return training.complete()


class _Training:
    """One run, from where its directory stands to its last step."""

    def __init__(
        self,
        model: HourglassLM,
        batch_at: BatchAt,
        validation: Sequence[Batch],
        run: Run,
        optimizer_config: OptimizerConfig,
        train_config: TrainConfig,
        runtime_config: RuntimeConfig,
        sample: Callable[[HourglassLM], str] | None,
        unit: str,
        signals: Signals | None,
    ):
        self.model, self.batch_at, self.validation, self.run = model, batch_at, validation, run
        self.config, self.runtime = train_config, runtime_config
        self.sample, self.unit, self.signals = sample, unit, signals or Signals()
        self.optimizer_config = optimizer_config

        self.mesh = sharding.make_mesh(runtime_config)
        self.batch_sharding = sharding.batch_sharding(self.mesh)
        tokens, weights = batch_at(0)
        self.batch_size, self.block_size = weights.shape
        self.settings = {
            "optimizer": dataclasses.asdict(optimizer_config),
            "train": dataclasses.asdict(train_config),
            **of_first_batch(tokens),
        }
        sharding.check_batch(self.mesh, self.batch_size, runtime_config.accumulate)
        self.rows = sharding.local_rows(self.batch_sharding, self.batch_size)

        self.trained = trained_parameters(nnx.state(model), optimizer_config.train_only)
        model.train()
        factors = train_config.shorten_factors
        models: dict[int | None, HourglassLM] = {k: at_shorten_factor(model, k) for k in factors} or {None: model}
        self.graphs = {k: nnx.split(model_at_k)[0] for k, model_at_k in models.items()}
        flops = [training_flops(model_at_k.config, self.block_size) for model_at_k in models.values()]
        self.flops = statistics.mean(flops) * self.batch_size
        self.profiling = False
        self.valid_losses: dict[int, float] = {}  # by step
        self.recent: list[tuple[int, dict[str, jax.Array]]] = []  # metrics not yet looked at
        self.suppressed: list[float] = []  # of each learned boundary, by the newest of them

    def begin(self) -> None:
        """Makes the directory a run, or takes up the state of the one that is there."""
        run, config, optimizer_config = self.run, self.config, self.optimizer_config
        if jax.process_index() == 0:
            run.start(self.model.config, settings=self.settings)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the run is found to be this one")
        if 0 < config.steps <= optimizer_config.warmup_steps:
            logging.warning(
                "warmup_steps=%d is not shorter than the run of %d steps: the learning rate never reaches its peak",
                optimizer_config.warmup_steps,
                config.steps,
            )
        self.schedule = jax.jit(learning_rate_schedule(optimizer_config, config.steps))
        optimizer = make_optimizer(optimizer_config, config.steps)
        self.graph, params = nnx.split(self.model)
        params = jax.device_get(params)  # host arrays may go to the devices of any process

        start = partial(first_state, optimizer=optimizer, trained=self.trained)
        state = jax.eval_shape(start, params)
        shardings = sharding.state_shardings(self.mesh, state)
        self.store = run.checkpoints(for_training=True, keep=self.runtime.keep_checkpoints)
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
            seed=config.seed,
            accumulate=self.runtime.accumulate,
            shardings=shardings,
            trained=self.trained,
        )
        self.train_steps = {k: make_step(graph) for k, graph in self.graphs.items()}
        records = [record for record in run.curves() if record["step"] <= self.step]
        self.valid_losses = {record["step"]: record["valid_loss"] for record in records if "valid_loss" in record}
        self.curves = CurveWriter(run.directory, self.step) if jax.process_index() == 0 else None
        self.ceiling = matmul_ceiling(self.model.config.dtype) * jax.device_count()
        self.start_clock()

    def complete(self) -> Evaluation:
        steps = range(self.step + 1, self.config.steps + 1)
        batches = stream(self.batch_at, self.step, self.config.steps, self.rows)
        # Of the processes, the first one shows it.
        self.progress = Progress(self.config.steps, self.step, "none" if jax.process_index() else self.runtime.log)
        try:
            self.check_signals()
            if self.step and self.evaluation_due and not self.store.evaluated(self.step):
                self.evaluate()
            for step, batch in zip(steps, batches, strict=True):
                if self.out_of_patience():
                    break
                self.train_on(step, batch)
                self.check_signals()
        except Interrupted as interruption:
            if self.saved_step != self.step:
                self.save()
            raise Interrupted(
                f"{interruption} after step {self.step}, which is saved in {self.run}; the same command goes on"
            ) from None
        except FileChanged as problem:  # after the last batch: what was read until then is what was there
            if self.saved_step != self.step and jax.process_count() == 1:
                self.save()
            saved = "no step is saved" if self.saved_step is None else f"step {self.saved_step} is saved in {self.run}"
            raise FileChanged(f"{problem}; {saved}") from None
        finally:
            self.end_profile()
            self.progress.close()
            if self.curves:
                self.curves.close()
            self.store.close()
        return self.finish()

    def train_on(self, step: int, batch: Batch) -> None:
        first, last = self.runtime.profiled
        if first <= step <= last and not self.profiling:
            jax.profiler.start_trace(str(self.run.directory / "profile"))
            self.profiling = True
        placed = sharding.place(batch, self.batch_sharding, self.batch_size)
        factors = self.config.shorten_factors
        factor = drawn_factor(factors, self.config.seed, step) if factors else None
        self.state, metrics = self.train_steps[factor](self.state, *placed)
        self.step = step
        self.recent.append((step, metrics))
        self.characters += np.count_nonzero(batch[1]) * jax.process_count()
        if step == last:
            self.end_profile()

        self.progress.advance()
        if self.due(LOG_INTERVAL) or step == self.config.steps:
            self.log()
        if self.due(self.runtime.sample_interval) and self.sample:
            self.write_sample(self.sample)
        if self.evaluation_due or self.due(self.runtime.checkpoint_interval):
            self.save()
        if self.evaluation_due:
            self.evaluate()

    def end_profile(self) -> None:
        """Writes it, if there is one: a run may end before the last step to profile, and go on after the first."""
        if self.profiling:
            jax.block_until_ready(self.state)
            with optional_output(self.run.directory / "profile", RuntimeError):
                jax.profiler.stop_trace()
            self.profiling = False

    def due(self, interval: int) -> bool:
        return bool(interval) and self.step % interval == 0

    @property
    def evaluation_due(self) -> bool:
        return self.due(self.config.eval_interval) or self.step == self.config.steps

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations are no better than the best one before them."""
        losses, patience = list(self.valid_losses.values()), self.config.patience
        if not 0 < patience < len(losses) or min(losses[-patience:]) < min(losses[:-patience]):
            return False
        logging.warning("training ends at step %d: %d evaluations without a better one", self.step, patience)
        return True

    def check_signals(self) -> None:
        """Several processes stop together, at the steps at which they log: to ask the others costs time."""
        if jax.process_count() == 1:
            self.signals.check()
        elif self.step % LOG_INTERVAL == 0 and sharding.any_process(bool(self.signals.reason)):
            raise Interrupted("stopped by a signal")

    def start_clock(self) -> None:
        self.started, self.characters, self.clock_step = time.perf_counter(), 0, self.step

    def look(self) -> dict[str, float]:
        """The newest metrics. Raises UsageError at the first step, since the last look, with one that is not finite."""
        values: dict[str, float] = {}
        for step, metrics in jax.device_get(self.recent):
            values = {name: float(value) for name, value in metrics.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    saved = "there is no checkpoint"
                    if self.saved_step is not None:
                        saved = f"the last good checkpoint is that of step {self.saved_step}"
                    raise Diverged(
                        f"step {step}: {name} is {value}, on batch {step - 1} in the order of seed {self.config.seed}; "
                        f"{saved} in {self.run}; lower the learning rate or set a clip_norm"
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
                learning_rate=float(jax.device_get(self.schedule(jax.device_put(self.step - 1)))),
                characters_per_second=rate,
                step_seconds=seconds,
                flop_utilisation=self.flops / seconds / self.ceiling,
                peak_memory_bytes=peak_memory_bytes(),
            )
        self.progress.show({"loss": f"{values['train_loss']:.3f}", "tokens/s": f"{rate:,.0f}"})
        if values.get("boundary_rate"):
            self.progress.show({"tokens/group": f"{1 / values['boundary_rate']:.1f}"})
        learned = [name for name in values if name.startswith("boundary_loss")]
        self.suppressed = [values[name.replace("loss", "suppressed")] for name in learned]
        self.start_clock()

    def check_room(self, suppressed: float) -> None:
        """Warns where learned boundaries, once they are trained, want more than there is room for."""
        if suppressed > MOST_SUPPRESSED:
            config = self.model.config
            logging.warning(
                "%.1f %% of the groups' ends find no room and wait for the next; raise boundary_slack=%s or "
                "boundary_weight=%s, or choose a smaller factor than that of hierarchy='%s'",
                100 * suppressed,
                config.boundary_slack,
                config.boundary_weight,
                config.hierarchy,
            )

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

    def evaluate(self) -> None:
        """Adds the validation loss to the curves, then to the checkpoint of this step, which is saved already."""
        if self.step not in self.valid_losses:  # a run that was killed between the two has it in the curves
            results = self.at_each_factor(self.state.params, evenly_spaced(self.validation, self.config.eval_batches))
            result = mean(results)
            if self.curves:
                each = {f"valid_bpc_at_{k}": at_k.bits_per_character for k, at_k in results.items() if k is not None}
                self.curves.write(self.step, valid_loss=result.loss, valid_bpc=result.bits_per_character, **each)
            self.valid_losses[self.step] = result.loss
            self.progress.show({f"valid {self.unit}": f"{result.bits_per_character:.3f}"}, now=True)
        self.store.set_valid_loss(self.step, self.valid_losses[self.step])
        self.start_clock()

    def write_sample(self, sample: Callable[[HourglassLM], str]) -> None:
        model = nnx.merge(self.graph, sharding.gather(self.state.params))
        model.eval()
        with optional_output(self.run.directory):  # a sample may be a picture
            text = sample(model) if jax.process_index() == 0 else ""
            if self.curves:
                self.curves.write_text(self.step, text)
            self.progress.write(f"step {self.step}: {text}")
        self.start_clock()

    def save(self) -> None:
        self.look()  # nothing that is not finite may replace a good checkpoint
        self.store.save(self.step, self.state.params, self.state.opt_state)
        self.saved_step = self.step
        self.start_clock()

    def finish(self) -> Evaluation:
        """Puts the best parameters into the model and evaluates them on all of the validation data."""
        for share in self.suppressed:
            self.check_room(share)
        store = self.run.checkpoints()
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
