"""Nothing is lost: damaged checkpoints, signals at any moment, a loss that is not finite, a full disk."""

import itertools
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from conftest import light_config, make_model
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.files import write_whole
from hourglass_jax.training import checkpoints, trainer
from hourglass_jax.training.checkpoints import CHECKPOINTS, CheckpointStore
from hourglass_jax.training.metrics import CurveWriter, plot_curves, read_curves
from hourglass_jax.training.sharding import on_one_device
from hourglass_jax.training.signals import Interrupted, Signals
from hourglass_jax.training.trainer import fit

TOKENS = np.tile(np.arange(3, 11), 300).astype(np.int32)
CONFIG = light_config(dropout=0.1)
BATCHES = random_windows(TOKENS, 16, 8, seed=0)


def train(directory, batch_at=BATCHES, *, steps=20, learning_rate=1e-2, signals=None, sample=None, **runtime):
    run = hg.Run(directory)
    run.start(CONFIG, hg.CharTokenizer("abcdefgh"))
    model = make_model(CONFIG, scale=1.0)
    fit(
        model,
        batch_at,
        consecutive_windows(TOKENS[:200], 16, 4),
        run,
        optimizer_config=hg.OptimizerConfig(learning_rate=learning_rate, warmup_steps=5),
        train_config=hg.TrainConfig(steps=steps, eval_interval=10),
        runtime_config=hg.RuntimeConfig(**runtime),
        signals=signals,
        sample=sample,
    )
    return last_state(directory)


def last_state(directory):
    """The newest whole checkpoint's step and parameters."""
    store = CheckpointStore(directory)
    step = store.sound_step()
    params = nnx.state(nnx.eval_shape(lambda: hg.HourglassLM(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
    params = store.restore(step, params=on_one_device(params))["params"]
    store.close()
    return step, params


def assert_same(first, second):
    assert first[0] == second[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run's directory and last state."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, train(directory, checkpoint_interval=5)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def newest(directory):
    return max((directory / CHECKPOINTS).iterdir(), key=lambda path: int(path.name))


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != checkpoints.MANIFEST)


def flip_bit(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def caplog(caplog):
    handler = caplog.handler
    logging.get_absl_logger().addHandler(handler)
    yield caplog
    logging.get_absl_logger().removeHandler(handler)


@pytest.mark.parametrize("harm", [flip_bit, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "remove"])
def test_damage_to_any_checkpoint_file_is_detected(copy, harm):
    step = newest(copy)
    assert len(files(step)) > 4 and not checkpoints.damage(step)
    for path in files(step):
        before = path.read_bytes()
        if before or harm not in (flip_bit, truncate):
            harm(path)
            assert str(path.relative_to(step)) in checkpoints.damage(step)
            path.write_bytes(before)
    assert not checkpoints.damage(step)


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(copy, whole, caplog):
    flip_bit(max(files(newest(copy)), key=lambda path: path.stat().st_size))
    assert CheckpointStore(copy).sound_step() == 15
    assert any("step 20" in message and "has changed" in message for message in warnings_of(caplog))
    assert_same(train(copy), whole[1])  # goes on from step 15, and ends as the uninterrupted run


def test_without_the_manifest_a_flipped_bit_becomes_a_wrong_number(copy, monkeypatch):
    _, right = last_state(copy)
    monkeypatch.setattr("hourglass_jax.training.checkpoints.damage", lambda directory: "")

    def silently_wrong(path, place):
        before = path.read_bytes()
        flip_bit(path, place)
        try:
            _, params = last_state(copy)
        except Exception:  # orbax does notice some
            return False
        finally:
            path.write_bytes(before)
        return any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, right)), strict=True))

    places = itertools.product(np.linspace(0.05, 0.95, 10), files(newest(copy) / "params"))
    assert any(silently_wrong(path, place) for place, path in places)


def test_a_checkpoint_without_a_manifest_is_skipped(copy):
    (newest(copy) / checkpoints.MANIFEST).unlink()
    assert CheckpointStore(copy).sound_step() == 15


def test_a_run_killed_before_its_first_manifest_restarts(copy, whole, caplog):
    for step in (copy / CHECKPOINTS).iterdir():
        if step.name != "15":
            shutil.rmtree(step)
    (newest(copy) / checkpoints.MANIFEST).unlink()
    with pytest.raises(hg.UsageError, match="no checkpoint yet"):
        hg.load(copy)
    assert_same(train(copy), whole[1])
    assert any("step 15: it is incomplete" in message for message in warnings_of(caplog))


def test_a_partly_deleted_checkpoint_does_not_block_training(copy, whole):
    *_, last = removed = files(newest(copy))
    for path in removed:
        path.unlink()
        if path != last:
            assert CheckpointStore(copy, for_training=True).sound_step() == 15
    assert_same(train(copy), whole[1])


class Killed(BaseException):
    """Like a kill, not caught by anything."""


@pytest.mark.parametrize("started", [False, True], ids=["first start", "going on"])
@pytest.mark.parametrize("at", range(3), ids=["vocabulary", "configuration", "curves"])
def test_a_run_killed_at_any_write_of_its_start_can_start_again(at, started, tmp_path, monkeypatch):
    def start(step):
        hg.Run(tmp_path).start(CONFIG, hg.CharTokenizer("abcdefgh"), {"seed": 0})
        return CurveWriter(tmp_path, step)

    def dying(path, target):
        written.append(target)
        if len(written) > at:
            raise Killed
        replace(path, target)

    replace, written, curve = Path.replace, [], [{"step": 1, "train_loss": 2.0}] if started else []
    if started:
        start(0).write(1, train_loss=2.0)
    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(Killed):
        start(1)
    monkeypatch.undo()
    start(1)
    assert read_curves(tmp_path) == curve


def test_an_interrupted_overwrite_can_be_repeated(copy, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        hg.Run(copy).start(CONFIG, overwrite=True)
    monkeypatch.undo()
    hg.Run(copy).start(CONFIG, overwrite=True)
    assert sorted(path.name for path in copy.iterdir()) == ["config.json", "lock"]


def test_only_damaged_checkpoints_are_a_clear_error(copy):
    for step in (copy / CHECKPOINTS).iterdir():
        truncate(max(files(step), key=lambda path: path.stat().st_size))
    for use in (lambda: train(copy), lambda: hg.load(copy)):
        with pytest.raises(hg.UsageError, match="all checkpoints are damaged"):
            use()


MOMENTS = {  # what is about to be called when the signal comes, for which time, and which step may then be saved
    "start": (trainer, "stream", 1, {0}),
    "compilation": (trainer.jax, "jit", 1, {0}),
    "step": (trainer.sharding, "place", 7, {7}),
    "evaluation": (trainer, "evaluate_batches", 1, {10}),
    "save": (CheckpointStore, "save", 1, {5}),
    "seal": (CheckpointStore, "_seal", 1, {5, 6, 7}),  # in another thread
    "last evaluation": (trainer._Training, "take_best_parameters", 1, {20}),
}


RARE = ("start", "compilation", "step", "evaluation", "seal", "last evaluation", "sample")


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=[pytest.mark.slow] * (name in RARE)) for name in (*MOMENTS, "sample")]
)
def test_a_signal_at_any_moment_leaves_a_valid_checkpoint_to_resume_from(moment, tmp_path, whole, monkeypatch):
    owner, name, at, saved = MOMENTS.get(moment, (None, None, 1, {5}))
    signals, calls = Signals(), []

    def come():
        calls.append(moment)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)

    def sample(model):
        if moment == "sample":
            come()
        signals.check()
        return "text"

    if owner:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: (come(), original(*args, **options))[1])
    with signals, pytest.raises(Interrupted, match="SIGTERM"):
        train(tmp_path, signals=signals, sample=sample, sample_interval=5, checkpoint_interval=5)
    assert len(calls) >= at and last_state(tmp_path)[0] in saved
    monkeypatch.undo()
    assert_same(train(tmp_path), whole[1])


def test_a_time_limit_stops_the_run():
    Signals(60).check()
    with pytest.raises(Interrupted, match="stopped by the time limit"):
        Signals(0).check()


def test_a_second_signal_interrupts_at_once():
    with Signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_non_finite_loss_stops_and_keeps_the_last_valid_checkpoint(tmp_path):
    def poisoned(step, rows=slice(None)):
        tokens, weights = BATCHES(step, rows)
        return tokens, weights * (np.nan if step == 13 else 1)

    with pytest.raises(hg.UsageError, match=r"step 14: .* is nan, on batch 13 .* seed 0; the last good .* step 10"):
        train(tmp_path, poisoned, checkpoint_interval=5)
    step, params = last_state(tmp_path)
    assert step == 10 and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@contextmanager
def largest_file(n_bytes):
    """No file may grow beyond this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_raises_an_error_and_keeps_earlier_checkpoints(copy):
    before = last_state(copy)
    shutil.rmtree(newest(copy))
    with (
        largest_file(4096),
        pytest.raises(
            hg.UsageError, match=r"step 20 could not be written .* earlier checkpoints are intact: free disk space"
        ),
    ):
        train(copy)
    assert last_state(copy)[0] == 15
    assert_same(train(copy), before)


def test_a_full_disk_ends_no_run_while_its_checkpoints_can_be_written(tmp_path, whole, monkeypatch, caplog):
    """Each file beside them is one warning, with its name."""
    secondary = ("metrics.jsonl", "events.out", "samples.png", "loss.png")

    def opened(path, mode="r", *args, **options):
        full = mode in ("ab", "xb") and path.name.startswith(secondary)
        return open_file(Path("/dev/full") if full else path, "wb" if full else mode, *args, **options)

    def sample(model):
        write_whole(tmp_path / "samples.png", b"a picture")

    def stop_trace():
        stop()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    open_file, stop = Path.open, jax.profiler.stop_trace
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop_trace)
    options = {"sample": sample, "sample_interval": 5, "checkpoint_interval": 5, "profile_steps": "3:4"}
    assert_same(train(tmp_path, **options), whole[1])
    plot_curves(tmp_path)
    for name in (*secondary, "profile"):
        [warning] = {text for text in warnings_of(caplog) if text.startswith(f"{tmp_path}/") and name in text}
        assert "the run continues without it" in warning


def test_curves_are_whole_again_once_a_full_disk_has_room(tmp_path, caplog):
    curves = CurveWriter(tmp_path)
    with largest_file(200):
        for step in range(1, 10):
            curves.write(step, train_loss=step / 3)
            curves.write_text(step, "a sample")
    curves.write(10, train_loss=1.0)
    curves.close()
    assert [record["step"] for record in read_curves(tmp_path) if "train_loss" in record] == [*range(1, 11)]
    [path] = (tmp_path / "tensorboard").iterdir()
    events, steps = path.read_bytes(), []
    while events:
        end = 12 + int.from_bytes(events[:8], "little")
        steps += [Event.FromString(events[12:end]).step]
        events = events[end + 4 :]
    assert steps == [0, 1, *sorted([*range(1, 10)] * 2), 10]
    assert len(set(warnings_of(caplog))) == 2


def test_a_validation_loss_that_cannot_be_stored_names_its_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hourglass_jax.training.checkpoints.add_facts", full)
    with pytest.raises(hg.UsageError, match=r"the checkpoint of step 10 could not be written .*: free disk space"):
        train(tmp_path)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(copy, monkeypatch):
    shutil.rmtree(newest(copy))
    before = sorted((copy / CHECKPOINTS).rglob("*"))
    disk = shutil.disk_usage(copy)._replace(free=1_000)
    monkeypatch.setattr("hourglass_jax.training.checkpoints.disk_usage", lambda path: disk)
    with pytest.raises(hg.UsageError, match=r"step 20 requires 0 MB, but the disk has 0 MB left"):
        train(copy)
    assert sorted((copy / CHECKPOINTS).rglob("*")) == before
