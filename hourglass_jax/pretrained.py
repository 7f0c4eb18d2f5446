"""Pretrained weights that ship with the package, in bfloat16: one directory per name.

model.safetensors       parameters, named as in `interop.parameters`; if the metadata names another model here as
                        `base`, only the parameters that differ from it
config.json, vocab.json as in a run directory, with the training settings
README.md               the model card
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.files import whole_directory, write_whole
from hourglass_jax.interop.card import CARD
from hourglass_jax.interop.hub import local_path
from hourglass_jax.interop.parameters import build_model, named_parameters
from hourglass_jax.interop.safetensors import WEIGHTS
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import Tokenizer
from hourglass_jax.training.identity import PATHS
from hourglass_jax.training.run import Record, Run, load_run

SHIPPED = Path(__file__).parent / "weights"


def pretrained_names(directory: str | Path = SHIPPED) -> list[str]:
    """Return the names of the available models."""
    return sorted(path.parent.name for path in Path(directory).expanduser().glob(f"*/{WEIGHTS}"))


def pretrained_path(name: str, directory: str | Path = SHIPPED) -> Path:
    """Return the directory of a model, which is a run directory for `Run`. Raises UsageError for an unknown name."""
    names = pretrained_names(directory)
    if name not in names:
        raise UsageError(f"no pretrained model is named {name!r}; available models: {', '.join(names) or 'none'}")
    return Path(directory).expanduser() / name


def load(
    path: str | Path, step: int | None = None, *, revision: str | None = None
) -> tuple[HourglassLM, Tokenizer | None, HourglassConfig]:
    """Load a run directory, or a directory that `save` wrote -> (model, tokenizer, config).

    path: a directory, or `hf:user/name` for a repository on the Hugging Face Hub, which requires the extra [hub].
    step: the checkpoint of a run to load; see `RuntimeConfig.keep_checkpoints`. Default: the one of lowest validation
        loss.
    revision: a branch, tag or commit of the repository; default: main.

    The model is on the first device and in evaluation mode: no dropout until `model.train()`. The tokenizer is None
    for a model on plain tokens.

    Raises UsageError if `path` is not such a directory, has no complete checkpoint (of `step`), is damaged, or does not
    match its vocabulary; and if a repository or revision does not exist, or is neither cached nor reachable.
    """
    path = local_path(path, revision)
    run = Run(path)
    if run.has_checkpoints or not (run.directory / WEIGHTS).is_file():
        return load_run(path, step)
    if step is not None:
        raise UsageError(f"{path}: contains one model without steps; leave out step={step}")
    return _load_weights(run.directory)


def load_pretrained(
    name: str, *, directory: str | Path = SHIPPED
) -> tuple[HourglassLM, Tokenizer | None, HourglassConfig]:
    """Load a model that ships with the package -> (model, tokenizer, config); see `load`.

    directory: another directory with such models. Raises UsageError for an unknown name, and for damaged files.
    """
    return _load_weights(pretrained_path(name, directory))


def _load_weights(path: Path) -> tuple[HourglassLM, Tokenizer | None, HourglassConfig]:
    config, tokenizer, _, _ = Run(path).read()
    tensors = {name: tensor.astype(np.float32) for name, tensor in _read(path).items()}
    return build_model(config, tensors, path / WEIGHTS), tokenizer, config


def save_pretrained(
    model: HourglassLM, record: Record, card: str, directory: str | Path, *, base: str | None = None
) -> None:
    """Write a model to `directory`. Raises UsageError unless it is empty or absent.

    record: configuration, tokenizer and settings of the model's run; paths are reduced to their last names.
    base: the name of a model beside `directory`. Parameters that are equal in bfloat16 are stored only there. Raises
        UsageError if the base has parameters that this model lacks.
    """
    directory = Path(directory).expanduser()
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in named_parameters(model).items()}
    if base:
        shared = _read(pretrained_path(base, directory.parent))
        if foreign := sorted(shared.keys() - tensors.keys()):
            raise UsageError(
                f"base={base!r} has {foreign[0]}, which this model lacks; give the model it was trained from, or none"
            )
        tensors = {name: own for name, own in tensors.items() if not _same(own, shared.get(name))}
    with whole_directory(directory) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "flax"} | ({"base": base} if base else {}))
        (temporary / WEIGHTS).chmod(0o644)  # save_file makes it private
        Run(temporary).write(record._replace(settings=without_places(record.settings)))
        write_whole(temporary / CARD, card)


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with each path reduced to its last name, which hides the directories of the machine."""

    def shorter(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_places(value)
        if name in (*PATHS, "directory") and isinstance(value, str):
            return ",".join(PurePath(path).name for path in value.split(","))
        return value

    return {name: shorter(name, value) for name, value in settings.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a model, including those that only its base stores."""
    try:
        with safe_open(path / WEIGHTS, "numpy") as file:
            own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            base = (file.metadata() or {}).get("base")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path / WEIGHTS}: not a safetensors file, or damaged ({error})") from error
    return _read(pretrained_path(base, path.parent)) | own if base else own


def _same(own: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and own.shape == other.shape and own.tobytes() == other.tobytes()
