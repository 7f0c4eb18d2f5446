"""Training: it learns, resumes exactly, and its run directories load."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import forward, make_model, small_config
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.metrics import read_curves
from hourglass_jax.training.optimizer import describe_schedule, learning_rate_schedule, make_optimizer
from hourglass_jax.training.sharding import on_one_device
from hourglass_jax.training.step import TrainState, make_train_step
from hourglass_jax.training.trainer import fit

TOKENS = np.tile(np.arange(3, 11), 300).astype(np.int32)
CONFIG = small_config(hierarchy="0@1 1@3 0@1", dropout=0.1)
OPTIMIZER = hg.OptimizerConfig(learning_rate=1e-2, warmup_steps=5)


def train(directory, batch_at=None):
    run = hg.Run(directory)
    run.start(CONFIG, hg.CharTokenizer("abcdefgh"))
    model = make_model(CONFIG, scale=1.0)
    result = fit(
        model,
        batch_at or random_windows(TOKENS, 16, 4, seed=0),
        consecutive_windows(TOKENS[:200], 16, 4),
        run,
        optimizer_config=OPTIMIZER,
        train_config=hg.TrainConfig(steps=60, eval_interval=20),
    )
    return model, result


class Killed(Exception):
    pass


def batches_that_end(at):
    def batch_at(step, rows=slice(None)):
        if step >= at:
            raise Killed
        return random_windows(TOKENS, 16, 4, seed=0)(step, rows)

    return batch_at


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from its first step to its last: where, the model, the result."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, *train(directory)


@pytest.mark.core
def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path):
    directory, trained, result = whole
    with pytest.raises(Killed):
        train(tmp_path / "killed", batches_that_end(at=50))
    assert CheckpointStore(tmp_path / "killed").sound_step() in (20, 40)
    resumed, resumed_result = train(tmp_path / "killed")
    assert result == resumed_result
    jax.tree.map(np.testing.assert_array_equal, nnx.state(trained), nnx.state(resumed))
    losses, resumed_losses = (
        {r["step"]: r["train_loss"] for r in read_curves(run) if "train_loss" in r}
        for run in (directory, tmp_path / "killed")
    )
    assert losses == resumed_losses


@pytest.mark.core
def test_training_learns_and_the_directory_loads(whole):
    directory, trained, result = whole
    assert result.loss < 0.2  # a cycle of eight letters
    model, tokenizer, config = hg.load(directory)
    assert config == CONFIG and tokenizer.characters == list("abcdefgh")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(trained), nnx.state(model))
    assert hg.evaluate(model, TOKENS[:200], block_size=16, batch_size=4).loss == pytest.approx(result.loss, rel=1e-6)


def test_load_restores_the_best_step(tmp_path):
    hg.Run(tmp_path).start(CONFIG, hg.CharTokenizer("abcdefgh"))
    store = CheckpointStore(tmp_path)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        params = nnx.state(make_model(CONFIG, seed=step), nnx.Param)
        store.save(step, params, {"count": jnp.zeros(())}, loss)
    store.close()
    model, _, _ = hg.load(tmp_path)
    best = make_model(CONFIG, seed=2)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(best), nnx.state(model))
    assert CheckpointStore(tmp_path).sound_step() == 3


def edit(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / "config.json").unlink(), "not a checkpoint directory of this library"),
        (lambda d: (d / "config.json").write_text("{"), "not a configuration of this library"),
        (lambda d: edit(d / "config.json", format_version=99), "format version 99"),
        (lambda d: edit(d / "config.json", model={"vocab_size": 3, "colour": "red"}), "not a configuration"),
        (lambda d: (d / "vocab.json").unlink(), "not a configuration of this library"),
        (lambda d: hg.CharTokenizer("abc").save(d / "vocab.json"), "vocabulary has 6 tokens"),
        (lambda d: shutil.rmtree(d / "checkpoints"), "contains no checkpoint"),
    ],
)
def test_damaged_run_directories_raise_errors_that_name_the_file(whole, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    damage(copy)
    with pytest.raises(hg.UsageError, match=message):
        hg.load(copy)


def test_schedules():
    def schedule(name):
        return learning_rate_schedule(hg.OptimizerConfig(learning_rate=1.0, schedule=name, warmup_steps=10), 110)

    for name in ("cosine", "inverse_sqrt", "constant"):
        np.testing.assert_allclose([schedule(name)(s) for s in (0, 5, 10)], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose([schedule("cosine")(s) for s in (60, 110)], [0.5, 0], atol=1e-6)
    np.testing.assert_allclose([schedule("inverse_sqrt")(s) for s in (40, 90)], [0.5, 1 / 3], atol=1e-6)
    assert schedule("constant")(90) == 1


def test_wsd_is_a_constant_rate_with_a_decay_over_the_last_fifth_or_the_given_steps():
    config = hg.OptimizerConfig(learning_rate=0.3, schedule="wsd", warmup_steps=10)
    for decay_steps, length in ((0, 22), (40, 40)):
        wsd = dataclasses.replace(config, decay_steps=decay_steps)
        constant = dataclasses.replace(config, schedule="constant", decay_steps=length)
        rates, expected = (
            [float(learning_rate_schedule(each, 110)(step)) for step in range(111)] for each in (wsd, constant)
        )
        assert rates == expected
        assert describe_schedule(wsd, 110) == describe_schedule(constant, 110)
    assert describe_schedule(config, 110) == "10 warmup steps to 0.3, then constant, falling to 0 over the last 22"


@pytest.mark.parametrize("name", ["cosine", "inverse_sqrt", "constant"])
def test_a_decay_is_a_line_to_0_over_the_last_steps_of_any_schedule(name):
    config = hg.OptimizerConfig(learning_rate=0.3, schedule=name, warmup_steps=10)
    stable, decayed = (
        [float(learning_rate_schedule(dataclasses.replace(config, decay_steps=n), 110)(s)) for s in range(111)]
        for n in (0, 40)
    )
    assert decayed[:71] == stable[:71]
    np.testing.assert_allclose(decayed[70:], np.multiply(stable[70:], np.linspace(1, 0, 41)), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("positions", ["relative", "learned"])
def test_weight_decay_applies_only_to_linear_kernels(positions):
    params = nnx.state(make_model(small_config(positions=positions)), nnx.Param)
    config = hg.OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    nothing = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params):
        updates, _ = optimizer.update(nothing, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    moved = nnx.to_flat_state(step(params))
    kinds = {True: set(), False: set()}
    for (path, before), (_, after) in zip(nnx.to_flat_state(params), moved, strict=True):
        kinds[path[-1] == "kernel"].add(path[-1])
        factor = 0.95 if path[-1] == "kernel" else 1
        np.testing.assert_allclose(after[...], before[...] * factor, rtol=1e-6)
    own = {"relative": {"content_bias", "position_bias"}, "learned": {"positions"}}[positions]
    assert kinds == {True: {"kernel"}, False: {"bias", "scale", "embedding"} | own}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_checkpoint_of_plain_adamw_restores_into_the_masked_optimizer(tmp_path, weight_decay, clip_norm):
    """Early versions saved the state of `optax.adamw`; without decay its updates are the same bit for bit."""
    params = nnx.state(make_model(CONFIG).head, nnx.Param)
    config = hg.OptimizerConfig(weight_decay=weight_decay, clip_norm=clip_norm)
    schedule = learning_rate_schedule(config, 10)
    before = optax.adamw(schedule, config.beta1, config.beta2, config.eps, weight_decay=weight_decay)
    if clip_norm:
        before = optax.chain(optax.clip_by_global_norm(clip_norm), before)
    optimizer, (_, state) = make_optimizer(config, 10), before.update(params, before.init(params), params)
    store = CheckpointStore(tmp_path)
    store.save(1, params, state)
    store.wait()
    restored = store.restore(1, opt_state=on_one_device(optimizer.init(params)))["opt_state"]
    store.close()
    assert jax.tree.structure(restored) == jax.tree.structure(optimizer.init(params))
    updates = [restored, state]
    if not weight_decay:
        updates = [before.update(params, state, params), optimizer.update(params, restored, params)]
    for new, old in zip(*map(jax.tree.leaves, updates), strict=True):
        np.testing.assert_array_equal(new, old)


def test_evaluation_reports_one_loss_three_ways():
    result = hg.Evaluation(loss=np.log(4), n_characters=10)
    assert result.bits_per_character == pytest.approx(2)
    assert result.perplexity == pytest.approx(4)


def test_evaluation_equals_a_loop_over_windows():
    model = make_model(CONFIG)
    text = np.random.default_rng(0).integers(0, 11, 50)
    losses = []
    for start in range(0, 49, 16):
        window = text[start : start + 17]
        padded = np.zeros((1, 16), int)
        padded[0, : len(window) - 1] = window[:-1]  # padding comes later: no prediction sees it
        logits = np.asarray(forward(model, padded)[0, : len(window) - 1], np.float64)
        for row, target in zip(logits, window[1:], strict=True):
            losses.append(np.log(np.exp(row).sum()) - row[target])
        np.testing.assert_allclose(nnx.jit(hg.score)(model, window[None])[0], -np.array(losses[start:]), rtol=1e-4)
    result = hg.evaluate(model, text, block_size=16, batch_size=3)
    assert result.n_characters == len(losses) == 49
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.core
@pytest.mark.parametrize(
    "accumulate", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)]
)
def test_accumulated_gradients_equal_the_large_batch(accumulate):
    config = small_config(hierarchy="0@1 1@3 0@1", dtype="float64")
    tokens = np.random.default_rng(0).integers(0, 11, (6, 13))
    weights = np.random.default_rng(1).random((6, 12))  # parts of unequal weight
    steps = []
    with jax.enable_x64(True):
        for parts in (1, accumulate):
            graph, params = nnx.split(make_model(config))
            optimizer = optax.sgd(1.0)
            state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
            steps.append(make_train_step(graph, optimizer, seed=0, accumulate=parts)(state, tokens, weights))
    for whole, parts in zip(*map(jax.tree.leaves, steps), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-8)
