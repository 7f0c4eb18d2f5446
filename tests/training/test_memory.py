"""Training on a CPU needs little memory beside the arrays of a step, and returns what it has freed."""

import ctypes
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import small_config
from flax import nnx

from hourglass_jax import HourglassLM, OptimizerConfig
from hourglass_jax.costs import activation_bytes
from hourglass_jax.memory import release_memory
from hourglass_jax.training.optimizer import make_optimizer
from hourglass_jax.training.step import CPU_OPTIONS, first_state, make_train_step


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and calls glibc")
def test_freed_blocks_between_used_ones_go_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(100_000) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident_bytes()
    release_memory()
    assert resident_bytes() < before - 50e6
    libc.free(blocks[-1])


@pytest.mark.usefixtures("optimized")
def test_a_training_step_needs_little_more_memory_than_its_activations():
    config = small_config(
        hierarchy="2@1 4@4 2@1", vocab_size=64, d_model=64, n_heads=8, d_ff=256, max_length=256, initialization="xavier"
    )
    optimizer = make_optimizer(OptimizerConfig(), 10)
    graph, params = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))
    state = jax.eval_shape(lambda params: first_state(params, optimizer), params)
    batch = jax.ShapeDtypeStruct((16, 257), jnp.int32), jax.ShapeDtypeStruct((16, 256), jnp.float32)
    step = make_train_step(graph, optimizer, seed=0).lower(state, *batch).compile(CPU_OPTIONS)
    assert step.memory_analysis().temp_size_in_bytes < 1.3 * activation_bytes(config, 256, 16)
