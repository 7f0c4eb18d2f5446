"""Device mesh with two axes.

axis   shards
data   batches
fsdp   batches, and each array of parameters and optimizer state along its longest divisible dimension

XLA derives all communication from the shardings, so the same training step runs on one device and on many processes.
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
    """Return a data x fsdp mesh of `devices` (default: all). Raises UsageError unless the product is their number."""
    found = np.array(jax.devices() if devices is None else devices)
    data = len(found) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(found):
        raise UsageError(
            f"data={config.data} x fsdp={config.fsdp} does not match the number of devices, {len(found)}; choose data "
            f"and fsdp with the product {len(found)}"
        )
    return Mesh(found.reshape(data, config.fsdp), ("data", "fsdp"))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raise UsageError unless batch_size is a multiple of the number of devices times `accumulate`."""
    if batch_size % (mesh.size * accumulate):
        parts = "" if accumulate == 1 else f" with accumulate={accumulate}"
        raise UsageError(
            f"batch_size={batch_size} cannot be divided among {mesh.size} devices{parts}; choose a multiple of "
            f"{mesh.size * accumulate}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return a sharding for each array of `state`; arrays without a divisible dimension are replicated."""

    def sharding(leaf: Any) -> NamedSharding:
        divisible = [n if n % mesh.shape["fsdp"] == 0 else 0 for n in leaf.shape]
        spec: list[str | None] = [None] * len(divisible)
        if mesh.shape["fsdp"] > 1 and any(divisible):
            spec[int(np.argmax(divisible))] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, state)


def abstract(tree: Any, shardings: Any) -> Any:
    """Return `tree` with a jax.ShapeDtypeStruct for each array."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def on_one_device(tree: Any) -> Any:
    """Return `abstract(tree)` with all arrays on the first device of this process."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return abstract(tree, jax.tree.map(lambda _: sharding, tree))


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Return the indices of the rows of a batch that belong to this process, in the order of its devices."""
    index_map = sharding.addressable_devices_indices_map((batch_size,))
    rows = [index[0] for index in index_map.values() if index]
    return np.concatenate([np.arange(batch_size)[part] for part in sorted(rows, key=lambda part: part.start or 0)])


def place(batch: tuple[np.ndarray, ...], sharding: NamedSharding, batch_size: int) -> tuple[jax.Array, ...]:
    """Return global arrays of `batch_size` rows from the rows of this process."""
    return tuple(
        jax.make_array_from_process_local_data(sharding, part, (batch_size, *part.shape[1:])) for part in batch
    )


def gather(tree: Any) -> Any:
    """Gather sharded arrays on the first device of this process; all processes must call it."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_put(tree, jax.local_devices()[0])


def any_process(flag: bool) -> bool:
    """Return whether `flag` is set in any process; all processes must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
