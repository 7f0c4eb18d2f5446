"""Weights from and for other projects: PyTorch checkpoints of two of them, and safetensors."""

from hourglass_jax.interop.original import from_original
from hourglass_jax.interop.pypi import from_pypi
from hourglass_jax.interop.safetensors import export_safetensors, import_safetensors

__all__ = ["export_safetensors", "from_original", "from_pypi", "import_safetensors"]
