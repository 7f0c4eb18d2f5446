"""Hierarchical (Hourglass) character- and pixel-level language models in JAX/Flax.

    config = HourglassConfig(vocab_size=256, hierarchy="2@1 8@3 2@1")
    model = HourglassLM(config, rngs=nnx.Rngs(0))
    logits = model(tokens)  # int [B, L] -> [B, L, V]; logits[:, t] predicts token t + 1

Models      HourglassConfig, HourglassLM, Hourglass, Hierarchy, summary, check_causality, influence,
            at_shorten_factor, boundaries
Sequences   CharTokenizer, ByteTokenizer, ImageTokenizer, generate, init_cache
Figures     evaluate, evaluate_sliding, score, Evaluation
Runs        load, load_pretrained, Run, DataConfig, OptimizerConfig, TrainConfig, RuntimeConfig
Errors      UsageError, CausalityError
Modules     costs (FLOPs and memory of a configuration), registry (add a resampling method), nn (the layers),
            data (corpora and batches), training (loop, checkpoints, devices), interop (weights of other projects)

Shapes: B batch, L length in tokens, V vocabulary, D d_model. Losses are in nats.
"""

from hourglass_jax.causality import CausalityError, check_causality, influence
from hourglass_jax.config import HourglassConfig
from hourglass_jax.cuts import boundaries
from hourglass_jax.decoding import generate, init_cache
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import Evaluation, evaluate, evaluate_sliding, score
from hourglass_jax.factors import at_shorten_factor
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.model import Hourglass, HourglassLM
from hourglass_jax.pretrained import load_pretrained
from hourglass_jax.run_config import DataConfig, OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.summary import summary
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, ImageTokenizer
from hourglass_jax.training.run import Run, load

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
    "ImageTokenizer",
    "OptimizerConfig",
    "Run",
    "RuntimeConfig",
    "TrainConfig",
    "UsageError",
    "at_shorten_factor",
    "boundaries",
    "check_causality",
    "evaluate",
    "evaluate_sliding",
    "generate",
    "influence",
    "init_cache",
    "load",
    "load_pretrained",
    "score",
    "summary",
]

_MODULES = ["costs", "data", "interop", "nn", "registry", "training"]


def __dir__() -> list[str]:
    """What tab completion offers; other modules are there to import, and not the place to start."""
    return sorted([*__all__, *_MODULES, "__version__"])
