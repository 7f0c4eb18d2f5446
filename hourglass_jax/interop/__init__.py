"""Import and export: PyTorch checkpoints of two projects, safetensors, StableHLO."""

from hourglass_jax.interop.safetensors import export_safetensors, import_safetensors
from hourglass_jax.interop.stablehlo import export_stablehlo
from hourglass_jax.interop.torch import from_original, from_pypi

__all__ = ["export_safetensors", "export_stablehlo", "from_original", "from_pypi", "import_safetensors"]
