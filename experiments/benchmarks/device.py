"""What a run does on an accelerator: its kernels from JAX's profiler, and the bandwidth of its memory."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.accelerators.targets import find_target, known_targets

KINDS = {  # of kernels by name, the first that matches
    "attention, forward": r"forward_tile|fprop",
    "attention, gradient of queries": r"query_tile",
    "attention, gradient of keys and values": r"key_tile",
    "attention, gradient of lags": r"lag_tile",
    "attention, backward (cuDNN)": r"bprop|sdpa|fmha",
    "matrix products": r"gemm|dot|cutlass|nvjet|cublas|splitK",
    "copies and transposes": r"copy|transpose|memcpy|memset",
    "softmax, norms and other reductions": r"reduce|softmax",
    "other fusions": r"fusion",
}
TOP = 12  # slowest kernels that a row keeps


class Kernel(NamedTuple):
    """A kernel by name, with its launches and their total time."""

    name: str
    launches: int
    seconds: float


def kernels_of(run: Callable[[], Any]) -> list[Kernel]:
    """Run under the profiler, and return the kernels on the accelerator, slowest first; none on a CPU.

    `run` must block until the device is done.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        files = list(Path(directory).rglob("*.xplane.pb"))
        return [kernel for file in files for kernel in read(jax.profiler.ProfileData.from_file(str(file)).planes)]


def read(planes: Iterable[Any]) -> list[Kernel]:
    """Return the kernels in the streams of a profile's devices, slowest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for plane in planes:
        for line in plane.lines if plane.name.startswith("/device:") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                times[event.name].append(event.duration_ns * 1e-9)
    found = [Kernel(name, len(each), sum(each)) for name, each in times.items()]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def launched(kernels: Sequence[Kernel], calls: int = 1) -> dict[str, Any]:
    """Return the number of launches a call and the slowest kernels of `calls` calls, for a row."""
    launches = sum(kernel.launches for kernel in kernels) / calls
    return {"launches": launches, "kernels": [kernel._asdict() for kernel in kernels[:TOP]]}


def by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Return seconds by kind, in the order of `KINDS`."""
    seconds = dict.fromkeys([*KINDS, "rest"], 0.0)
    for kernel in kernels:
        kind = next((kind for kind, words in KINDS.items() if re.search(words, kernel.name, re.IGNORECASE)), "rest")
        seconds[kind] += kernel.seconds
    return {kind: total for kind, total in seconds.items() if total}


def memory_bandwidth() -> float | None:
    """Return the bytes/s of this GPU's memory as the vendor states it; None if unknown."""
    for target in map(find_target, known_targets()):
        if target.kind in jax.devices()[0].device_kind:
            return target.compiler.get("memory_bandwidth")
    return None
