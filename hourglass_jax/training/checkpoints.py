"""Run directories: config.json, the vocabulary, and orbax checkpoints of parameters and optimiser state.

config.json   format version, model configuration, tokenizer, the settings of the run
vocab.json    characters and their tokens (character models)
checkpoints/  one folder a step, written by orbax's CheckpointManager
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

FORMAT_VERSION = 1
CONFIG, VOCABULARY, CHECKPOINTS = "config.json", "vocab.json", "checkpoints"


def write_run(directory: Path, config: HourglassConfig, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Makes `directory` self-describing. `settings` is what the run was started with, as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, CharTokenizer):
        tokenizer.save(directory / VOCABULARY)
    record = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(config),
        "tokenizer": tokenizer.kind,
        "settings": settings,
    }
    (directory / CONFIG).write_text(json.dumps(record, indent=1) + "\n")


def read_run(directory: str | Path) -> tuple[HourglassConfig, Tokenizer, dict[str, Any]]:
    """What `write_run` wrote. Raises UsageError where the directory is not one of this library's."""
    directory = Path(directory)
    path = directory / CONFIG
    if not path.is_file():
        problem = "is not a checkpoint directory of this library (no config.json)"
        raise UsageError(
            f"{directory}: {problem if directory.exists() else 'no such directory'}; "
            "give the directory that pretrain.py or finetune.py wrote"
        )
    try:
        record = json.loads(path.read_text())
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{path}: format version {version}, but this library reads version {FORMAT_VERSION}; "
                "use the library version that wrote it"
            )
        config = HourglassConfig(**record["model"])
        tokenizer = CharTokenizer.load(directory / VOCABULARY) if record["tokenizer"] == "char" else ByteTokenizer()
        settings = record["settings"]
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{path}: not a configuration of this library ({error!r})") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"{directory}: the vocabulary has {tokenizer.vocab_size} tokens, but the checkpoint's model has "
            f"{config.vocab_size}; put back the vocab.json the model was trained with"
        )
    return config, tokenizer, settings


class CheckpointStore:
    """Checkpoints of a run by step; keeps the latest, to go on from, and the best by validation loss."""

    def __init__(self, directory: str | Path):
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=lambda m: m["valid_loss"], reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            best_fn=lambda metrics: metrics["valid_loss"],
            best_mode="min",
        )
        self._manager = ocp.CheckpointManager(
            (Path(directory) / CHECKPOINTS).absolute(), options=options, item_names=("params", "opt_state")
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        return self._manager.best_step()

    def save(self, step: int, params: Any, opt_state: Any, valid_loss: float) -> None:
        """Writes in the background; `wait` or `close` waits for it."""
        items = ocp.args.Composite(params=ocp.args.StandardSave(params), opt_state=ocp.args.StandardSave(opt_state))
        self._manager.save(step, args=items, metrics={"valid_loss": valid_loss})

    def restore(self, step: int, **templates: Any) -> dict[str, Any]:
        """The items of `step` named by the keywords, each in the shape of its template."""
        items = {name: ocp.args.StandardRestore(_placed(t)) for name, t in templates.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in templates}

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _placed(tree: Any) -> Any:
    # Without an explicit sharding orbax asks for the devices the checkpoint was written on.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def load(path: str | Path) -> tuple[HourglassLM, Tokenizer, HourglassConfig]:
    """Any run directory of this library -> (model, tokenizer, config), at the step of lowest validation loss.

    Raises UsageError where `path` is no such directory, holds no checkpoint, or does not match its vocabulary.
    """
    config, tokenizer, _ = read_run(path)
    abstract = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract)
    if not (Path(path) / CHECKPOINTS).is_dir():
        raise UsageError(f"{path}: holds no checkpoint yet; let pretrain.py reach its first evaluation")
    store = CheckpointStore(path)
    step = store.best_step()
    if step is None:
        raise UsageError(f"{path}: holds no checkpoint yet; let pretrain.py reach its first evaluation")
    params = store.restore(step, params=params)["params"]
    store.close()
    model = nnx.merge(graph, params)
    model.eval()
    return model, tokenizer, config
