"""Save and load models as a directory with safetensors, without optimizer state or executable code.

model.safetensors   parameters by the names of `interop.parameters`
config.json         format version, model configuration, tokenizer
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

    tokenizer: None for a model without one.

    Raises UsageError unless `directory` is empty or absent, and for a tokenizer whose size differs from the model's.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config)
    with whole_directory(Path(directory)) as temporary:
        save_file(named_parameters(model), temporary / WEIGHTS, metadata={"format": "flax"})
        (temporary / WEIGHTS).chmod(0o644)  # save_file makes it private
        Run(temporary).write(Record(model.config, tokenizer, settings={}, history=[]))


def export_safetensors(model: HourglassLM, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Save a model and its tokenizer, which is required; see `save`."""
    if tokenizer is None:
        raise UsageError("tokenizer is None; give a tokenizer, such as hg.ByteTokenizer()")
    save(directory, model, tokenizer)


def import_safetensors(directory: str | Path) -> tuple[HourglassLM, Tokenizer, HourglassConfig]:
    """Load what `export_safetensors` saved -> (model, tokenizer, config); parameters are bit-identical.

    Raises UsageError for missing and damaged files, and for tensors that do not match the configuration.
    """
    run = Run(directory)
    config, tokenizer, _, _ = run.read()
    path = run.directory / WEIGHTS
    if tokenizer is None:
        raise UsageError(f"{run}: has no tokenizer; give a directory that export_safetensors saved")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a directory that export_safetensors saved")
    try:
        tensors = load_file(path)
    except Exception as error:  # damaged files raise many types
        raise UsageError(f"{path}: not a safetensors file, or damaged ({error})") from error
    return build_model(config, tensors, path), tokenizer, config
