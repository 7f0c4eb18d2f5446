"""The suites attention and steps at small sizes, and kernels read from a profile."""

from types import SimpleNamespace

import pytest

from experiments.benchmarks import attention, device, steps
from experiments.benchmarks.accelerator import Accelerator, run_parts
from hourglass_jax.nn.attention.choice import EXPERIMENTS

SIZES = Accelerator(
    hierarchy="1@1 1@2 1@1", d_model=16, n_heads=2, length=16, batch=2, check_length=18, dtype="bfloat16"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("experiments.benchmarks.accelerator.matmul_ceiling", lambda dtype: 1e9)
    monkeypatch.setattr(attention, "CASES", [("layer", "bfloat16")])
    monkeypatch.setattr(attention, "CALLS", 1)
    monkeypatch.setattr(steps, "BATCHES", (2,))
    monkeypatch.setattr(steps, "POSITIONS", ("relative",))


def stream(*names):
    return [SimpleNamespace(name=name, duration_ns=1000) for name in names]


def test_kernels_are_summed_over_the_streams_of_devices_only():
    lines = [
        SimpleNamespace(name="Stream #1(Compute)", events=stream("gemm", "forward_tile", "gemm")),
        SimpleNamespace(name="XLA Ops", events=stream("gemm")),
    ]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=lines), SimpleNamespace(name="/host:CPU", lines=lines)]
    kernels = device.read(planes)
    assert [(kernel.name, kernel.launches) for kernel in kernels] == [("gemm", 2), ("forward_tile", 1)]
    assert device.by_kind(kernels) == pytest.approx({"attention, forward": 1e-6, "matrix products": 2e-6})


def test_every_candidate_is_checked_and_timed_beside_rotary_positions():
    names = list(attention.parts(SIZES, 1))
    for name in EXPERIMENTS:
        assert f"check {name}" in names and f"layer {name} 16" in names and f"step {name}" in names
    assert names[0] == "kernels" and "step fused" in names


@pytest.mark.slow
def test_a_failing_program_fails_only_its_own_part_and_all_rows_are_shown(monkeypatch):
    monkeypatch.setattr(attention, "CANDIDATES", ("stored", "broken"))
    monkeypatch.setattr(attention, "LAYERS", ("fused", "biased"))
    parts, rows = attention.parts(SIZES, 1), {}
    assert list(run_parts(parts, rows)) == list(parts)
    assert [name for name, row in rows.items() if row["kind"] == "failed"] == ["check broken"]
    assert rows["check stored"]["passed"]
    text = attention.describe({"rows": rows}, SIZES, len(parts))
    assert text.count("\n| --- |") == 4 and "- check broken: failed" in text
    assert list(run_parts(attention.parts(SIZES, 1, rows), rows)) == []


@pytest.mark.slow
def test_decoding_steps_are_timed_with_a_cache_of_each_length():
    parts, rows = steps.parts(SIZES, 1), {}
    assert list(run_parts(parts, rows)) == ["step relative 2 2", "step relative 2 16"]
    assert all(row["kind"] == "step" and row["characters_per_second"] > 0 for row in rows.values()), rows
    assert steps.describe({"rows": rows}, SIZES, 2).count("| relative | 2 |") == 2
