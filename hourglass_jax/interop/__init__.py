"""Import and export of weights: PyTorch checkpoints of two projects, and safetensors."""

from hourglass_jax.interop.safetensors import export_safetensors, import_safetensors
from hourglass_jax.interop.torch import from_original, from_pypi

__all__ = ["export_safetensors", "from_original", "from_pypi", "import_safetensors"]
