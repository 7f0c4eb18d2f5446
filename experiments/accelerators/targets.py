"""Machines to compile for, one TOML file each in targets/: the description that XLA requires, and peak rates.

A target's name is the name of its file, with the number of chips as in 8xh100 or v5e-16. To add a target, add a file.
"""

from __future__ import annotations

import math
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
# By platform: the packages that contain its compiler, one of which suffices, and the extra that installs it.
COMPILERS = {"gpu": (("jax-cuda12-plugin", "jax-cuda13-plugin"), "cuda"), "tpu": (("libtpu",), "tpu")}
FIELDS = {"title", "kind", "platform", "memory", "flops", "topologies"}


@dataclass(frozen=True)
class Target:
    """`chips` linked chips of one kind.

    name, title: as given on the command line; the vendor's.
    kind: part of JAX's device_kind.
    platform: gpu | tpu.
    memory: bytes per chip.
    flops: peak FLOP/s of dense matrix products per chip, by dtype.
    topology: XLA's name of that many chips.
    compiler: fields of XLA's description of a GPU; empty for a TPU, whose compiler includes them.
    """

    name: str
    title: str
    kind: str
    platform: str
    chips: int
    memory: float
    flops: Mapping[str, float]
    topology: str
    compiler: Mapping[str, Any] = field(default_factory=dict)

    def devices(self) -> Sequence[jax.Device]:
        """Return devices to compile for, without hardware. Raises UsageError if the platform's compiler is missing."""
        packages, extra = COMPILERS[self.platform]
        if not any(map(is_installed, packages)):
            raise UsageError(
                f"--target={self.name} requires a compiler that is not installed: pip install -e '.[{extra}]'"
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
    """Return the target of that name. Raises UsageError for an unknown machine or number of chips."""
    found = re.fullmatch(r"(?:(?P<n>[1-9]\d*)x)?(?P<kind>\w+?)(?:-(?P<size>[1-9]\d*))?", name)
    counted_once = found and not (found["n"] and found["size"])
    kind, size = (found["kind"], found["n"] or found["size"]) if counted_once else (name, None)
    check_choice("target", kind, known_targets())
    path = DIRECTORY / f"{kind}.toml"
    fields = read_fields(path)
    sizes = fields.pop("topologies")
    size = size or next(iter(sizes))
    if size not in sizes:
        raise UsageError(
            f"--target={name}: {kind} is available as {', '.join(sizes)}; choose one, or add a size to {path.name}"
        )
    chips = math.prod(map(int, sizes[size].rpartition(":")[2].split("x")))  # of 1x1x8 or v5e:4x4
    return Target(name=name, chips=chips, topology=sizes[size], **fields)


def read_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a target's file. Raises UsageError if it is not TOML, or has other fields."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML ({error}); see the other files beside it") from error
    faults = {"lacks": FIELDS - fields.keys(), "has unknown": fields.keys() - FIELDS - {"compiler"}}
    for words, names in faults.items():
        if names:
            raise UsageError(f"{path}: {words} fields {', '.join(sorted(names))}; see the other files beside it")
    check_choice(f"{path}: platform", fields["platform"], tuple(COMPILERS))
    return fields


def gpu_description(device: str, fields: Mapping[str, Any]) -> str:
    """Return XLA's GpuTargetConfigProto as text; from JAX 0.11 on, Pallas identifies the GPU by `device`."""
    lines = []
    for name, value in fields.items():
        inner = " ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else ""
        lines.append(f"{name} {{ {inner} }}" if inner else f"{name}: {value}")
    info = "\n  ".join(lines)
    return f'gpu_device_info {{\n  {info}\n}}\nplatform_name: "CUDA"\ndevice_description_str: "{device}"\n'
