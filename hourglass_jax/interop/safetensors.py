"""Models as safetensors: a directory to share, without code to run and without a training's state.

model.safetensors   parameters, named as in `interop.parameters`
config.json         as of a run directory: format version, model configuration, tokenizer; no settings
vocab.json          characters and their tokens (character models)
"""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file, save_file

from hourglass_jax.checks import check_tokenizer
from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.files import whole_directory
from hourglass_jax.interop.parameters import build_model, named_parameters
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import Tokenizer
from hourglass_jax.training.run import Record, Run

WEIGHTS = "model.safetensors"


def save(directory: str | Path, model: HourglassLM, tokenizer: Tokenizer | None = None) -> None:
    """Write a model and its tokenizer to a new directory, which `load` reads: parameters, configuration, vocabulary.

    tokenizer: None for a model of bare tokens.

    Raises UsageError unless `directory` is empty or absent, and for a tokenizer of another size than the model's.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config)
    with whole_directory(Path(directory)) as temporary:
        save_file(named_parameters(model), temporary / WEIGHTS, metadata={"format": "flax"})
        (temporary / WEIGHTS).chmod(0o644)  # it is to be shared
        Run(temporary).write(Record(model.config, tokenizer, settings={}, history=[]))


def export_safetensors(model: HourglassLM, tokenizer: Tokenizer, directory: str | Path) -> None:
    """As `save`, but raises UsageError where there is no tokenizer."""
    if tokenizer is None:
        raise UsageError("tokenizer is None, as of a run of bare tokens; give one, such as hg.ByteTokenizer()")
    save(directory, model, tokenizer)


def import_safetensors(directory: str | Path) -> tuple[HourglassLM, Tokenizer, HourglassConfig]:
    """What `export_safetensors` wrote -> (model, tokenizer, config), bit for bit.

    Raises UsageError where files or tensors are missing, damaged, left over, or do not fit the configuration.
    """
    run = Run(directory)
    config, tokenizer, _, _ = run.read()
    path = run.directory / WEIGHTS
    if tokenizer is None:
        raise UsageError(f"{run}: says nothing of its tokens; give a directory that was exported as safetensors")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a directory that was exported as safetensors")
    try:
        tensors = load_file(path)
    except Exception as error:  # of many kinds, as the damage
        raise UsageError(f"{path}: not a safetensors file, or damaged ({error})") from error
    return build_model(config, tensors, path), tokenizer, config
