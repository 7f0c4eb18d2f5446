"""The model of the CPU suites, in this library and in the PyPI package hourglass-transformer-pytorch; and the timer."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from hourglass_jax import HourglassConfig, UsageError

Name = TypeVar("Name", bound=Hashable)
SIZES = {"vocab_size": 256, "hierarchy": "2@1 4@4 2@1", "d_model": 256, "n_heads": 8, "d_ff": 1024}
# `learned` is the peer's architecture; `relative` is this library's default.
METHODS = {
    "learned": {"shortening": "attention_average", "upsampling": "attention_repeat", "positions": "learned"},
    "relative": {"shortening": "attention_average", "upsampling": "attention_linear", "positions": "relative"},
}
PEER = "hourglass-transformer-pytorch"


def config(name: str, **options: Any) -> HourglassConfig:
    return HourglassConfig(**SIZES, **METHODS[name], **options)


def find_peer() -> Any:
    """Return the peer's module. Raises UsageError if it is not installed."""
    try:
        import hourglass_transformer_pytorch.hourglass_transformer_pytorch as peer
    except ImportError as error:
        raise UsageError(f"{error}; pip install -e '.[bench]', or give --nopeer") from None
    peer.math = math  # the peer uses math without importing it
    return peer


def make_peer(max_length: int) -> Any:
    """Return the peer's language model at the same sizes, a torch module."""
    return find_peer().HourglassTransformerLM(
        num_tokens=256,
        dim=256,
        max_seq_len=max_length,
        depth=(2, 4, 2),
        shorten_factor=4,
        heads=8,
        dim_head=32,
    )


def in_turn(
    runs: Mapping[Name, Callable[[], Any]],
    repeats: int,
    *,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Return the seconds of `repeats` calls of each run; the runs take turns, since a machine's speed drifts.

    An additional first round is not counted.
    warm: an untimed call precedes each timed one, so that its data is in the caches.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if warm:
                run()
            started = clock()
            run()
            if repeat:
                seconds[name].append(clock() - started)
        print(f"round {repeat} of {repeats} done", file=sys.stderr, flush=True)
    return seconds
