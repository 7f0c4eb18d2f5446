"""Costs against length: predictions are those of `costs`, measured points stay, the report is that of the record."""

import json
from dataclasses import replace

import pytest
from launching import run_forked

from experiments.ablations import lengths
from experiments.ablations.scales import SCALES, find_setup
from experiments.common.reports import EXPERIMENTS, NoResults, rerender
from hourglass_jax import HourglassConfig, UsageError
from hourglass_jax.training.signals import Signals


@pytest.mark.parametrize("scale", [pytest.param(s, marks=[pytest.mark.slow] * (s != "micro")) for s in SCALES])
def test_models_are_of_equal_depth_and_equal_flops(scale):
    setup = find_setup("enwik8", scale)
    at = {(point["role"], point["length"]): point for point in lengths.predictions(setup)}
    stages = HourglassConfig(vocab_size=2, hierarchy=lengths.HOURGLASS).parsed_hierarchy.stages
    assert f"{sum(layers for layers, _ in stages)}@1" == at["equal depth", 256]["hierarchy"]
    assert {point["batch"] * point["length"] for point in at.values()} == {lengths.CHARACTERS}
    for role, tolerance in (("equal FLOPs", 0.06), ("equal depth", 1.0)):
        shares = [
            at["Hourglass", length]["predicted_flops"] / at[role, length]["predicted_flops"]
            for length in lengths.LENGTHS
        ]
        assert shares == sorted(shares, reverse=True)  # the longer, the better for the Hourglass
        own = lengths.LENGTHS.index(setup.data.block_size)
        assert abs(shares[own] - 1) < tolerance


@pytest.mark.slow
def test_measurements_are_kept_and_drawn(tmp_path, monkeypatch):
    setup = find_setup("enwik8", "micro")
    model = setup.model | {"d_model": 16, "n_heads": 2, "d_ff": 32}
    setup = replace(setup, model=model, data=replace(setup.data, block_size=24))
    for name, value in (("LENGTHS", (24,)), ("CHARACTERS", 48), ("HOURGLASS", "1@1 1@2 1@1"), ("EQUAL_DEPTH", "3@1")):
        monkeypatch.setattr(lengths, name, value)
    path = tmp_path / "lengths-micro"
    with pytest.raises(NoResults, match="no results yet"):
        rerender(path, lengths.render, lengths.draw)
    lengths.measure(setup, "micro", path, Signals())
    before = json.loads(path.with_suffix(".json").read_text())["points"]
    assert len(before) == 3
    for point in before:
        assert point["seconds"] > 0
        assert 1 <= point["bytes"] / point["predicted_bytes"] < 3
        assert 1 <= point["flops"] / point["predicted_flops"] < 1.5  # attention's scores again
    lengths.measure(setup, "micro", path, Signals())
    assert json.loads(path.with_suffix(".json").read_text())["points"] == before

    path.with_suffix(".png").unlink()
    rerender(path, lengths.render, lengths.draw)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["points"] == before
    assert path.with_suffix(".md").read_text().startswith(lengths.render(record))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"other settings \(model.d_ff: 32 -> 64\)"):
        lengths.measure(replace(setup, model=model | {"d_ff": 64}), "micro", path, Signals())


def test_a_report_without_measurements_raises_a_one_line_error(tmp_path):
    for flags, message in (
        ("--report", "there are no results yet"),
        ("--dataset=letters", "--lengths requires a text"),
    ):
        result = run_forked("ablate", "--lengths", "--scale=micro", flags, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_dry_run_measures_nothing(tmp_path):
    result = run_forked("ablate", "--lengths", "--scale=micro", "--dry_run", cwd=tmp_path)
    assert result.stdout.count("\n") == 2 + 3 * len(lengths.LENGTHS) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_points_of_another_machine_are_reported_but_not_extended(tmp_path):
    name, setup = "lengths-micro", find_setup("enwik8", "micro")
    committed = json.loads((EXPERIMENTS / "results/ablations" / f"{name}.json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps(committed | {"machine": "an abacus"}))
    rerender(tmp_path / name, lengths.render, lengths.draw)
    assert "Machine: an abacus" in (tmp_path / f"{name}.md").read_text()
    with pytest.raises(UsageError, match="machine: an abacus -> "):
        lengths.measure(setup, "micro", tmp_path / name, Signals())
