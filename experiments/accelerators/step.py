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

    def changed(self, **options: Any) -> Pretraining:
        """Return the run with other options of its model or of its runtime."""
        of_model = {name: value for name, value in options.items() if hasattr(self.model, name)}
        of_runtime = {name: value for name, value in options.items() if name not in of_model}
        model, runtime = dataclasses.replace(self.model, **of_model), dataclasses.replace(self.runtime, **of_runtime)
        return dataclasses.replace(self, model=model, runtime=runtime)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    text: the compiled program; empty if compilation failed.
    failure: the compiler's error message.
    seconds: compile time.
    memory: bytes per chip by what takes them, at the peak; empty if compilation failed.
    peak: bytes per chip; known of some failures too.
    """

    text: str
    failure: str
    seconds: float
    memory: dict[str, float]
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
    size, length = run.data.batch_size, run.data.block_size
    tokens = jax.ShapeDtypeStruct((size, length + 1), jnp.int32)
    batch = abstract((tokens, jax.ShapeDtypeStruct((size, length), jnp.float32)), (batch_sharding(mesh),) * 2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # traced code reads the platform from it
        lowered = step.lower(state, *batch)
    started = time.perf_counter()
    try:
        compiled = compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as error:
        return Compiled("", str(error), time.perf_counter() - started, {}, required_bytes(str(error)))
    seconds, memory = time.perf_counter() - started, divide(compiled.memory_analysis(), state, batch)
    return Compiled(compiled.as_text(), "", seconds, memory, sum(memory.values()))


def compile_lowered(lowered: Any) -> Any:
    """Compile; if XLA finds no tiles for its own matrix products without a device, use a library's products."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "tile sizes" not in str(error):
            raise
    return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def divide(analysis: Any, state: TrainState, batch: Any) -> dict[str, float]:
    """Divide XLA's memory analysis of the step among its inputs and the rest."""
    peak = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    rest = peak + analysis.temp_size_in_bytes
    memory = {}
    for name, tree in {"parameters": state.params, "optimizer": state.opt_state, "batch": batch}.items():
        leaves = jax.tree.leaves(tree)
        memory[name] = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        rest -= memory[name]
    return memory | {"activations and temporaries": max(rest, 0)}


def required_bytes(failure: str) -> float | None:
    """Return the memory that a TPU's compiler required, from its out-of-memory error; None for other errors."""
    found = REQUIRED.search(failure)
    return float(found[1]) * UNITS[found[2]] if found else None
