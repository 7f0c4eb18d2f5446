"""Hierarchical (Hourglass) character- and pixel-level language models in JAX/Flax."""

from hourglass_jax.causality import CausalityError, check_causality, influence
from hourglass_jax.config import DataConfig, HourglassConfig, OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.decoding import generate, init_cache
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import Evaluation, evaluate, evaluate_sliding, score
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.model import Hourglass, HourglassLM
from hourglass_jax.summary import summary
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer
from hourglass_jax.training.checkpoints import load

__version__ = "0.1.0"

__all__ = [
    "ByteTokenizer",
    "CausalityError",
    "CharTokenizer",
    "DataConfig",
    "Evaluation",
    "Hierarchy",
    "Hourglass",
    "HourglassConfig",
    "HourglassLM",
    "OptimizerConfig",
    "RuntimeConfig",
    "TrainConfig",
    "UsageError",
    "check_causality",
    "evaluate",
    "evaluate_sliding",
    "generate",
    "influence",
    "init_cache",
    "load",
    "score",
    "summary",
]
