"""Training with learned boundaries: what is reported, the rate reached, curves, going on, launchers; their costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import learned_config, make_model, tokens_of
from flax import nnx
from launching import run

import hourglass_jax as hg
from experiments.common.cuts import check_groups
from hourglass_jax.costs import count_parameters, forward_flops
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.training import hooks, metrics
from hourglass_jax.training.step import first_state, make_train_step
from hourglass_jax.training.trainer import fit


def test_reported_loss_excludes_the_boundary_loss_and_rates_converge():
    config = learned_config(hierarchy="0@1 1@4 0@1", boundary_weight=30.0)
    graph, params = nnx.split(make_model(config))
    optimizer = optax.adam(1e-2)
    step, state = make_train_step(graph, optimizer, seed=0), first_state(params, optimizer)
    tokens, weights = tokens_of((8, 33)), jnp.ones((8, 32))
    loss = -nnx.jit(hg.score)(nnx.merge(graph, params), tokens).mean()
    forward = nnx.jit(lambda model, tokens: model.forward_with_aux(tokens)[1:])
    added, figures = forward(nnx.merge(graph, params), tokens[:, :-1])
    assert float(added) == pytest.approx(0.9 * float(figures["boundary_loss"]))
    records = []
    for _ in range(60):
        state, values = step(state, tokens, weights)
        records.append({name: float(value) for name, value in values.items()})
    first, *_, last = records
    assert first["train_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert all(first[name] == pytest.approx(float(value), rel=1e-5, abs=1e-7) for name, value in figures.items())
    assert abs(first["boundary_rate"] - 0.25) > 0.1 > 2 * abs(last["boundary_rate"] - 0.25)
    assert last["train_loss"] < first["train_loss"]
    assert step._cache_size() == 1  # one program, wherever the text was cut


@pytest.mark.parametrize("boundaries", [pytest.param("router", marks=pytest.mark.slow), "gumbel"])
def test_accumulated_batches_have_the_boundaries_of_the_whole_batch(boundaries):
    """And their noise, of whole and parts alike; other noise, of another seed, is noticed."""
    config = learned_config(boundaries, hierarchy="0@1 1@4 0@1", boundary_weight=0.0)
    names = ("train_loss", "boundary_rate", "boundary_suppressed", "gradient_norm")

    def measured(seed, accumulate):
        graph, params = nnx.split(make_model(config))
        optimizer = optax.sgd(1.0)
        step = make_train_step(graph, optimizer, seed=seed, accumulate=accumulate)
        values = step(first_state(params, optimizer), tokens_of((8, 33)), jnp.ones((8, 32)))[1]
        return [float(values[name]) for name in names]

    whole, *others = measured(0, 1), measured(0, 2), measured(1, 2)
    same = [parts == pytest.approx(whole, rel=1e-4, abs=1e-6) for parts in others]
    assert same == [True, boundaries == "router"]  # which draws nothing


def train(directory, steps, hierarchy="0@1 1@3 0@1", boundaries="gumbel"):
    config = learned_config(boundaries, hierarchy=hierarchy, shortening="average", upsampling="repeat")
    model, text = make_model(config), np.tile(np.arange(8), 100)
    schedule = {"schedule": "constant", "warmup_steps": 0}
    arguments = {"optimizer_config": hg.OptimizerConfig(**schedule), "train_config": hg.TrainConfig(steps=steps)}
    fit(model, random_windows(text, 16, 4, seed=0), consecutive_windows(text, 16, 4)[:2], directory, **arguments)
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize(
    "level, options",
    [
        ("", {}),
        pytest.param("_2", {"hierarchy": "0@1 0@2 1@4 0@2 0@1", "boundaries": "fixed gumbel"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_has_curves_of_its_events_and_a_warning_where_they_find_no_room(tmp_path, monkeypatch, level, options):
    warnings = []
    monkeypatch.setattr(hooks, "MAX_SUPPRESSED", -1.0)
    monkeypatch.setattr(hooks.logging, "warning", lambda text, *values: warnings.append(text % values))
    train(tmp_path, 10, **options)
    [record] = [record for record in metrics.read_curves(tmp_path) if "train_loss" in record]
    curves = {"boundary_rate", "boundary_spread", "boundary_suppressed", "boundary_loss"}
    assert {name for name in record if name.startswith("boundary")} == {name + level for name in curves}
    drawn = []
    plot_rates = metrics.plot_rates
    monkeypatch.setattr(metrics, "plot_rates", lambda axes, records: [plot_rates(axes, records), drawn.append(axes)])
    metrics.plot_curves(tmp_path)
    [axes] = drawn
    names = f"boundary_rate{level}", f"boundary_suppressed{level}"
    assert [line.get_ydata()[0] for line in axes.lines] == [record[name] for name in names]
    [warning] = warnings
    assert warning.startswith(f"{100 * record[f'boundary_suppressed{level}']:.1f} % of the boundaries are suppressed")


def test_a_batch_without_an_event_that_counts_ends_no_training(tmp_path):
    resampling = {"shortening": "average", "upsampling": "repeat"}
    model = make_model(learned_config("tokens", hierarchy="0@1 1@3 0@1", boundary_tokens=(9,), **resampling))
    text = np.tile(np.arange(8), 100)
    batches = random_windows(text, 16, 4, seed=0)

    def but_the_first(step, rows=slice(None)):
        tokens, weights = batches(step, rows)
        return tokens, np.where(np.arange(16) == 0, 0, weights).astype(np.float32)

    configs = {"optimizer_config": hg.OptimizerConfig(), "train_config": hg.TrainConfig(steps=10)}
    fit(model, but_the_first, consecutive_windows(text, 16, 4)[:2], tmp_path, **configs)
    [record] = [record for record in metrics.read_curves(tmp_path) if "train_loss" in record]
    assert record["boundary_rate"] == 0


def test_the_warning_comes_where_training_ends_early_too(tmp_path, monkeypatch):
    """What is learned makes the text that it is validated on, the same backwards, less and less likely."""
    warnings = []
    monkeypatch.setattr(hooks, "MAX_SUPPRESSED", -1.0)
    monkeypatch.setattr(hooks.logging, "warning", lambda text, *values: warnings.append(text % values))
    config = learned_config("gumbel", hierarchy="0@1 1@3 0@1", shortening="average", upsampling="repeat")
    text = np.tile(np.arange(8), 100)
    fit(
        make_model(config, scale=1.0),
        random_windows(text, 16, 4, seed=0),
        consecutive_windows(text[::-1], 16, 4)[:2],
        tmp_path,
        optimizer_config=hg.OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0),
        train_config=hg.TrainConfig(steps=200, eval_interval=10, patience=1),
    )
    ends, room = warnings
    assert "without a better one" in ends and "are suppressed for lack of room" in room


def test_one_event_in_a_hundred_may_wait_in_silence(caplog):
    """In training, and in the text that pretraining looks at first."""
    hook = hooks.WarnOfSuppression(learned_config())
    options = {"hierarchy": "0@1 1@4 0@1", "shortening": "average", "upsampling": "repeat", "boundary_slack": 1.0}
    model = make_model(learned_config("tokens", boundary_tokens=(0,), **options))
    text, weights = np.ones((4, 65), int), np.ones((4, 64))
    for crowded in (False, True):
        caplog.clear()
        hook.on_log(1, {"boundary_loss": 1.0, "boundary_suppressed": 0.011 if crowded else 0.009})
        hook.on_end(None)
        text[:, :: 2 if crowded else 4] = 0
        check_groups(model, text, weights)
        assert len(caplog.records) == 2 * crowded


@pytest.mark.slow
def test_a_run_with_boundary_noise_resumes_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", 20)
    train(tmp_path / "parts", 10)
    for one, other in zip(whole, train(tmp_path / "parts", 20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_parameters_and_products_of_boundaries_are_counted():
    options = {"hierarchy": "1@1 1@3 1@1", "shortening": "average", "d_ff": 32, "boundary_tokens": (0,)}
    d_model = 16
    given, routed, predicted = (learned_config(name, **options) for name in ("whitespace", "router", "gumbel"))
    assert count_parameters(routed) - count_parameters(given) == 2 * d_model**2
    assert count_parameters(predicted) - count_parameters(given) == d_model * 32 + 32 + 32 + 1
    flops = [forward_flops(config, 48) for config in (given, routed, predicted)]
    assert flops[1][1] - flops[0][1] == 48 * 2 * 2 * d_model**2 and flops[1][3] == flops[0][3]
    assert flops[2][1] - flops[0][1] == pytest.approx(48 * 2 * (d_model * 32 + 32))


def test_a_negative_boundary_weight_raises_an_error():
    with pytest.raises(hg.UsageError, match=r"boundary_weight=-1.* is out of range"):
        learned_config(boundary_weight=-1.0)


@pytest.mark.launchers
@pytest.mark.slow
@pytest.mark.parametrize("boundaries", ["router", "gumbel", "entropy"])
def test_launchers_train_and_generate_with_learned_boundaries(boundaries, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 20)
    flags = ["--hierarchy=1@1 1@3 1@1", "--d_model=16", "--n_heads=2", "--d_ff=16", "--block_size=24", "--batch_size=4"]
    flags += ["--steps=2", "--data_path=text.txt", "--shortening=select", "--upsampling=smooth"]
    result = run("pretrain", *flags, f"--boundaries={boundaries}", "--model.boundary_weight=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "causal: yes" in result.stdout and result.stdout.count(", groups of ") == 2  # before training and after
    result = run("generate", "--load_model_path=runs/pretrain", "--max_tokens=20", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
