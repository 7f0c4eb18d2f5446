"""The training step of a pretraining run, compiled for a target, and its memory."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.accelerators.targets import Target
from hourglass_jax import DataConfig, HourglassConfig, HourglassLM, OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.training.optimizer import make_optimizer, trained_parameters
from hourglass_jax.training.sharding import abstract, batch_sharding, check_batch, make_mesh, state_shardings
from hourglass_jax.training.step import TrainState, first_state, make_train_step

GPU_SHARE = 0.95  # of a GPU's memory that a program may use: the driver and the libraries take the rest
REQUIRED = re.compile(r"(?:Used |total memory required for HLO temporaries \()([\d.]+)([KMG])")  # in a TPU's error
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The configurations of a pretraining run."""

    model: HourglassConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    runtime: RuntimeConfig

    @property
    def characters(self) -> int:
        """Characters of the whole training."""
        return self.train.steps * self.data.batch_size * self.data.block_size

    def changed(self, **options: Any) -> Pretraining:
        """Return the run with other options of its model or of its runtime."""
        of_model = {name: value for name, value in options.items() if hasattr(self.model, name)}
        of_runtime = {name: value for name, value in options.items() if name not in of_model}
        model, runtime = dataclasses.replace(self.model, **of_model), dataclasses.replace(self.runtime, **of_runtime)
        return dataclasses.replace(self, model=model, runtime=runtime)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak memory of a step in bytes per chip, by what takes it."""

    parameters: float
    optimizer: float
    batch: float
    activations_and_temporaries: float

    @property
    def peak(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    text: the compiled program; empty if compilation failed.
    failure: the compiler's error message.
    seconds: compile time.
    peak: bytes per chip; known of some failures too.
    """

    text: str
    failure: str
    seconds: float
    memory: Memory | None
    peak: float | None

    def fits(self, target: Target) -> bool:
        share = GPU_SHARE if target.platform == "gpu" else 1.0
        return bool(self.text) and self.peak is not None and self.peak <= share * target.memory


def compile_step(run: Pretraining, target: Target, devices: Sequence[jax.Device]) -> Compiled:
    """Compile the step for `devices`. Raises UsageError if they do not divide the batch."""
    mesh = make_mesh(run.runtime, devices)
    check_batch(mesh, run.data.batch_size, run.runtime.accumulate)
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    graph, params = nnx.split(nnx.eval_shape(lambda: HourglassLM(run.model, rngs=nnx.Rngs(0))))
    trained = trained_parameters(params, run.optimizer)
    state = jax.eval_shape(partial(first_state, optimizer=optimizer, trained=trained), params)
    shardings = state_shardings(mesh, state)
    state = abstract(state, shardings)
    step: Any = make_train_step(
        graph, optimizer, run.train.seed, accumulate=run.runtime.accumulate, shardings=shardings, trained=trained
    )
    batch = abstract(batch_shapes(run.data), (batch_sharding(mesh),) * 2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # traced code reads the platform from it
        lowered = step.lower(state, *batch)
    started = time.perf_counter()
    try:
        compiled = compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as error:
        failure = str(error)
        return Compiled("", failure, time.perf_counter() - started, None, required_bytes(failure))
    memory = divide(compiled.memory_analysis(), state, batch)
    return Compiled(compiled.as_text(), "", time.perf_counter() - started, memory, memory.peak)


def compile_lowered(lowered: Any) -> Any:
    """Compile; if XLA finds no tiles for its own matrix products without a device, use a library's products."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "tile sizes" not in str(error):
            raise
    return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def batch_shapes(data: DataConfig) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return tokens [B, L + 1] and weights [B, L]."""
    size = (data.batch_size, data.block_size)
    return jax.ShapeDtypeStruct((size[0], size[1] + 1), jnp.int32), jax.ShapeDtypeStruct(size, jnp.float32)


def divide(analysis: Any, state: TrainState, batch: Any) -> Memory:
    """Divide XLA's memory analysis of the step among its inputs and the rest."""
    peak = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    parameters, optimizer, tokens = (
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state, batch)
    )
    return Memory(parameters, optimizer, tokens, max(peak - parameters - optimizer - tokens, 0))


def required_bytes(failure: str) -> float | None:
    """Return the memory that a TPU's compiler required, from its out-of-memory error; None for other errors."""
    found = REQUIRED.search(failure)
    return float(found.group(1)) * UNITS[found.group(2)] if found else None
