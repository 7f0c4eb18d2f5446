"""Runs the launchers as processes of their own: afresh as a user does, or forked from one that has imported JAX."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
FIXTURES = Path(__file__).with_name("fixtures")
FOREIGN = Path(__file__).with_name("foreign")  # first on sys.path: holds another package named experiments
README = (ROOT / "README.md").read_text()
# A shortening method as the README tells users to write one.
[METHOD] = re.findall(r"^## Add a shortening method$.*?^```python\n(.*?)^```$", README, re.M | re.S)
# A plugin that makes the ablations' scale `micro` one that trains in seconds.
MICRO = """
from dataclasses import replace

from experiments.ablations.scales import SETUPS

setup = SETUPS["text", "micro"]
SETUPS["text", "micro"] = replace(
    setup,
    model=setup.model | {"d_model": 16, "n_heads": 2, "d_ff": 32},
    data=replace(setup.data, split="fraction", block_size=24, batch_size=4),
    optimizer=replace(setup.optimizer, warmup_steps=3),
    train=replace(setup.train, steps=12, eval_interval=6, eval_batches=2),
    n_valid=32,
)
"""
# The launchers' programs run once: compiling them quickly matters more than how they run.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONUTF8": "1",
}

os.environ.update(ENVIRONMENT)  # JAX reads it once, when the forkserver imports it

# The imports take three seconds a process; those that need none of their own share them.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["hourglass_jax", "ml_collections.config_flags", "matplotlib.pyplot", "tensorboardX"])
# An exit code can be read once only, and starting a process reads those of all that have ended: one thread at a time.
exit_codes = threading.Lock()


def run(script, *flags, cwd, **environment):
    """The finished process, as `subprocess.run` gives it."""
    command = [sys.executable, EXPERIMENTS / f"{script}.py", *flags]
    path = os.pathsep.join([str(FOREIGN), *sys.path])
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": path} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def run_forked(script, *flags, cwd, closed_pipe=False, **environment):
    """Like `run`, in a fork of a process that has done the imports; `closed_pipe`: its output's reader is gone."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, name) for name in ("stdout", "stderr")]
        process = forkserver.Process(target=_launch, args=(script, flags, cwd, closed_pipe, environment, outputs))
        with exit_codes:
            process.start()
        wait([process.sentinel], timeout=300)
        with exit_codes:
            exit_code = process.exitcode
            process.kill()
        return subprocess.CompletedProcess([script, *flags], exit_code, *(path.read_text("utf-8") for path in outputs))


def _launch(script, flags, cwd, closed_pipe, environment, outputs):
    os.chdir(cwd)
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    if closed_pipe:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the one before took it for a file
    path = EXPERIMENTS / f"{script}.py"
    sys.argv = [str(path), *flags]
    sys.path[:1] = [str(path.parent), str(FOREIGN)]
    runpy.run_path(str(path), run_name="__main__")
