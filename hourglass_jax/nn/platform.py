"""For which machine a program is traced: asked here alone, since it may be another than the one that traces."""

from __future__ import annotations

import jax


def platform() -> str:
    """cpu, gpu or tpu: that of the mesh in use where it has devices, or of `jax.default_device`, or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device or getattr(jax.config, "jax_default_device", None)
    name = device if isinstance(device, str) else getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def n_devices() -> int:
    """Among how many devices a batch may be divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else mesh.size


def on_one_cpu() -> bool:
    """Whether one CPU has the whole batch, which then may be taken in parts."""
    return platform() == "cpu" and n_devices() == 1
