"""A pretraining run's own training step, compiled for a target, and where its memory goes."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from experiments.accelerators.targets import Target
from hourglass_jax import DataConfig, HourglassConfig, HourglassLM, OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.evaluation import log_probabilities
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.selection import trained_parameters
from hourglass_jax.training.sharding import abstract, batch_sharding, check_batch, make_mesh, state_shardings
from hourglass_jax.training.step import TrainState, first_state, make_train_step

GPU_SHARE = 0.95  # of a GPU's memory that a program may have: the driver and the libraries take some
WANTED = re.compile(r"(?:Used |total memory required for HLO temporaries \()([\d.]+)([KMG])")  # as a TPU's refuses
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The options of a pretraining run."""

    model: HourglassConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    runtime: RuntimeConfig

    def changed(self, **options: Any) -> Pretraining:
        """With other options of its model or of its runtime."""
        of_model = {name: value for name, value in options.items() if hasattr(self.model, name)}
        of_runtime = {name: value for name, value in options.items() if name not in of_model}
        model, runtime = dataclasses.replace(self.model, **of_model), dataclasses.replace(self.runtime, **of_runtime)
        return dataclasses.replace(self, model=model, runtime=runtime)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip at the peak of a step.

    activations: what the forward pass keeps for the backward pass, as it is traced.
    temporaries: what else the compiler needs; where it keeps less than what was traced, activations are all there is.
    """

    parameters: float
    optimiser: float
    batch: float
    activations: float
    temporaries: float

    @property
    def peak(self) -> float:
        return sum(dataclasses.astuple(self))


class Seconds(NamedTuple):
    """What tracing and compiling took by the clock, and compiling of the processor's time, all threads together."""

    trace: float
    compile: float
    compile_processor: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step: `text` is empty where it refused, and `failure` says why.

    peak: bytes of a chip, None where the compiler does not say.
    analysis: the compiler's own bytes of a chip, by its names.
    """

    text: str
    failure: str
    seconds: Seconds
    memory: Memory | None
    peak: float | None
    analysis: dict[str, int] = dataclasses.field(default_factory=dict)

    def fits(self, target: Target) -> bool:
        share = GPU_SHARE if target.platform == "gpu" else 1.0
        return bool(self.text) and self.peak is not None and self.peak <= share * target.memory

    @property
    def rematerialised(self) -> int:
        """Instructions that the compiler computes again of its own accord, for want of memory."""
        return len(set(re.findall(r"%([\w.-]*\.remat[\w.-]*) =", self.text)))


def compile_step(run: Pretraining, target: Target, devices: Sequence[jax.Device]) -> Compiled:
    """Raises UsageError where the devices do not divide the batch."""
    mesh = make_mesh(run.runtime, devices)
    check_batch(mesh, run.data.batch_size, run.runtime.accumulate)
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    graph, params = nnx.split(nnx.eval_shape(lambda: HourglassLM(run.model, rngs=nnx.Rngs(0))))
    trained = trained_parameters(params, run.optimizer.train_only)
    state = jax.eval_shape(partial(first_state, optimizer=optimizer, trained=trained), params)
    shardings = state_shardings(mesh, state)
    state = abstract(state, shardings)
    step: Any = make_train_step(
        graph, optimizer, run.train.seed, accumulate=run.runtime.accumulate, shardings=shardings, trained=trained
    )
    batch = abstract(batch_shapes(run.data), (batch_sharding(mesh),) * 2)
    started = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells what is traced which platform it is for
        lowered = step.lower(state, *batch)
        kept = activation_bytes(graph, params, run, mesh)
    traced, processor = time.perf_counter(), processor_seconds()
    try:
        compiled, failure = compile_lowered(lowered), ""
    except jax.errors.JaxRuntimeError as error:
        compiled, failure = None, str(error)
    seconds = Seconds(traced - started, time.perf_counter() - traced, processor_seconds() - processor)
    if compiled is None:
        return Compiled("", failure, seconds, None, asked_bytes(failure))
    analysis = {
        name: getattr(compiled.memory_analysis(), f"{name}_in_bytes")
        for name in ("argument_size", "output_size", "alias_size", "temp_size")
    }
    held = analysis["argument_size"] + analysis["output_size"] - analysis["alias_size"] + analysis["temp_size"]
    memory = divide(held, state, batch, kept)
    return Compiled(compiled.as_text(), "", seconds, memory, memory.peak, analysis)


def processor_seconds() -> float:
    """Of this process so far, and of those that it started and that have ended: assemblers, for one."""
    return sum(os.times()[:4])


def compile_lowered(lowered: Any) -> Any:
    """Where XLA finds no tiles for a product of its own, for want of a device to try them on, a library's will do."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "tile sizes" not in str(error):
            raise
    return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def batch_shapes(data: DataConfig) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Tokens and weights, as the training step takes them."""
    size = (data.batch_size, data.block_size)
    return jax.ShapeDtypeStruct((size[0], size[1] + 1), jnp.int32), jax.ShapeDtypeStruct(size, jnp.float32)


def activation_bytes(graph: nnx.GraphDef, params: nnx.State, run: Pretraining, mesh: Mesh) -> float:
    """Of a chip: what a gradient keeps of its forward pass for each row of the part of a batch taken at once."""

    def kept(n_rows: int) -> int:
        tokens = jax.ShapeDtypeStruct((n_rows, run.data.block_size + 1), jnp.int32)
        key = jax.random.key(0) if run.model.dropout else None

        def loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
            return log_probabilities(nnx.merge(graph, params)(tokens[:, :-1], key), tokens[:, 1:]).sum()

        def backward(params: nnx.State, tokens: jax.Array) -> Any:
            return jax.vjp(lambda params: loss(params, tokens), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, params, tokens))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    rows = run.data.batch_size / mesh.size / run.runtime.accumulate
    # Weights, which are kept too, do not grow with the rows.
    return rows * (kept(2 * mesh.size) - kept(mesh.size)) / mesh.size


def divide(peak: float, state: TrainState, batch: Any, activations: float) -> Memory:
    """The peak by what takes it."""
    parameters, optimiser, tokens = (
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state, batch)
    )
    rest = max(peak - parameters - optimiser - tokens, 0.0)
    return Memory(parameters, optimiser, tokens, min(activations, rest), max(rest - activations, 0.0))


def asked_bytes(failure: str) -> float | None:
    """How much a TPU's compiler wanted, where it refused for want of memory."""
    found = WANTED.search(failure)
    return float(found.group(1)) * UNITS[found.group(2)] if found else None
