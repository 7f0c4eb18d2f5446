"""Training on a CPU needs little memory beside the arrays of a step, and returns what it has freed."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import small_config
from flax import nnx

from hourglass_jax import HourglassLM, OptimizerConfig
from hourglass_jax.costs import activation_bytes
from hourglass_jax.memory import VARIABLES, release_memory
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
        hierarchy="2@1 1@4 2@1", vocab_size=64, d_model=64, n_heads=8, d_ff=256, max_length=256, initialization="xavier"
    )
    optimizer = make_optimizer(OptimizerConfig(), 10)
    graph, params = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))
    state = jax.eval_shape(lambda params: first_state(params, optimizer), params)
    batch = jax.ShapeDtypeStruct((16, 257), jnp.int32), jax.ShapeDtypeStruct((16, 256), jnp.float32)
    step = make_train_step(graph, optimizer, seed=0).lower(state, *batch).compile(CPU_OPTIONS)
    assert step.memory_analysis().temp_size_in_bytes < 1.3 * activation_bytes(config, 256, 16)


STEPS = """
import resource, sys
from hourglass_jax.memory import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):
    y = x @ jnp.ones((8, 4096))  # 64 MB
    return jnp.tanh(y) @ jnp.ones((4096, 8))

def measure():
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return faults, int(open("/proc/self/statm").read().split()[1])

x, measures = jnp.ones((4096, 8)), []
for _ in range(20):
    x = step(x)
    x.block_until_ready()
    measures.append(measure())
mapped = [later[0] - earlier[0] for earlier, later in zip(measures, measures[1:])]
print(min(mapped), measures[-1][1] - measures[9][1])
"""


def later_steps(*arguments, **environment):
    """Return the fewest pages that a later step maps, and by how many the process grows over the last ten steps."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    command = [sys.executable, "-c", STEPS, *arguments]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return map(int, result.stdout.split())


@pytest.mark.launchers
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and calls glibc")
def test_steps_reuse_freed_memory_and_do_not_grow():
    mapped, grown = later_steps("keep")
    assert mapped < 1000 and grown < 1000
    mapped, _ = later_steps()
    assert mapped > 10_000  # 64 MB are 16,384 pages


@pytest.mark.launchers
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and calls glibc")
def test_settings_of_the_environment_are_kept():
    mapped, _ = later_steps("keep", MALLOC_ARENA_MAX="2")
    assert mapped > 10_000
