"""Many devices and processes: the same losses, the same checkpoints, parameters really divided."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import optax
import pytest
from conftest import forward, make_model, small_config
from flax import nnx
from launching import ENVIRONMENT, run_forked

import hourglass_jax as hg
from hourglass_jax import RuntimeConfig
from hourglass_jax.training.sharding import batch_sharding, gather, make_mesh, state_shardings
from hourglass_jax.training.step import first_state, make_train_step

FLAGS = ["--hierarchy=1@1 1@2 1@1", "--d_model=32", "--n_heads=2", "--d_ff=64", "--block_size=32", "--batch_size=16"]
FLAGS += [
    "--steps=20",
    "--train.eval_interval=10",
    "--optimizer.warmup_steps=5",
    "--data_path=text.txt",
    "--dropout=0.1",
    "--optimizer.optimizer=muon",
    "--optimizer.level_rates=1,0.5",
    "--optimizer.ema=0.9",
]
TEXT = "the quick brown fox jumps over a lazy dog. " * 300


def devices(n):
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}"}


def pretrain(home, out, *flags, n_devices=1, steps=20):
    result = run_forked("pretrain", *FLAGS, f"--out={out}", f"--steps={steps}", *flags, cwd=home, **devices(n_devices))
    assert result.returncode == 0, result.stderr
    return result


def curve(home, out, name):
    records = map(json.loads, (home / out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[name] for record in records if name in record}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sharding")
    (home / "text.txt").write_text(TEXT)
    pretrain(home, "one")
    return home


def assert_same_curves(home, out, reference="one"):
    for name, tolerance in (("train_loss", 1e-5), ("valid_loss", 1e-5), ("gradient_norm", 1e-4)):
        expected, found = curve(home, reference, name), curve(home, out, name)
        assert expected.keys() == found.keys() and len(expected) == 2
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=tolerance)


@pytest.mark.launchers
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_eight_devices_give_the_losses_of_one(home, fsdp):
    pretrain(home, f"eight{fsdp}", f"--fsdp={fsdp}", n_devices=8)
    assert_same_curves(home, f"eight{fsdp}")


def differentiate_on_eight_devices():
    """The loss with dropout and its gradient, by the interpreted kernels on 4 x 2 devices and by the formula on one."""
    mesh = make_mesh(RuntimeConfig(fsdp=2))
    tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, 11)
    results = []
    for attention in ("kernel", "plain"):
        graph, params = nnx.split(make_model(small_config(attention=attention, window=5, dropout=0.3), scale=1))
        if attention == "kernel":
            tokens = jax.device_put(tokens, batch_sharding(mesh))
            params = jax.device_put(params, state_shardings(mesh, params))
        else:
            tokens = jax.device_put(tokens, jax.devices()[0])

        def loss(params, tokens, graph=graph):
            return (nnx.merge(graph, params)(tokens, jax.random.key(1)) ** 2).mean()

        program = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
        results.append(gather(program(params, tokens)))
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def check_parts_of_parameters():
    """A device of four holds a quarter of the parameters."""
    config = small_config(vocab_size=64, hierarchy="1@1 2@3 1@1", d_model=64, d_ff=128)
    params = nnx.state(make_model(config), nnx.Param)
    placed = jax.device_put(params, state_shardings(make_mesh(RuntimeConfig(fsdp=4)), params))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert 4 * held == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.launchers
@pytest.mark.slow
def test_kernels_on_eight_devices_equal_one_and_parameters_are_divided_over_fsdp():
    code = "import test_sharding as own; own.check_parts_of_parameters(); own.differentiate_on_eight_devices()"
    environment = os.environ | ENVIRONMENT | devices(8) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr


def draw_boundaries_on_eight_devices():
    """Three training steps with noise in the boundaries, on 4 x 2 devices and on one."""
    mesh, results = make_mesh(RuntimeConfig(fsdp=2)), []
    methods = {"boundaries": "gumbel", "shortening": "average", "upsampling": "smooth"}
    for divided in (False, True):
        graph, params = nnx.split(make_model(small_config(dropout=0.1, **methods)))
        optimizer, shardings = optax.sgd(0.1), None
        state, batch = first_state(params, optimizer), (np.arange(8 * 33).reshape(8, 33) ** 2 % 11, np.ones((8, 32)))
        if divided:
            shardings = state_shardings(mesh, jax.eval_shape(lambda state=state: state))
            state, batch = jax.device_put(state, shardings), jax.device_put(batch, batch_sharding(mesh))
        step = make_train_step(graph, optimizer, seed=0, shardings=shardings)
        for _ in range(3):
            state, metrics = step(state, *batch)
        results.append({name: float(value) for name, value in metrics.items()})
    assert 0.1 < results[0]["boundary_rate"] < 0.9
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-6)


@pytest.mark.launchers
@pytest.mark.slow
def test_boundary_noise_is_independent_of_the_device_count():
    code = "import test_sharding; test_sharding.draw_boundaries_on_eight_devices()"
    environment = os.environ | ENVIRONMENT | devices(8) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr


@pytest.mark.launchers
@pytest.mark.slow
def test_accumulated_gradients_equal_the_large_batch_on_eight_devices(home):
    pretrain(home, "large", "--dropout=0")
    pretrain(home, "accumulated", "--dropout=0", "--accumulate=2", "--fsdp=4", n_devices=8)
    assert_same_curves(home, "accumulated", "large")


@pytest.mark.launchers
@pytest.mark.slow
def test_two_processes_of_four_devices_give_the_losses_of_one(home):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def process(i):
        flags = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}", "--fsdp=2"]
        return pretrain(home, "processes", *flags, n_devices=4)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert "sample: " in first.stdout and "sample: " not in second.stdout
    assert_same_curves(home, "processes")


@pytest.mark.launchers
@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(4, 2), (8, 4)])
def test_a_run_resumes_on_another_device_count_and_loads_on_one(home, before, after):
    out = f"moved{before}"
    pretrain(home, out, f"--fsdp={before}", n_devices=before)
    shutil.rmtree(home / out / "checkpoints" / "20")
    pretrain(home, out, "--fsdp=2", n_devices=after)  # from step 10
    assert_same_curves(home, out)
    tokens = np.arange(20)[None]
    moved, one = (forward(hg.load(home / each)[0], tokens) for each in (out, "one"))
    np.testing.assert_allclose(moved, one, atol=1e-4)


@pytest.mark.launchers
def test_invalid_device_counts_raise_one_line_errors(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for flags, words in (
        (["--fsdp=3"], "choose data and fsdp with the product 8"),
        (["--batch_size=12"], "batch_size=12 cannot be divided among 8 devices"),
        (["--accumulate=3"], "8 devices with accumulate=3; choose a multiple of 24"),
        (["--num_processes=2"], "--coordinator"),
        (["--profile_steps=3"], "first and last step"),
    ):
        result = run_forked("pretrain", *FLAGS, "--out=refused", *flags, cwd=tmp_path, **devices(8))
        [error] = [line for line in result.stderr.splitlines() if not line.startswith("W")]  # beside warnings
        assert result.returncode == 2 and words in error, result.stderr


SENT = r"""
import math
import re

from jax import devices

from experiments.accelerators.step import Pretraining, compile_step
from experiments.accelerators.targets import find_target
from hourglass_jax import DataConfig, HourglassConfig, OptimizerConfig, RuntimeConfig, TrainConfig

config = HourglassConfig(vocab_size=64, hierarchy="1@1 1@2 1@1", d_model=32, n_heads=2, d_ff=64, positions="rotary")
target = find_target("8xh100")
for length in (16, 48):
    data = DataConfig(block_size=length, batch_size=8)
    run = Pretraining(config, data, OptimizerConfig(), TrainConfig(), RuntimeConfig(fsdp=8))
    compiled = compile_step(run, target, devices())
    results = re.findall(r" = (.*) (?:all-reduce|all-gather|reduce-scatter|all-to-all)\(", compiled.text)
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(results))
    numbers = sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
    print(4 * numbers, compiled.memory["parameters"] * 8)
"""


@pytest.mark.launchers
@pytest.mark.slow
def test_fsdp_communicates_only_parameters_and_gradients():
    """Whatever the length: activations stay where they are."""
    environment = os.environ | devices(8) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    result = subprocess.run([sys.executable, "-c", SENT], env=environment, capture_output=True, encoding="utf-8")
    (short, parameters), (long, _) = (map(float, line.split()) for line in result.stdout.splitlines())
    assert short == long and parameters < short < 4 * parameters, result.stderr
