"""Seconds of a compiled program at best: for each kernel the longest of its products, its memory traffic, its messages.

An estimate, not a measurement. Kernels run one after another; nothing is cached between them and nothing overlaps,
collectives included; products reach a fixed share of the machine's peak. What occupancy, autotuning, power limits and
the host add is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments.accelerators.loops import trips
from experiments.accelerators.program import Instruction, Program
from experiments.accelerators.sources import COLLECTIVES, NAMES, is_recomputed, source_of
from experiments.accelerators.targets import Target
from experiments.accelerators.work import FUSED_ATTENTION, NO_WORK, Work

PRODUCTS, ATTENTION = 0.7, 0.5  # shares of the peak that products reach, alone and inside a fused attention kernel
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


class Kernel(NamedTuple):
    """One instruction that runs `launches` times a step; FLOPs, bytes and seconds are those of one launch."""

    name: str
    source: str
    launches: int
    flops: float
    memory_bytes: float
    link_bytes: float
    seconds: float
    bound: str  # products | memory | links | launch
    recomputed: bool
    stated: bool  # whether its FLOPs could be told
    cycles: int  # as a TPU's compiler counts them


class Total(NamedTuple):
    """Sums over kernels."""

    seconds: float
    launches: int
    flops: float
    memory_bytes: float
    link_bytes: float


def rate(target: Target, kind: str) -> float:
    """FLOP/s of products of a type, as far as they reach the peak."""
    if kind == FUSED_ATTENTION:
        return ATTENTION * target.flops["bfloat16"]
    return PRODUCTS * target.flops[kind]


class Roofline:
    """`kernels` of a program on one chip of the target; `unknown_loops`, whose length could not be told, count once."""

    def __init__(self, text: str, target: Target):
        self.target, self.program = target, Program(text)
        self.work = Work(self.program, target.chips)
        self.unknown_loops = 0
        self.kernels = list(self._walk(self.program.entry, 1))

    def _walk(self, name: str, times: int) -> Iterator[Kernel]:
        computation = self.program.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode in FREE or opcode.endswith(("-done", "-update")):
                continue
            if opcode == "while":
                [body] = instruction.called("body")
                n = trips(self.program, instruction, computation)
                self.unknown_loops += n is None
                yield from self._walk(body, times * (1 if n is None else n))
            elif opcode == "conditional":
                branches = instruction.called("branch_computations", "true_computation", "false_computation")
                choices = [list(self._walk(branch, times)) for branch in branches]
                yield from max(choices, key=lambda kernels: total(kernels).seconds)
            elif opcode in ("call", "async-start"):
                for called in instruction.called("to_apply", "calls", "called_computation"):
                    yield from self._walk(called, times)
            elif opcode != "custom-call" or instruction.text("custom_call_target") not in NO_WORK:
                yield self.kernel(instruction, name, times)

    def kernel(self, instruction: Instruction, name: str, times: int) -> Kernel:
        computation, target = self.program.computations[name], self.target
        flops = self.work.flops(instruction, computation)
        moved = self.work.memory_bytes(instruction, computation)
        sent = self.work.link_bytes(instruction, computation)
        bounds = {
            "products": sum(n / rate(target, kind) for kind, n in flops.items()),
            "memory": moved / target.bandwidth,
            "links": sent / target.links if sent else 0.0,
            "launch": target.launch,
        }
        bound = max(bounds, key=lambda kind: bounds[kind])
        alone = sent and not flops
        return Kernel(
            name=instruction.name,
            source=COLLECTIVES if alone else source_of(self.program, instruction, computation),
            launches=times,
            flops=sum(flops.values()),
            memory_bytes=moved,
            link_bytes=sent,
            seconds=bounds[bound],
            bound=bound,
            recomputed=is_recomputed(self.program, instruction),
            stated=bool(flops) or not is_opaque(instruction),
            cycles=int((re.findall(r'"estimated_cycles":"(\d+)"', instruction.attributes) or [0])[0]),
        )

    def breakdown(self) -> dict[str, Total]:
        """By source, those that there are; they add up to the whole."""
        by_source = {source: [kernel for kernel in self.kernels if kernel.source == source] for source in NAMES}
        return {source: total(kernels) for source, kernels in by_source.items() if kernels}

    def bounds(self) -> Mapping[str, float]:
        """Seconds by what bounds them."""
        seconds: Counter[str] = Counter()
        for kernel in self.kernels:
            seconds[kernel.bound] += kernel.seconds * kernel.launches
        return seconds

    def compiler_seconds(self) -> float | None:
        """What the compiler's own cycles come to, where it counts them."""
        cycles = sum(kernel.cycles * kernel.launches for kernel in self.kernels)
        return cycles / self.target.clock if cycles and self.target.clock else None


def is_opaque(instruction: Instruction) -> bool:
    """Whether it is a kernel of Pallas, into which nothing here can look."""
    target = instruction.text("custom_call_target")
    return instruction.opcode == "custom-call" and ("triton" in target or target == "tpu_custom_call")


def total(kernels: Sequence[Kernel]) -> Total:
    return Total(
        seconds=sum(kernel.seconds * kernel.launches for kernel in kernels),
        launches=sum(kernel.launches for kernel in kernels),
        flops=sum(kernel.flops * kernel.launches for kernel in kernels),
        memory_bytes=sum(kernel.memory_bytes * kernel.launches for kernel in kernels),
        link_bytes=sum(kernel.link_bytes * kernel.launches for kernel in kernels),
    )
