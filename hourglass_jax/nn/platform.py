"""The platform that a program is traced for; it can differ from the one that traces."""

from __future__ import annotations

import jax


def platform() -> str:
    """Return cpu, gpu or tpu: that of the current mesh, of `jax.default_device`, or the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device or getattr(jax.config, "jax_default_device", None)
    name = device if isinstance(device, str) else getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def n_devices() -> int:
    """Return the number of devices that a batch can be sharded over."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else mesh.size


def on_one_cpu() -> bool:
    """Return whether one CPU computes the whole batch, so that the batch can be split into parts."""
    return platform() == "cpu" and n_devices() == 1
