"""Devices as a mesh of two axes.

axis   what it divides
data   batches
fsdp   batches, and every array of the parameters and the optimiser state along its longest divisible dimension

XLA derives all communication from where the arrays lie, so one training step serves one device, many, and many
processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from hourglass_jax.errors import UsageError
from hourglass_jax.run_config import RuntimeConfig


def make_mesh(config: RuntimeConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes, or `devices`, as data x fsdp. Raises UsageError where their number does not fit."""
    found = np.array(jax.devices() if devices is None else devices)
    data = len(found) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(found):
        raise UsageError(
            f"data={config.data} x fsdp={config.fsdp} devices asked for, but there are {len(found)}; "
            f"choose factors of {len(found)}"
        )
    return Mesh(found.reshape(data, config.fsdp), ("data", "fsdp"))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises UsageError unless the devices and the parts of an accumulated batch divide it."""
    if batch_size % (mesh.size * accumulate):
        parts = "" if accumulate == 1 else f" in accumulate={accumulate} parts"
        raise UsageError(
            f"batch_size={batch_size} cannot be divided among {mesh.size} devices{parts}; choose a multiple of "
            f"{mesh.size * accumulate}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """For each array of `state` the sharding described above; arrays with no divisible dimension are copied."""

    def sharding(leaf: Any) -> NamedSharding:
        divisible = [n if n % mesh.shape["fsdp"] == 0 else 0 for n in leaf.shape]
        spec: list[str | None] = [None] * len(divisible)
        if mesh.shape["fsdp"] > 1 and any(divisible):
            spec[int(np.argmax(divisible))] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, state)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, types and places of `tree`'s arrays, without the arrays."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def on_one_device(tree: Any) -> Any:
    """As `abstract`, all on this process's first device."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return abstract(tree, jax.tree.map(lambda _: sharding, tree))


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold, in their order."""
    index_map = sharding.addressable_devices_indices_map((batch_size,))
    rows = [index[0] for index in index_map.values() if index]
    return np.concatenate([np.arange(batch_size)[part] for part in sorted(rows, key=lambda part: part.start or 0)])


def place(batch: tuple[np.ndarray, ...], sharding: NamedSharding, batch_size: int) -> tuple[jax.Array, ...]:
    """This process's rows of each array -> the global arrays of `batch_size` rows."""
    return tuple(
        jax.make_array_from_process_local_data(sharding, part, (batch_size, *part.shape[1:])) for part in batch
    )


def gather(tree: Any) -> Any:
    """Sharded arrays -> whole ones on this process's first device; all processes must take part."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_put(tree, jax.local_devices()[0])


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; all must take part."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
