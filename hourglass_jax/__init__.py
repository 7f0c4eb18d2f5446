"""Hierarchical (Hourglass) character- and pixel-level language models in JAX/Flax.

    config = HourglassConfig(vocab_size=256, hierarchy="2@1 8@3 2@1")
    model = HourglassLM(config, rngs=nnx.Rngs(0))
    logits = model(tokens)  # int [B, L] -> [B, L, V]; logits[:, t] predicts token t + 1

Models      HourglassConfig, HourglassLM, Hourglass, Hierarchy, summary, check_causality, at_shorten_factor, group_ends
Extending   Shortening, Upsampling (subclass them), registry (register them)
Sequences   CharTokenizer, ByteTokenizer, ImageTokenizer, generate, init_cache
Training    fit, Hook, Run, DataConfig, OptimizerConfig, TrainConfig, RuntimeConfig
Saving      save, load, load_pretrained
Evaluation  evaluate, evaluate_sliding, score, Evaluation
Errors      UsageError, CausalityError
Modules     costs (FLOPs and memory of a configuration), registry (resampling methods by name), nn (the layers),
            data (corpora and batches), training (loop, checkpoints, devices), interop (weights of other projects)

Shapes: B batch, L length in tokens, V vocabulary, D d_model. Losses are in nats.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hourglass_jax.causality import CausalityError, check_causality
from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.generation import generate, init_cache
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.inspection import group_ends, summary
from hourglass_jax.model import Hourglass, HourglassLM
from hourglass_jax.nn.resampling import Shortening, Upsampling
from hourglass_jax.run_config import DataConfig, OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, ImageTokenizer
from hourglass_jax.transfer import at_shorten_factor

if TYPE_CHECKING:
    from hourglass_jax.evaluation import Evaluation, evaluate, evaluate_sliding, score
    from hourglass_jax.interop.safetensors import save
    from hourglass_jax.pretrained import load, load_pretrained
    from hourglass_jax.training.hooks import Hook
    from hourglass_jax.training.run import Run
    from hourglass_jax.training.trainer import fit

__version__ = "0.1.0"

__all__ = [
    "ByteTokenizer",
    "CausalityError",
    "CharTokenizer",
    "DataConfig",
    "Evaluation",
    "Hierarchy",
    "Hook",
    "Hourglass",
    "HourglassConfig",
    "HourglassLM",
    "ImageTokenizer",
    "OptimizerConfig",
    "Run",
    "RuntimeConfig",
    "Shortening",
    "TrainConfig",
    "Upsampling",
    "UsageError",
    "at_shorten_factor",
    "check_causality",
    "evaluate",
    "evaluate_sliding",
    "fit",
    "generate",
    "group_ends",
    "init_cache",
    "load",
    "load_pretrained",
    "save",
    "score",
    "summary",
]

_MODULES = ["costs", "data", "interop", "nn", "registry", "training"]

# Imported on first use, because orbax, grain and optax double the import time.
_LAZY = {
    "Evaluation": "evaluation",
    "Hook": "training.hooks",
    "Run": "training.run",
    "evaluate": "evaluation",
    "evaluate_sliding": "evaluation",
    "fit": "training.trainer",
    "load": "pretrained",
    "load_pretrained": "pretrained",
    "save": "interop.safetensors",
    "score": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hourglass_jax.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'hourglass_jax' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"hourglass_jax.{_LAZY[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    """Return the names for tab completion: only the public API."""
    return sorted([*__all__, *_MODULES, "__version__"])
