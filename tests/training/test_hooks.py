"""Hooks of `fit`: which events they see, and how they end training."""

import pytest
from test_run import assert_same, losses, train

import hourglass_jax as hg


class Watch(hg.Hook):
    """Record the events, and end training after step `last`."""

    def __init__(self, last=0):
        self.events, self.last = [], last

    def after_step(self, step, metrics):
        self.events.append(("step", step, float(metrics["train_loss"])))
        self.stop = "enough" if step == self.last else ""

    def on_log(self, step, metrics):
        self.events.append(("log", step, metrics["train_loss"]))

    def on_checkpoint(self, step):
        self.events.append(("checkpoint", step))

    def on_evaluation(self, step, metrics):
        self.events.append(("evaluation", step, metrics["valid_loss"]))

    def on_end(self, error):
        self.events.append(("end", type(error)))


def test_a_hook_sees_every_event_of_training(tmp_path):
    watch = Watch()
    train(tmp_path, hooks=[watch], runtime={"checkpoint_interval": 5})
    names = [event[:2] for event in watch.events if event[0] != "step"]
    assert names == [
        *[("checkpoint", 5), ("log", 10), ("checkpoint", 10), ("evaluation", 10), ("checkpoint", 15)],
        *[("log", 20), ("checkpoint", 20), ("evaluation", 20), ("end", type(None))],
    ]
    assert [step for name, step, *_ in watch.events if name == "step"] == [*range(1, 21)]
    logged = [event[1:] for event in watch.events if event[0] in ("log", "evaluation")]
    assert sorted(logged) == sorted(losses(tmp_path))


def test_a_hook_ends_training_with_a_checkpoint_and_an_evaluation(tmp_path):
    watch = Watch(last=7)
    train(tmp_path / "run", hooks=[watch])
    assert watch.events[-4:] == [
        ("log", 7, watch.events[-5][2]),
        ("checkpoint", 7),
        ("evaluation", 7, losses(tmp_path / "run")[-1][1]),
        ("end", type(None)),
    ]
    resumed, _ = train(tmp_path / "run")  # without the hook
    whole, _ = train(tmp_path / "whole")
    assert_same(resumed, whole)


def test_a_hook_learns_why_training_ended(tmp_path):
    class Broken(hg.Hook):
        def after_step(self, step, metrics):
            raise MemoryError

        def on_end(self, error):
            raise RuntimeError("from a hook")

    watch = Watch()
    with pytest.raises(RuntimeError, match="from a hook"):
        train(tmp_path, hooks=[Broken(), watch], steps=1)
    assert watch.events == [("end", MemoryError)]
