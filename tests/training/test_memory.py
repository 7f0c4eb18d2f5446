"""A step's temporaries are fetched from the system once, where the process keeps them."""

import os
import subprocess
import sys

import pytest

from hourglass_jax.memory import VARIABLES

STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from hourglass_jax.memory import keep_memory

kept = sys.argv[1] == "keep" and keep_memory()

@jax.jit
def step(x):
    y = x @ jnp.ones((8, 4096))  # 64 MB
    return jnp.tanh(y) @ jnp.ones((4096, 8))

x = jnp.ones((4096, 8))
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = step(x)
    x.block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


def faults(how, **environment):
    """What `keep_memory` answered, and the pages that a later step fetched."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    command = [sys.executable, "-c", STEPS, how]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    kept, n_pages = result.stdout.split()
    return kept == "True", int(n_pages)


@pytest.mark.launchers
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's C library")
def test_kept_memory_is_not_fetched_again():
    not_kept, n_not_kept = faults("")
    assert not not_kept and n_not_kept > 10_000  # 64 MB are 16,384 pages
    tries = (faults("keep") for _ in range(4))  # a library's thread that has allocated before spoils some
    assert any(kept and n_kept < 1000 for kept, n_kept in tries)


@pytest.mark.launchers
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's C library")
def test_the_user_s_own_settings_stay():
    assert faults("keep", MALLOC_ARENA_MAX="2")[0] is False
