"""Save and load models as a directory with safetensors, without optimizer state or executable code.

model.safetensors   parameters by the names of `interop.parameters`
config.json         format version, model configuration, tokenizer
vocab.json          characters and their tokens (character models)
README.md           the model card, with the metadata of the Hugging Face Hub
"""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file, save_file

from hourglass_jax.checks import check_tokenizer
from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.evaluation import Evaluation
from hourglass_jax.files import whole_directory, write_whole
from hourglass_jax.interop.card import CARD, model_card
from hourglass_jax.interop.parameters import build_model, named_parameters
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import Tokenizer
from hourglass_jax.training.run import Record, Run

WEIGHTS = "model.safetensors"


def save(
    directory: str | Path,
    model: HourglassLM,
    tokenizer: Tokenizer | None = None,
    *,
    license: str | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Write a model, its tokenizer and a model card to a new directory, which `load` reads and the Hub takes.

    tokenizer: None for a model without one.
    license: the Hub's identifier of a license, such as apache-2.0, for the card.
    evaluation: figures for the card, such as those of `evaluate` on a test text.

    Raises UsageError unless `directory` is empty or absent, and for a tokenizer whose size differs from the model's.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config)
    name = Path(directory).expanduser().resolve().name
    with whole_directory(Path(directory)) as temporary:
        save_file(named_parameters(model), temporary / WEIGHTS, metadata={"format": "flax"})
        (temporary / WEIGHTS).chmod(0o644)  # save_file makes it private
        Run(temporary).write(Record(model.config, tokenizer, settings={}, history=[]))
        write_whole(temporary / CARD, model_card(name, model, tokenizer, license, evaluation))


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
