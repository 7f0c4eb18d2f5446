"""Machines to compile for, a text file each in targets/: what XLA must know of them, and their rates.

A name is that of a file, h100, with the number of chips as 8xh100 or v5e-16. To add a machine, add a file.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from hourglass_jax import UsageError
from hourglass_jax.ranges import check_choice

DIRECTORY = Path(__file__).with_name("targets")
# What the compiler of a platform comes with: packages of which one will do, and the extra that brings it.
COMPILERS = {"gpu": (("jax-cuda12-plugin", "jax-cuda13-plugin"), "cuda"), "tpu": (("libtpu",), "tpu")}
FIELDS = {"title", "kind", "platform", "memory", "bandwidth", "links", "launch", "flops", "slices"}


@dataclass(frozen=True)
class Target:
    """`chips` of one kind, linked.

    name, title: as asked for, and the maker's.
    kind: what stands in the name that JAX gives such a device.
    platform: gpu | tpu.
    memory: bytes of a chip.
    bandwidth: bytes/s of that memory.
    links: bytes/s that a chip sends to others.
    launch: seconds that a kernel takes at least.
    flops: FLOP/s of matrix products, dense, by type.
    topology: what XLA calls so many chips.
    clock: cycles a second, in which a TPU's compiler counts; 0: it does not.
    compiler: fields of XLA's description of a GPU; empty for a TPU, which its compiler knows.
    """

    name: str
    title: str
    kind: str
    platform: str
    chips: int
    memory: float
    bandwidth: float
    links: float
    launch: float
    flops: Mapping[str, float]
    topology: str
    clock: float = 0.0
    compiler: Mapping[str, Any] = field(default_factory=dict)

    def devices(self) -> Sequence[jax.Device]:
        """That can be compiled for and not run on. Raises UsageError where the platform's compiler is missing."""
        packages, extra = COMPILERS[self.platform]
        if not any(map(is_installed, packages)):
            raise UsageError(
                f"--target={self.name} needs a compiler that is not installed: pip install -e '.[{extra}]'"
            )
        if self.platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=self.topology,
            target_config=gpu_description(f"NVIDIA {self.kind}", self.compiler),
        ).devices


def is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def known_targets() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.toml"))


def find_target(name: str) -> Target:
    """By its name; raises UsageError for a machine or a number of chips that there is none of."""
    found = re.fullmatch(r"(?:(?P<n>[1-9]\d*)x)?(?P<kind>\w+?)(?:-(?P<size>[1-9]\d*))?", name)
    counted_once = found and not (found["n"] and found["size"])
    kind, size = (found["kind"], found["n"] or found["size"]) if counted_once else (name, None)
    check_choice("target", kind, known_targets())
    path = DIRECTORY / f"{kind}.toml"
    fields = read_fields(path)
    slices = fields.pop("slices")
    size = size or next(iter(slices))
    if size not in slices:
        raise UsageError(f"--target={name}: {kind} comes as {', '.join(slices)}; {path.name} lists them as slices")
    chips = count_chips(slices[size])
    return Target(name=name, chips=chips, topology=slices[size], **fields)


def target_of(device_kind: str) -> Target | None:
    """One chip of the kind that JAX calls so, the closest name; None where no file describes it."""
    kinds = {name: read_fields(DIRECTORY / f"{name}.toml")["kind"] for name in known_targets()}
    found = [name for name, kind in kinds.items() if kind in device_kind]
    return dataclasses.replace(find_target(max(found, key=lambda n: len(kinds[n]))), chips=1) if found else None


def read_fields(path: Path) -> dict[str, Any]:
    """Of a target's file; raises UsageError where it is no TOML or lacks a field."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML ({error}); see the other files beside it") from error
    if lacking := sorted(FIELDS - fields.keys()):
        raise UsageError(f"{path}: lacks {', '.join(lacking)}; see the other files beside it")
    if unknown := sorted(fields.keys() - FIELDS - {"clock", "compiler"}):
        raise UsageError(f"{path}: knows nothing of {', '.join(unknown)}; see the other files beside it")
    check_choice(f"{path}: platform", fields["platform"], tuple(COMPILERS))
    return fields


def count_chips(topology: str) -> int:
    """Of 1x1x8 or v5e:4x4."""
    chips = 1
    for n in topology.rpartition(":")[2].split("x"):
        chips *= int(n)
    return chips


def gpu_description(device: str, fields: Mapping[str, Any]) -> str:
    """XLA's GpuTargetConfigProto as text; by `device`, from JAX 0.11 on, Pallas knows the device."""
    lines = []
    for name, value in fields.items():
        inner = " ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else ""
        lines.append(f"{name} {{ {inner} }}" if inner else f"{name}: {value}")
    info = "\n  ".join(lines)
    return f'gpu_device_info {{\n  {info}\n}}\nplatform_name: "CUDA"\ndevice_description_str: "{device}"\n'
