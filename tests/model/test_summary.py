"""The summary's lines add up to what costs.py counts, and a model prints as one line."""

import re

import jax
import pytest
from conftest import EVERY_HIERARCHY, make_model, small_config
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.costs import count_parameters, forward_flops
from hourglass_jax.inspection import summary_rows


def abstract(config):
    return nnx.eval_shape(lambda: hg.HourglassLM(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "norm": "final", "shortening": "linear"}])
@pytest.mark.parametrize("hierarchy", EVERY_HIERARCHY)
def test_summary_rows_add_up_to_the_total(hierarchy, options):
    config = small_config(hierarchy=hierarchy, **options)
    *parts, total = summary_rows(abstract(config), 50)
    assert sum(row.parameters for row in parts) == total.parameters == count_parameters(config)
    assert sum(row.flops for row in parts) == pytest.approx(total.flops)
    assert total.flops == sum(forward_flops(config, 50).values())
    assert [row.length for row in parts[1:-1]] == list(config.parsed_hierarchy.lengths(50))
    assert all(row.parameters > 0 for row in parts)


def test_each_level_row_counts_its_layers_and_resampling():
    def levels(**options):
        return list(summary_rows(abstract(small_config(hierarchy="1@1 4@3 1@1", **options)), 50))[1:-2]

    plain, linear_down, linear_up = (
        [row.parameters for row in levels(shortening=down, upsampling=up)]
        for down, up in (("average", "repeat"), ("linear", "repeat"), ("average", "linear"))
    )
    assert [a - b for a, b in zip(linear_down, plain, strict=True)] == [0, 3 * 16 * 16 + 16]
    assert [a - b for a, b in zip(linear_up, plain, strict=True)] == [3 * 16 * 16 + 3 * 16, 0]
    assert [row.layers for row in levels()] == ["1 + 1", "4"]


def test_a_model_and_its_configuration_have_the_same_table():
    config = small_config()
    table = hg.summary(config, 30)
    assert hg.summary(make_model(config), 30) == table != hg.summary(config)
    first, attention, *lines = table.splitlines()
    assert attention == "attention: auto = blocked, cpu, float32, head_dim 8, relative positions"
    assert first == repr(abstract(config)) and len({len(line) for line in lines}) == 1
    assert f"{count_parameters(config):,}" in lines[-1]
    assert "30" in lines[-1].split() and "10" in lines[-3].split()
    assert hg.summary(config).splitlines()[-1].split()[1] == "64"  # max_length


def test_an_optimizer_adds_a_line_with_its_cost():
    config = small_config()
    for optimizer, flops, n_arrays in (
        (hg.OptimizerConfig(), "0.0", 2),
        (hg.OptimizerConfig(ema=0.9), "0.0", 3),
        (hg.OptimizerConfig("muon"), r"[1-9]\d*\.\d", None),
    ):
        table, line = hg.summary(config, 30, optimizer=optimizer).rsplit("\n", 1)
        assert table == hg.summary(config, 30)
        found = re.fullmatch(rf"optimizer: {optimizer.optimizer}, {flops} MFLOPs a step, (\d\.\d) MB of state", line)
        assert n_arrays is None or float(found[1]) == pytest.approx(
            n_arrays * 4e-6 * count_parameters(config), abs=0.06
        )


def test_an_invalid_length_raises_a_one_line_error():
    with pytest.raises(hg.UsageError, match="length=0 is out of range"):
        hg.summary(small_config(), 0)
    with pytest.raises(hg.UsageError, match=r"length=65 is out of range.*at most 64"):
        hg.summary(small_config(positions="learned"), 65)


@pytest.mark.parametrize("build", [make_model, abstract])
def test_models_print_as_one_line(build):
    model = build(small_config(hierarchy="1@1 2@3 0@1"))
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    for module, words in (
        (model, f"vocab_size=11, .*: {n_parameters:,} parameters"),
        (model.hourglass, "'1@1 2@3 0@1'"),
    ):
        for text in (repr(module), str(module), repr([module])):
            assert len(text) < 200 and len(text.splitlines()) == 1
            assert re.search(words, text)
    assert repr(model.hourglass.inner).startswith("Hourglass('2@3', d_model=16): ")
