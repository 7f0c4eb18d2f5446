"""The accelerator suite at small sizes: parts that go on after a stop, kernels that are wrong, rows that are shown."""

import json

import pytest
from launching import run_forked

from experiments.benchmarks import accelerator
from experiments.benchmarks.accelerator import Accelerator, check, decode, describe, parts, train
from experiments.common.reports import provenance
from experiments.common.slices import TRIES, Slice
from hourglass_jax.nn.attention.choice import IMPLEMENTATIONS
from hourglass_jax.training.run import RunBusy
from hourglass_jax.training.signals import Interrupted

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


def empty():
    return {"rows": {}, "tries": {}}


def test_a_slice_goes_on_where_the_last_one_stopped():
    ran, saved, record = [], [], empty()
    made = {name: lambda name=name: ran.append(name) or {"kind": "decode"} for name in "abc"}

    def slice_of(seconds):
        return list(Slice(record, seconds, lambda record: saved.append(json.dumps(record))).run(made))

    assert slice_of(0) == []  # no time, no part
    slow = Slice(record, 100, lambda record: None)
    slow.longest = 99.99
    slow.started -= 1
    assert list(slow.run(made)) == []  # a part as long as the longest would end too late
    record["rows"]["b"] = {"kind": "decode"}
    assert slice_of(60) == ["a", "c"] == ran
    assert slice_of(60) == [] and json.loads(saved[-1])["rows"].keys() == set("abc")


def test_a_part_that_fails_is_said_and_one_that_ends_the_process_is_given_up():
    def fail():
        raise ValueError("no such\nkernel")

    record = empty() | {"tries": {"fatal": TRIES}}
    made = {"wrong": fail, "fatal": fail, "good": lambda: {"kind": "decode", "characters_per_second": 1}}
    names = list(Slice(record, 60, lambda record: None).run(made))
    assert names == ["wrong", "fatal", "good"]
    assert record["rows"]["wrong"]["reason"] == "no such kernel"
    assert "ended the process" in record["rows"]["fatal"]["reason"]
    del record["rows"]["good"]
    assert "failed, no such kernel" in describe(record, SIZES, 3)


@pytest.mark.parametrize(
    "stop", [Interrupted("at the end of its time"), KeyboardInterrupt(), RunBusy("another process trains here")]
)
def test_a_part_that_is_stopped_goes_on_and_none_waits_for_a_long_one(stop):
    def stopped():
        raise stop

    record = empty()
    for _ in range(TRIES + 1):
        with pytest.raises(type(stop)):
            list(Slice(record, 60, lambda record: None, whole=False).run({"a": stopped}))
    resumable = Slice(record, 60, lambda record: None, whole=False)
    resumable.longest = 100
    assert list(resumable.run({"a": lambda: {"kind": "trained"}})) == ["a"]


def test_every_attention_is_checked_before_anything_is_timed():
    names = list(parts(SIZES, repeats=1))
    kinds = [name.partition(" ")[0] for name in names]
    assert kinds == sorted(kinds, key=["check", "train", "decode"].index)
    for attention in set(IMPLEMENTATIONS) - {"plain"}:
        assert f"check {attention} relative" in names and f"train 1@1 1@2 1@1, rotary, {attention}" in names


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
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
    assert "3 of 3 parts are done" in text and text.count("\n| --- |") == 3 and "ms, estimate" in text


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_wrong_kernel_does_not_pass(monkeypatch):
    monkeypatch.setattr(accelerator, "WINDOWS", (0,))
    right = IMPLEMENTATIONS["blocked"]
    monkeypatch.setitem(IMPLEMENTATIONS, "blocked", lambda *arguments: 1.2 * right(*arguments))
    row = check(SIZES, "blocked", "rotary")
    assert not row["passed"] and "NO" in describe({"rows": {"check blocked rotary": row}}, SIZES, 1)


def test_a_record_of_another_machine_is_not_gone_on_with(tmp_path):
    """No part begins in no time; the machine, versions, sizes and repeats are those of the record."""
    flags = ["--suite=accelerator", "--slice_minutes=0", "--repeats=3", "--report=here"]
    result = run_forked("benchmark", *flags, cwd=tmp_path)
    assert result.returncode == 0 and "parts are done; the same command goes on" in result.stdout, result.stderr
    record = {"sizes": vars(Accelerator()), "repeats": 3} | provenance() | empty()
    others = [("machine: an abacus -> 1 x ", record | {"machine": "an abacus"})]
    others += [("versions", record | {"versions": {"jax": "0.1"}}), ("repeats", {"sizes": {}, "rows": []})]
    for words, other in others:  # the last is another suite's
        (tmp_path / "here.json").write_text(json.dumps(other))
        result = run_forked("benchmark", *flags, cwd=tmp_path)
        [line] = result.stderr.splitlines()
        assert result.returncode == 2 and "here.json: was measured otherwise (" in line and words in line


@pytest.mark.parametrize("flag", ["--lengths=", "--batches=", "--batches=0"])
def test_lists_without_a_number_are_one_line(tmp_path, flag):
    result = run_forked("benchmark", "--suite=decoding", "--nopeer", flag, cwd=tmp_path)
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and flag.strip("-=0") in line, line


@pytest.mark.parametrize(
    "suite, flag", [("training", "--batches=2"), ("boundaries", "--nopeer"), ("decoding", "--accelerator.d_model=64")]
)
def test_options_of_other_suites_are_refused(tmp_path, suite, flag):
    result = run_forked("benchmark", f"--suite={suite}", flag, "--report=here", cwd=tmp_path)
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and f"not for --suite={suite}; leave it out" in line, line
    assert not list(tmp_path.iterdir())
