"""The accelerator, cpu and quality suites at small sizes: parts that resume, wrong kernels, tricks, reports."""

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest
from launching import run_forked

import hourglass_jax as hg
from experiments.benchmarks import accelerator, models, quality
from experiments.benchmarks import cpu as cpu_suite
from experiments.benchmarks.accelerator import Accelerator, check, decode, describe, parts, run_parts, train
from experiments.common.reports import provenance
from hourglass_jax.nn import cpu
from hourglass_jax.nn.attention.choice import IMPLEMENTATIONS

SIZES = Accelerator(
    hierarchy="1@1 1@2 1@1",
    d_model=16,
    n_heads=2,
    length=24,
    batch=2,
    check_length=19,
    check_d_model=16,
    decode_length=8,
    decode_batches=(2,),
)


def test_parts_that_have_a_row_are_skipped_and_a_failed_part_does_not_stop_the_others():
    def fail():
        raise ValueError("no such\nkernel")

    rows = {"done": {"kind": "decode", "characters_per_second": 1}}
    made = {"wrong": fail, "done": fail, "good": lambda: {"kind": "check", "comparisons": []}}
    assert list(run_parts(made, rows)) == ["wrong", "good"] and list(run_parts(made, rows)) == []
    assert rows["wrong"]["reason"] == "no such kernel" and rows["done"]["kind"] == "decode"
    del rows["done"]
    assert "failed, no such kernel" in describe({"rows": rows}, SIZES, 3)


def test_every_attention_is_checked_before_anything_is_timed():
    names = list(parts(SIZES, repeats=1))
    kinds = [name.partition(" ")[0] for name in names]
    assert kinds == sorted(kinds, key=["check", "train", "decode"].index)
    for attention in set(IMPLEMENTATIONS) - {"plain"}:
        assert f"check {attention} relative" in names and f"train 1@1 1@2 1@1, rotary, {attention}" in names


@pytest.mark.slow
def test_rows_of_each_kind_are_measured_and_shown(monkeypatch):
    monkeypatch.setattr(accelerator, "WINDOWS", (0,))
    monkeypatch.setattr("experiments.benchmarks.accelerator.matmul_ceiling", lambda dtype: 1e9)
    config = SIZES.config(positions="rotary")
    rows = {
        "check blocked rotary": check(SIZES, "blocked", "rotary"),
        f"train {config.hierarchy}, rotary, blocked": train(SIZES, config, repeats=1),
        "decode rotary 2": decode(SIZES, "rotary", 2, repeats=1),
    }
    assert rows["check blocked rotary"]["passed"]
    assert all(row.get("characters_per_second", 1) > 0 for row in rows.values())
    text = describe({"rows": rows}, SIZES, 3)
    assert "3 of 3 parts are done" in text and text.count("\n| --- |") == 3


@pytest.mark.slow
def test_a_wrong_kernel_does_not_pass(monkeypatch):
    monkeypatch.setattr(accelerator, "WINDOWS", (0,))
    right = IMPLEMENTATIONS["blocked"]
    monkeypatch.setitem(IMPLEMENTATIONS, "blocked", lambda *arguments: 1.2 * right(*arguments))
    row = check(SIZES, "blocked", "rotary")
    assert not row["passed"] and "NO" in describe({"rows": {"check blocked rotary": row}}, SIZES, 1)


def test_a_record_resumes_only_with_its_machine_versions_sizes_and_repeats(tmp_path):
    flags = ["--suite=accelerator", "--repeats=3", "--report=here"]
    record = json.loads(json.dumps({"sizes": vars(Accelerator()), "repeats": 3})) | provenance()
    record["rows"] = {name: {"kind": "failed", "reason": "no", "passed": True} for name in parts(Accelerator(), 3)}
    (tmp_path / "here.json").write_text(json.dumps(record))
    result = run_forked("benchmark", *flags, cwd=tmp_path)
    assert result.returncode == 0 and "23 of 23 parts are done" in result.stdout, result.stderr
    others = [("machine: an abacus -> 1 x ", record | {"machine": "an abacus"})]
    others += [("versions", record | {"versions": {"jax": "0.1"}}), ("repeats", {"sizes": {}, "rows": []})]
    for words, other in others:  # the last is another suite's
        (tmp_path / "here.json").write_text(json.dumps(other))
        result = run_forked("benchmark", *flags, cwd=tmp_path)
        [line] = result.stderr.splitlines()
        assert result.returncode == 2 and "here.json: was measured with other settings (" in line and words in line


@pytest.mark.parametrize("flag", ["--lengths=", "--batches=", "--batches=0"])
def test_lists_without_a_number_raise_one_line_errors(tmp_path, flag):
    result = run_forked("benchmark", "--suite=decoding", "--nopeer", flag, cwd=tmp_path)
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and flag.strip("-=0") in line, line


@pytest.mark.parametrize(
    "suite, flag",
    [
        ("training", "--batches=2"),
        ("boundaries", "--nopeer"),
        ("decoding", "--accelerator.d_model=64"),
        ("quality", "--repeats=2"),
        ("cpu", "--minutes=2"),
    ],
)
def test_options_of_other_suites_raise_errors(tmp_path, suite, flag):
    result = run_forked("benchmark", f"--suite={suite}", flag, "--report=here", cwd=tmp_path)
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and f"not for --suite={suite}; leave it out" in line, line
    assert not list(tmp_path.iterdir())


def test_every_trick_for_xla_cpu_is_timed_beside_the_plain_code():
    tricks = {name for name, value in inspect.getmembers(cpu, inspect.isfunction) if value.__module__ == cpu.__name__}
    assert set(cpu_suite.PLAIN) == tricks == {trick for _, timed in cpu_suite.TASKS.values() for trick in timed}


def test_every_trick_for_xla_cpu_returns_what_the_plain_code_returns():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for name, arguments in {"on_matrix": (jnp.sin, x), "in_own_branch": (jnp.add, jnp.any(x > 0), x, 2 * x)}.items():
        expected = cpu_suite.PLAIN[name](*arguments)
        np.testing.assert_array_equal(getattr(cpu, name)(*arguments), expected, err_msg=name)


def test_a_trick_is_off_while_its_task_is_made_and_first_run(monkeypatch):
    calls = []
    monkeypatch.setitem(cpu_suite.PLAIN, "on_matrix", lambda function, x: calls.append("plain"))

    def make():
        cpu.on_matrix(jnp.sin, jnp.ones((2, 3)))
        return lambda: cpu.on_matrix(jnp.sin, jnp.ones((2, 3)))

    cpu_suite.compiled(make, "on_matrix")()
    assert calls == ["plain"] * 2  # and later runs are those that were compiled
    cpu_suite.compiled(make, cpu_suite.ON)
    assert len(calls) == 2


@pytest.mark.slow
def test_tricks_for_xla_cpu_are_measured_and_shown(monkeypatch):
    monkeypatch.setattr(models, "SIZES", {"vocab_size": 256, "d_model": 16, "n_heads": 2, "d_ff": 16})
    monkeypatch.setattr(cpu_suite, "CONTEXT", 16)
    monkeypatch.setattr(cpu_suite, "NEW", 4)
    monkeypatch.setattr(
        cpu_suite, "TASKS", {"decoding": (lambda: cpu_suite.Decode(cpu_suite.config()), ("in_own_branch",))}
    )
    rows = cpu_suite.measure(repeats=1)
    assert [row["without"] for row in rows] == [cpu_suite.ON, "in_own_branch"]
    rows[0]["seconds"], rows[1]["seconds"] = [1.0, 2.0, 4.0], [2.0, 6.0, 4.0]
    assert "| decoding | `in_own_branch` | 2,000 | 4,000 | 2.00 |" in cpu_suite.describe(rows, 3)


# Models that train in milliseconds.
TINY = """
from experiments.benchmarks import models, quality

models.SIZES = {"vocab_size": 256, "hierarchy": "1@1", "d_model": 16, "n_heads": 2, "d_ff": 32}
quality.LENGTH, quality.BATCH, quality.N_VALID, quality.WARMUP = 8, 2, 2, 1
"""


def test_quality_is_measured_in_parts_of_a_minute_and_drawn(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    flags = ["--plugin=tiny.py", "--suite=quality", "--nopeer", "--data_path=text", "--report=here"]
    result = run_forked("benchmark", *flags, "--minutes=0.02", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text, rows = (tmp_path / "here.md").read_text(), json.loads((tmp_path / "here.json").read_text())["rows"]
    assert "| 0.002 min | 0.004 min | 0.01 min | 0.02 min |" in text and "(32 predictions)" in text
    assert [row["model"] for row in rows] == list(quality.RATES)
    for row in rows:
        assert row["minutes"][0] == 0 and row["minutes"][-1] >= 0.02 and row["bits"][-1] < row["bits"][0]
    assert "here.png" in text and (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")


def test_quality_is_evaluated_on_whole_batches_of_held_out_text():
    text = quality.read_text("")
    train, valid = quality.split(text)
    tokens = np.concatenate([tokens[:, :-1].ravel() for tokens, _ in valid])
    np.testing.assert_array_equal(tokens, text[len(train) :][: len(tokens)])
    assert 1 < len(valid) < quality.N_VALID and all(weights.all() for _, weights in valid)
    with pytest.raises(hg.UsageError, match="the text of 40,000 bytes is too short; give one of at least 40,980"):
        quality.split(text[:40_000])
    assert len(quality.split(text[:40_980])[1]) == 1
